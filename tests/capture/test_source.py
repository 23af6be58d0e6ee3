"""Opening models: directories in every state of repair, modules in memory, and what each says of itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ad_core.api.errors import CheckpointError, ConfigError, ModelError, RemoteCodeError, UnknownModelError
from ad_core.capture import open_model

from .models import Toy, build, prompt

CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class HandmadeConfig(PretrainedConfig):
    model_type = "handmade"

    def __init__(self, width=8, vocab_size=48, **options):
        self.width, self.vocab_size = width, vocab_size
        super().__init__(**options)


class HandmadeForCausalLM(PreTrainedModel):
    config_class = HandmadeConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.head = nn.Linear(config.width, config.vocab_size)
        self.register_buffer("rates", 1.0 / (torch.arange(config.width) + 1.0), persistent=False)
        self.offset = torch.full((config.width,), 0.5)
        self.post_init()

    def forward(self, input_ids, position_ids=None, **options):
        return CausalLMOutput(logits=self.head(self.embed(input_ids) * self.rates + self.offset))
"""


@pytest.fixture
def handmade(tmp_path) -> Path:
    """A directory in Hugging Face's form with code of its own."""
    folder = tmp_path / "handmade"
    folder.mkdir()
    (folder / "modeling_handmade.py").write_text(CODE)
    reference = {"AutoConfig": "modeling_handmade.HandmadeConfig", "AutoModelForCausalLM": "modeling_handmade.HandmadeForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "handmade", "auto_map": reference, "width": 8, "vocab_size": 48}))
    generator = torch.Generator().manual_seed(0)
    from safetensors.torch import save_file

    weights = {"embed.weight": (48, 8), "head.weight": (48, 8), "head.bias": (48,)}
    save_file({name: torch.randn(shape, generator=generator) for name, shape in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "saved"
    build("llama").save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_directory_says_what_it_holds_and_reads_no_weights(saved):
    source = open_model(saved)
    assert all(tensor.is_meta for tensor in [*source.module.parameters(), *source.module.buffers()])
    assert not source.module.training
    about = source.describe()
    assert about["architecture"] == "LlamaForCausalLM"
    assert about["format"] == "safetensors"
    assert about["parameters"] == build("llama").num_parameters()
    assert about["weight_bytes"] == source.nbytes
    assert source.dtype is torch.float32
    assert source.max_model_len == 64
    assert source.eos_token_ids == (2,)
    assert source.tokenizer() is None


def test_what_the_user_says_comes_first(saved):
    source = open_model(saved, max_model_len=17, eos_token_id=[5, 6], dtype="bfloat16", tokenizer=(marker := object()))
    assert (source.max_model_len, source.eos_token_ids, source.dtype) == (17, (5, 6), torch.bfloat16)
    assert source.tokenizer() is marker
    assert next(source.module.parameters()).dtype is torch.bfloat16


def test_the_dtype_of_the_checkpoint_is_taken_and_the_files_decide_where_the_configuration_is_silent(tmp_path):
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert open_model(tmp_path).dtype is torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}))
    assert open_model(tmp_path).dtype is torch.bfloat16


def test_generation_config_names_the_ends(saved):
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert open_model(saved).eos_token_ids == (7, 9)


def test_the_tokenizer_is_loaded_when_it_is_asked_for(saved):
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(saved)
    assert open_model(saved).tokenizer().decode([1]) == "b"
    assert open_model(build("llama"), tokenizer=str(saved)).tokenizer().decode([1]) == "b"
    (saved / "tokenizer.json").write_text("{")
    source = open_model(saved)
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        source.tokenizer()


def test_a_module_in_memory_lends_itself():
    module = build("gpt2").train()
    source = open_model(module)
    assert source.module is module
    assert module.training
    assert source.in_memory
    assert source.max_model_len == 64
    assert source.describe()["source"] == "module in memory"
    weights = source.weights("cpu")
    assert all(weights[name] is tensor for name, tensor in module.named_parameters())
    bare = open_model(Toy(), max_model_len=99, eos_token_id=3)
    assert (bare.config, bare.max_model_len, bare.eos_token_ids) == (None, 99, (3,))
    assert open_model(Toy()).max_model_len is None


def test_a_module_in_memory_is_not_cast():
    with pytest.raises(ConfigError, match=r"(?s)dtype='bfloat16'.*module\.to\(torch\.bfloat16\)"):
        open_model(Toy(), dtype="bfloat16")
    assert open_model(Toy().bfloat16(), dtype="bfloat16").dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="no dtype for a model"):
        open_model(Toy(), dtype="int8")
    with torch.device("meta"):
        empty = Toy()
    with pytest.raises(ModelError, match="on device meta"):
        open_model(empty)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), UnknownModelError, r"(?s)no config\.json.*model\.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), CheckpointError, "config.json cannot be read"),
        (lambda folder: edit_config(folder, model_type="lama"), UnknownModelError, r"(?s)'lama'.*is it 'llama'\?"),
        (lambda folder: edit_config(folder, model_type="vit"), UnknownModelError, "no causal language model .* 'vit'"),
        (lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}), CheckpointError, "quantised .gptq."),
        (lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, "holds no weights"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            CheckpointError,
            r"(?s)pickles.*save_pretrained",
        ),
        (lambda folder: (folder / "model.safetensors").rename(folder / "a.safetensors"), None, ""),
    ],
    ids=["no-config", "broken-config", "unknown-type", "no-language-model", "quantised", "no-weights", "pickle", "other-name"],
)
def test_a_directory_that_cannot_be_opened_says_why(saved, spoil, error, message):
    spoil(saved)
    if error is None:
        open_model(saved)
        return
    with pytest.raises(error, match=message):
        open_model(saved)


def test_paths_that_are_no_model_say_so(tmp_path):
    with pytest.raises(UnknownModelError, match="nothing is downloaded"):
        open_model("someone/some-model")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnknownModelError, match=r"(?s)no loader opens.*core\.safetensors: it is no directory.*ad-quant"):
        open_model(tmp_path / "notes.txt")


def test_a_directory_with_code_of_its_own_is_refused_unless_it_is_trusted(handmade):
    with pytest.raises(RemoteCodeError, match=r"(?s)modeling_handmade\.py.*'handmade'.*trust_remote_code=True"):
        open_model(handmade)
    assert "transformers_modules" not in " ".join(name for name in sys.modules if "handmade" in name)


def test_the_code_of_a_trusted_directory_runs_with_all_its_constants(handmade):
    source = open_model(handmade, trust_remote_code=True)
    assert type(source.module).__name__ == "HandmadeForCausalLM"
    module = source.runnable("cpu")
    ids = prompt(2, 5) % 48
    weights = source.weights("cpu")
    want = (weights["embed.weight"][ids] / (torch.arange(8) + 1.0) + 0.5) @ weights["head.weight"].T + weights["head.bias"]
    with torch.no_grad():
        torch.testing.assert_close(module(ids).logits, want)


def test_code_in_the_directory_of_a_known_type_is_not_needed(saved):
    edit_config(saved, auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert type(open_model(saved).module).__module__.startswith("transformers.models.")
