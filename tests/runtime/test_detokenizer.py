"""Text from ids, against the decoding of everything at once."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ad_core.runtime.detokenizer import Detokenizer, Vocabulary

CORPUS = ["the quick brown fox, the lazy dog. ", "où est la gare? größer 你好世界 🙂🙃 café naïve  two  spaces\n\tand a tab", "<tool>"]
TEXTS = st.text(st.sampled_from("the quick .,\n\t éß你好世🙂🏳️‍🌈€�"), max_size=60)


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE: one character may take up to four tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Sentence pieces with bytes for what is unknown: the space in front of a text is hidden."""
    letters = sorted(set("".join(CORPUS[:1])) | {"▁"})
    vocabulary = {
        token: index for index, token in enumerate(["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t", "▁th"])
    }
    merges = [("▁", "t"), ("▁t", "h")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte-level": byte_level, "byte-fallback": byte_fallback}


def stream(vocabulary: Vocabulary, prompt: list[int], ids: list[int], cuts: list[int], skip: bool = True) -> tuple[str, list[str]]:
    detokenizer, pieces, place = Detokenizer(vocabulary, prompt, skip), [], 0
    for cut in cuts:
        pieces.append(detokenizer.feed(ids[place : place + cut]))
        place += cut
    pieces.append(detokenizer.feed(ids[place:]))
    pieces.append(detokenizer.flush())
    return "".join(pieces), pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(before=TEXTS, after=TEXTS, cuts=st.lists(st.integers(1, 3), max_size=200))
def test_pieces_add_up_to_the_text_decoded_at_once(name, before, after, cuts):
    tokenizer = TOKENIZERS[name]()
    both = tokenizer(before + after, add_special_tokens=False).input_ids
    for split in {0, len(both) // 2 if name == "byte-level" else 0, len(tokenizer(before, add_special_tokens=False).input_ids)}:
        prompt, ids = both[:split], both[split:]
        text, _ = stream(Vocabulary(tokenizer), prompt, ids, cuts)
        whole, shown = tokenizer.decode(both), tokenizer.decode(prompt) if prompt else ""
        assert text == whole[len(shown.rstrip("�")) :]


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(2, 300), max_size=40), cuts=st.lists(st.integers(1, 2), max_size=40))
def test_ids_that_are_no_text_decode_alike_in_pieces_and_at_once(ids, cuts):
    tokenizer = byte_level()
    assert stream(Vocabulary(tokenizer), [], ids, cuts)[0] == tokenizer.decode(ids)


def test_half_a_character_is_held_back_until_it_is_whole():
    tokenizer = byte_level()
    ids = tokenizer("a𐍈b", add_special_tokens=False).input_ids
    assert len(ids) == 6  # the letter takes four
    _, pieces = stream(Vocabulary(tokenizer), [], ids, [1] * 6)
    assert pieces == ["a", "", "", "", "𐍈", "b", "", ""]


def test_the_hidden_space_in_front_of_an_answer_is_there():
    tokenizer = byte_fallback()
    prompt, ids = tokenizer("the", add_special_tokens=False).input_ids, tokenizer("the", add_special_tokens=False).input_ids
    assert stream(Vocabulary(tokenizer), prompt, ids, [1])[0] == " the"
    assert stream(Vocabulary(tokenizer), [], ids, [1])[0] == "the"


def test_special_tokens_are_left_out_or_kept():
    tokenizer = byte_level()
    ids = tokenizer("a</s>b", add_special_tokens=False).input_ids
    assert stream(Vocabulary(tokenizer), [], ids, [1, 1])[0] == "ab"
    assert stream(Vocabulary(tokenizer), [], ids, [1, 1], skip=False)[0] == "a</s>b"


def test_a_character_split_between_prompt_and_answer_belongs_to_the_answer():
    tokenizer = byte_level()
    ids = tokenizer("x𐍈", add_special_tokens=False).input_ids
    assert stream(Vocabulary(tokenizer), ids[:3], ids[3:], [1, 1])[0] == "𐍈"


def test_long_runs_of_bytes_are_cut_between_characters():
    tokenizer = byte_fallback()
    text = "你好世🙂" * 30
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert stream(Vocabulary(tokenizer), [], ids, [1] * len(ids))[0] == text


def test_the_end_of_a_prompt_is_taken_from_a_whole_character_on():
    tokenizer = byte_fallback()
    both = tokenizer("the🙂🙂🙂", add_special_tokens=False).input_ids
    assert stream(Vocabulary(tokenizer), both[:-4], both[-4:], [1] * 4)[0] == "🙂"


def test_garbage_without_end_is_shown_in_the_end_and_costs_no_more_with_length():
    tokenizer = byte_level()
    lone = tokenizer("𐍈", add_special_tokens=False).input_ids[1]
    detokenizer = Detokenizer(Vocabulary(tokenizer), [], True)
    text = "".join(detokenizer.feed([lone]) for _ in range(500))
    assert set(text) == {"�"}
    assert len(detokenizer._window) < 60
    good = tokenizer("the dog", add_special_tokens=False).input_ids
    assert (detokenizer.feed(good) + detokenizer.flush()).endswith("the dog")


def test_a_bare_tokenizer_of_the_tokenizers_library_will_do():
    tokenizer = byte_level()
    vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    ids = tokenizer("the</s> dog", add_special_tokens=False).input_ids
    assert stream(vocabulary, [], ids, [1])[0] == "the dog"
