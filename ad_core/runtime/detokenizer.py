"""Ids to text, token by token: what is shown once never changes, and nothing long is decoded twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_CONTEXT = 6
"""Ids kept in front of new ones: some decoders treat the first id differently, and a character spans up to four."""
_LONGEST = 24
_REPLACEMENT = "�"


class Vocabulary:
    """The part of a tokenizer that detokenising needs, looked up once an engine. Takes those of transformers and `tokenizers`."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._transformers = hasattr(tokenizer, "all_special_ids")
        added = tokenizer.added_tokens_decoder if self._transformers else tokenizer.get_added_tokens_decoder()
        special = {int(index) for index, token in added.items() if token.special}
        self.special = frozenset(special.union(tokenizer.all_special_ids if self._transformers else ()))

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        # Cleaning up spaces looks ahead, so streamed text could not be a prefix of the whole.
        options = {"clean_up_tokenization_spaces": False} if self._transformers else {}
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, **options)
        return text


class Detokenizer:
    """The text of one sequence behind its prompt.

    The end of the prompt is the context of the first id, so an answer begins with its space where the tokenizer hides one in
    front of a text. An incomplete character at the end is held back until it is whole.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special_tokens: bool):
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special if skip_special_tokens else frozenset[int]()
        last = [index for index in prompt_ids[-_LONGEST:] if index not in self._skipped]
        whole = last if len(prompt_ids) <= _LONGEST else []
        self._window, text = self._context(last, None) or (whole, vocabulary.text(whole))
        self._shown = len(_stable(text))

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is certain now and was not before."""
        self._window += [index for index in ids if index not in self._skipped]
        text = self._vocabulary.text(self._window)
        stable = _stable(text)
        new = stable[self._shown :]
        self._shown = max(self._shown, len(stable))
        if len(self._window) > _LONGEST and stable == text and (context := self._context(self._window, text)):
            self._window, self._shown = context[0], len(context[1])
        elif len(self._window) > 2 * _LONGEST:  # no character in the making, but bytes that are none
            new += text[self._shown :]
            self._window, self._shown = [], 0
        return new

    def flush(self) -> str:
        """What was held back. Nothing may be fed afterwards."""
        return self._vocabulary.text(self._window)[self._shown :]

    def _context(self, ids: list[int], text: str | None) -> tuple[list[int], str] | None:
        """The last few of `ids` with their own text, which is the end of `text`.

        They begin with a whole character: behind a half one, some decoders take all bytes that follow for broken.
        """
        for start in range(max(len(ids) - _CONTEXT, 0), -1, -1):
            end = self._vocabulary.text(ids[start:])
            if end and end[0] != _REPLACEMENT and (text is None or text.endswith(end)):
                return ids[start:], end
        return None


def _stable(text: str) -> str:
    return text.rstrip(_REPLACEMENT)
