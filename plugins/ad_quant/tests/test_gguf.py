"""GGUF files against transformers' own (slow) loading of the same file, and files that are not whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ad_core.api.errors import CheckpointError, UnknownModelError
from ad_core.capture import export_module, load_weights, open_model
from ad_quant import gguf_file, gguf_weights
from ad_quant.gguf import GGUFLoader
from ad_quant.gguf_file import GgufFile

from .files import KEYS, TYPES, write

REAL = Path(os.environ.get("AD_BENCHMARK_MODEL") or Path(__file__).parents[3] / ".weights" / "SmolLM2-135M-Instruct.Q4_1.gguf")


def opened(path: Path, **options):
    return open_model(path, loaders=[GGUFLoader()], **options)


def theirs(path: Path, dtype: torch.dtype):
    """The oracle."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True), local_files_only=True
    ).eval()


def assert_equal_weights(path: Path, dtype: torch.dtype) -> None:
    model = theirs(path, dtype)
    wanted = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    found = opened(path, dtype=dtype).weights("cpu")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "quant", [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_0, TYPES.Q5_1], ids=lambda q: q.name
)
def test_every_type_of_number_gives_the_tensors_that_transformers_gives(quant, tmp_path):
    assert_equal_weights(write(tmp_path / "tiny.gguf", quant=quant), torch.float32)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3moe", "gemma2", "gpt2"])
def test_every_layout_gives_the_tensors_that_transformers_gives(kind, tmp_path, monkeypatch):
    path = write(tmp_path / "tiny.gguf", kind, TYPES.Q8_0)
    assert_equal_weights(path, torch.float32)
    monkeypatch.setattr(gguf_weights, "_LARGE", 0)  # every tensor that can be is converted in pieces
    monkeypatch.setattr(gguf_file, "_PIECE", 700)
    assert_equal_weights(path, torch.bfloat16)


def test_without_an_output_matrix_the_embedding_is_tied(tmp_path):
    tied, own = write(tmp_path / "tied.gguf"), write(tmp_path / "own.gguf", tied=False)
    weights = opened(tied).weights("cpu")
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    assert not torch.equal((weights := opened(own).weights("cpu"))["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert_equal_weights(own, torch.float32)


@pytest.mark.parametrize("kind", KEYS)
def test_the_configuration_is_that_of_transformers(kind, tmp_path):
    path = write(tmp_path / "tiny.gguf", kind)
    found, wanted = GGUFLoader().open(path).config().to_dict(), AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    for config in (found, wanted):
        config.pop("dtype", None)  # ours says what the file holds
        config.pop("_name_or_path")
    assert found == wanted


def test_the_dtype_is_that_of_the_numbers_and_half_precision_for_quantised_ones(tmp_path):
    for quant, dtype in [
        (TYPES.F32, torch.float32),
        (TYPES.F16, torch.float16),
        (TYPES.BF16, torch.bfloat16),
        (TYPES.Q4_0, torch.bfloat16),
    ]:
        assert opened(write(tmp_path / "tiny.gguf", quant=quant)).dtype is dtype


def test_the_tokenizer_and_what_ends_a_text_come_from_the_file(tmp_path):
    source = opened(write(tmp_path / "tiny.gguf", tokenizer__ggml__eot_token_id=5))
    wanted = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert source.tokenizer().get_vocab() == wanted.get_vocab()
    assert source.tokenizer().encode("ab0c") == wanted.encode("ab0c")
    assert source.eos_token_ids == (2, 5)
    assert source.max_model_len == 64


def test_a_file_becomes_a_graph_that_computes_the_model(tmp_path):
    path = write(tmp_path / "tiny.gguf", quant=TYPES.Q4_1)
    source = opened(path, dtype="float32")
    graph = export_module(source.module).graph
    load_weights(graph, source, "cpu")
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        want = theirs(path, torch.float32)(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(graph(ids, torch.arange(7).expand(2, 7)), want, rtol=1e-4, atol=1e-5)


def test_a_file_that_is_cut_anywhere_is_an_error(tmp_path):
    path = write(tmp_path / "tiny.gguf", quant=TYPES.Q8_0)
    whole = path.read_bytes()
    for length in [3, 10, 23, 100, 700, 1500, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"(?s)no whole GGUF file.*why:.*fetch it again"):
            GGUFLoader().open(path)
    path.write_bytes(whole)
    source = opened(path)
    path.write_bytes(whole[: len(whole) - 5000])
    with pytest.raises(CheckpointError, match="it ends inside the tensor"):
        source.weights("cpu")


def test_a_damaged_header_is_an_error_and_never_eats_memory(tmp_path):
    path = write(tmp_path / "tiny.gguf")
    whole = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    end = max(tensor.start for tensor in GgufFile(path).tensors[:1])
    opened_anyway = 0
    for _ in range(300):
        spoilt = bytearray(whole)
        for place in random.integers(0, end, 3):
            spoilt[place] = random.integers(0, 256)
        path.write_bytes(spoilt)
        try:
            GgufFile(path)
            opened_anyway += 1  # the change fell on a name or a number that nothing checks
        except CheckpointError:
            pass
    assert 0 < opened_anyway < 300


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda data: b"GGML" + data[4:], CheckpointError, "does not begin with the letters GGUF"),
        (lambda data: data[:4] + (1).to_bytes(4, "little") + data[8:], CheckpointError, "of GGUF version 1"),
        (lambda data: data.replace(b"llama", b"blama"), UnknownModelError, "architecture 'blama'"),
        (
            lambda data: data.replace(b"blk.1.attn_q", b"blk.9.attn_q"),
            CheckpointError,
            r"model\.layers\.1\.self_attn\.q_proj\.weight \[64, 64\]",
        ),
    ],
    ids=["magic", "version", "architecture", "missing-tensor"],
)
def test_a_file_of_another_kind_says_what_is_wrong(spoil, error, message, tmp_path):
    path = write(tmp_path / "tiny.gguf")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(error, match=message):
        opened(path).weights("cpu")


def test_a_part_of_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        GGUFLoader().open(write(tmp_path / "tiny.gguf", split__count=3))


def test_the_loader_takes_gguf_files_under_any_name_and_nothing_else(tmp_path):
    path = write(tmp_path / "tiny.gguf")
    path.rename(tmp_path / "model")
    (tmp_path / "other").write_text("hello")
    loader = GGUFLoader()
    assert loader.accepts(tmp_path / "model") is None
    assert loader.accepts(tmp_path / "other").reason == "it is no GGUF file"
    assert loader.accepts(tmp_path).reason == "it is no file"


def test_the_plugin_is_imported_without_torch():
    code = "import ad_quant.plugin, sys; assert 'torch' not in sys.modules and 'gguf' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real file is fetched by `make demo`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_file_gives_the_tensors_that_transformers_gives(dtype):
    assert_equal_weights(REAL, dtype)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real file is fetched by `make demo`")
def test_the_real_tokenizer_is_that_of_transformers():
    ours, wanted = opened(REAL).tokenizer(), AutoTokenizer.from_pretrained(REAL.parent, gguf_file=REAL.name)
    for text in ("The capital of France is", " naïve  spaces\n\n\tand 12345 digits", "<|im_start|>user\nhi<|im_end|>", "日本語 🙂"):
        assert ours.encode(text) == wanted.encode(text)
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(messages, tokenize=False) == wanted.apply_chat_template(messages, tokenize=False)
    assert gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA] == "llama"
