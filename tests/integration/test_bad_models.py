"""Models and options that cannot work: a typed error each, that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ad_core import LLM
from ad_core.api.errors import AdError, CheckpointError, ConfigError, OutOfMemoryBudgetError, UnclaimedMixerError, UnknownModelError

from ..zoo_models import tiny

WEIGHT = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[Path], None]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A model directory to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "spoilt"))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def spoil(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return spoil


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def config(**changes: object) -> Change:
    def spoil(path: Path) -> None:
        values = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps({name: value for name, value in values.items() if value is not None}))

    return spoil


def pickled(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


SPOILT: dict[str, tuple[Change, type[AdError], str]] = {
    "missing tensor": (weights(lambda all: all.pop(WEIGHT)), CheckpointError, rf"1 of .* not in the checkpoint: {WEIGHT}"),
    "truncated": (truncated, CheckpointError, r"(?s)no whole safetensors file.*fetch it again"),
    "wrong shape": (
        weights(lambda all: all.update({WEIGHT: torch.zeros(95, 64)})),
        CheckpointError,
        rf"'{WEIGHT}' has the shape \[95, 64\] in the checkpoint and \[96, 64\] in the model",
    ),
    "not numbers": (
        weights(lambda all: all["model.norm.weight"].fill_(torch.nan)),
        CheckpointError,
        r"(?s)own logits are not numbers.*weights are damaged",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), CheckpointError, "(?s)holds no weights.*expected model.safetensors"),
    "pickles": (pickled, CheckpointError, r"(?s)only there as pickles.*save_pretrained"),
    "unknown architecture": (config(model_type="lama"), UnknownModelError, r"(?s)'lama'.*is it 'llama'"),
    "no language model": (config(model_type="vit"), UnknownModelError, r"(?s)'vit'.*only text generation models"),
    "no model type": (config(model_type=None, architectures=None), UnknownModelError, "names no model_type"),
    "broken config": (lambda path: (path / "config.json").write_text("{"), CheckpointError, "config.json cannot be read"),
    "no config": (lambda path: (path / "config.json").unlink(), UnknownModelError, "(?s)no config.json.*save_pretrained"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILT.values(), ids=SPOILT)
def test_a_directory_that_is_not_whole_is_refused(copy, spoil, error, message):
    spoil(copy)
    with pytest.raises(error, match=message) as refusal:
        LLM(copy, memory="1MiB")
    assert refusal.value.hint


@pytest.mark.parametrize("name", ["nowhere", "notes.txt", "broken.gguf"])
def test_what_is_no_model_is_refused(tmp_path, name):
    path = tmp_path / name
    if name != "nowhere":
        path.write_text("nothing of use")
    kind = CheckpointError if name.endswith("gguf") else UnknownModelError
    with pytest.raises(kind) as refusal:
        LLM(path)
    assert refusal.value.hint


OPTIONS: dict[str, tuple[dict[str, object], type[AdError], str]] = {
    "mistyped key": ({"max_batch_token": 3}, ConfigError, r"(?s)unknown option 'max_batch_token'.*did you mean 'max_batch_tokens'"),
    "text for a number": ({"max_batch_tokens": "3"}, ConfigError, "max_batch_tokens: .*got '3'"),
    "page of nothing": ({"page_size": 0}, ConfigError, "page_size"),
    "memory of nothing": ({"memory": 100}, OutOfMemoryBudgetError, r"(?s)100 B cannot hold.*raise `memory`"),
    "memory in words": ({"memory": "lots"}, ConfigError, "'lots' is not an amount of memory"),
    "longer than the model": ({"max_model_len": 129}, ConfigError, "max_model_len 129 is more than the model's 128"),
    "end outside of the vocabulary": ({"eos_token_id": [2, 128]}, ConfigError, r"(?s)eos_token_id 128 can never.*0 to 127"),
    "no such device": ({"device": "gpu"}, ConfigError, "there is no device 'gpu'"),
    "a device without memory": ({"device": "meta"}, ConfigError, "nothing is computed on the device 'meta'"),
    "no such backend": ({"backend": "eage"}, ConfigError, r"(?s)no compile backend 'eage'.*known are: eager"),
    "no such plugin": ({"plugins": {"attentio": {}}}, ConfigError, r"(?s)'attentio'.*did you mean 'attention'"),
    "no such op": ({"kernels": {"ad_attention::attentio": "x"}}, ConfigError, "did you mean 'ad_attention::attention'"),
    "no such kernel": (
        {"kernels": {"ad_attention::attention": "attention.softmax.torc"}},
        ConfigError,
        r"(?s)no kernel 'attention.softmax.torc'.*did you mean 'attention.softmax.torch'",
    ),
    "a kernel that declines": (
        {"kernels": {"ad_attention::attention": "attention.softmax.triton"}},
        ConfigError,
        r"(?s)kernel 'attention.softmax.triton' cannot run.*where: model.layers.0.self_attn.*interpreter.*attention.softmax.torch",
    ),
    "without its plugin": (
        {"deny_plugins": ["attention"]},
        UnclaimedMixerError,
        r"(?s)model.layers.\{0,1\}.self_attn.*plugin 'attention' \(ad-attention",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS.values(), ids=OPTIONS)
def test_an_option_that_cannot_work_is_refused(folder, monkeypatch, options, error, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error, match=message):
        LLM(folder, **{"memory": "1MiB", "verify": False, **options})


def test_a_model_is_a_path_or_a_module():
    for wrong in (None, 3, [nn.Linear(2, 2)]):
        with pytest.raises(ConfigError, match=r"(?s)a model cannot be a .*torch\.nn\.Module"):
            LLM(wrong)


class Mean(nn.Module):
    """Mixes tokens in a way that nobody claims."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)


class Unheard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mixer, self.head = nn.Embedding(32, 16), Mean(), nn.Linear(16, 32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixer(self.tokens(input_ids)))


def test_a_mixer_that_nobody_claims_is_named_with_its_place():
    with pytest.raises(UnclaimedMixerError, match="tokens but no installed plugin claims it") as refusal:
        LLM(Unheard(), max_model_len=32)
    assert "mixer" in refusal.value.where
    assert "aten.cumsum" in refusal.value.where
    assert "Installed: " in refusal.value.hint


def test_a_layer_that_nobody_claims_says_what_to_install(folder, monkeypatch):
    with pytest.raises(UnclaimedMixerError) as refusal:
        LLM(folder, deny_plugins=["ad-attention"], verify=False)
    assert "For model type 'llama'" in refusal.value.hint
    assert "ad-attention" in refusal.value.hint


def test_a_model_that_was_refused_leaves_the_process_as_it_was(folder):
    module = tiny("llama")
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}, dict(vars(module.config))
    with pytest.raises(AdError):
        LLM(module, deny_plugins=["attention"])
    assert ({name: tensor.data_ptr() for name, tensor in module.state_dict().items()}, dict(vars(module.config))) == before
    with LLM(folder, memory="1MiB") as llm:
        assert len(llm.generate([5, 6, 7])[0].outputs[0].token_ids) > 0
