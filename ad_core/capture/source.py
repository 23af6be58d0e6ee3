"""Where a model comes from: a checkpoint on disk or a module in memory, behind one face."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ad_core.api.errors import ConfigError, ModelError, UnknownModelError
from ad_core.api.loading import Checkpoint, Loader
from ad_core.capture.buffers import computed_buffers, constants_of
from ad_core.capture.counting import counting_of
from ad_core.capture.forward import forward_form
from ad_core.capture.ties import untie
from ad_core.capture.weights import Progress, fill_module, place_weights, read_weights, restore_module

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")


class ModelSource:
    """A model that can be captured: `module` (on meta if it comes from a checkpoint, else the user's own), `config`, `dtype`.

    `max_model_len` is what was asked for or else the longest sequence that the model says it takes; a `ConfigError` if it cannot take
    that. `counts_otherwise`: left to itself it takes other positions than 0, 1, 2 ...
    Weights of a checkpoint are read once, by the first call of `weights`, and kept until `release`; from then on the module is on
    meta again and the graph holds them alone. A module in memory lends its weights and is never changed.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        dtype: torch.dtype,
        config: Any = None,
        checkpoint: Checkpoint | None = None,
        max_model_len: int | None = None,
        eos_token_ids: Sequence[int] = (),
        tokenizer: Any = None,
        computed: dict[str, torch.Tensor] | None = None,
    ):
        self.module, self.name, self.dtype, self.config, self.checkpoint = module, name, dtype, config, checkpoint
        self.eos_token_ids = tuple(eos_token_ids)
        self._tokenizer, self._asked = tokenizer, tokenizer is not None
        self._computed = computed or {}
        self.counts_otherwise, table = counting_of(module, self.special_ids, self._computed)
        self.max_model_len = _longest(max_model_len, config, table)
        self._weights: tuple[torch.device, dict[str, torch.Tensor]] | None = None
        self._filled: list[tuple[dict[str, Any], str, Any]] = []

    @property
    def in_memory(self) -> bool:
        """Whether the module is the user's own."""
        return self.checkpoint is None

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that may mean something else than text."""
        values = [getattr(self.config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")]
        ids = {item for value in values for item in (value if isinstance(value, list | tuple) else [value])} | set(self.eos_token_ids)
        return frozenset(item for item in ids if isinstance(item, int) and item >= 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, tied ones once, as they will be loaded."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())

    @property
    def computed(self) -> Mapping[str, torch.Tensor]:
        """Buffers of a module on meta whose values no checkpoint holds, on the CPU: masks and rotary tables. Not to be written."""
        return self._computed

    def tokenizer(self) -> Any | None:
        """The tokenizer, loaded at the first call; None if there is none."""
        if not self._asked:
            self._tokenizer = self.checkpoint.tokenizer() if self.checkpoint is not None else None
            self._asked = True
        return self._tokenizer

    def weights(self, device: torch.device | str, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        """Every tensor of the module by every name, on `device`. Reads the checkpoint the first time. Raises `CheckpointError`."""
        device = torch.device(device)
        if self._weights is None or self._weights[0] != device:
            if self.checkpoint is None:
                moved: dict[int, torch.Tensor] = {}
                tensors = [*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers(remove_duplicate=False)]
                values = {
                    name: moved.setdefault(id(tensor), tensor if tensor.device == device else tensor.detach().to(device))
                    for name, tensor in tensors
                }
            else:
                values = read_weights(self.module, self.checkpoint, self.dtype, self._computed, device, progress)
            self._weights = (device, values)
        return self._weights[1]

    def runnable(self, device: torch.device | str, progress: Progress | None = None) -> nn.Module:
        """The unpatched module with its weights in place, sharing memory with `weights(device)`. One in memory stays where it is."""
        if self.checkpoint is not None and not self._filled:
            self._filled = fill_module(self.module, self.weights(device, progress))
        return self.module

    def release(self) -> None:
        """Lets go of the weights of a checkpoint: whoever took them from `weights` holds them alone."""
        restore_module(self._filled)
        self._filled, self._weights = [], None

    def describe(self) -> dict[str, Any]:
        """What a person wants to know, as plain data."""
        parameters = {id(tensor): tensor.numel() for tensor in self.module.parameters()}
        return {
            "name": self.name,
            "source": "module in memory" if self.checkpoint is None else str(self.checkpoint.path),
            "format": "" if self.checkpoint is None else type(self.checkpoint).__name__.removesuffix("Checkpoint").lower(),
            "architecture": type(self.module).__name__,
            "model_type": getattr(self.config, "model_type", None),
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": sum(parameters.values()),
            "weight_bytes": self.nbytes,
            "max_model_len": self.max_model_len,
            "eos_token_ids": list(self.eos_token_ids),
        }


def load_weights(graph: GraphModule, source: ModelSource, device: torch.device | str, progress: Progress | None = None) -> int:
    """The LOAD stage: gives `graph` the source's weights on `device`; the source lets go of them. Returns the bytes that the graph holds.

    The checkpoint is read now unless `capture` has done so to compare numbers. Raises `CheckpointError` for what is wrong with it,
    `GraphInvalidError` if the graph reads a tensor that has no value after it.
    """
    held = place_weights(graph, source.weights(device, progress))
    source.release()
    return held


def open_model(
    model: str | Path | nn.Module,
    *,
    loaders: Iterable[Any] = (),
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    max_model_len: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> ModelSource:
    """Opens a directory, a file that one of `loaders` accepts, or a module in memory. Reads no weights.

    `loaders` are `Loader`s or registry offers of them, asked after the core's own for directories. `tokenizer` replaces the model's:
    an object, or a path. `max_model_len` and `eos_token_id` come before what the model says of itself. Raises a `ModelError`
    (unknown model, checkpoint, remote code) or a `ConfigError`.
    """
    if isinstance(model, nn.Module):
        return _from_memory(model, tokenizer, dtype, max_model_len, eos_token_id)
    path = Path(model).expanduser()
    if not path.exists():
        raise UnknownModelError(
            f"there is no {str(model)!r}",
            why="models are opened from disk; nothing is downloaded",
            hint="give a directory with config.json and safetensors, a .gguf file, or a torch.nn.Module",
        )
    loader = _loader_for(path, loaders)
    checkpoint = loader.open(path, trust_remote_code=trust_remote_code)
    config = checkpoint.config()
    wanted = _dtype(dtype, getattr(config, "dtype", None))
    module = build_module(config, wanted, trust_remote_code, str(path))
    for name in checkpoint.separate(module):
        untie(module, name)

    def build() -> nn.Module:
        return build_module(config, wanted, trust_remote_code, str(path), device="cpu")

    constants_of(module, build)
    ends = eos_token_id if eos_token_id is not None else checkpoint.generation_defaults().get("eos_token_id")
    return ModelSource(
        module,
        name=path.name,
        dtype=wanted,
        config=config,
        checkpoint=checkpoint,
        max_model_len=max_model_len,
        eos_token_ids=_ids(ends if ends is not None else _of_text(config, "eos_token_id")),
        tokenizer=_given_tokenizer(tokenizer, trust_remote_code),
        computed=computed_buffers(module, build),
    )


def build_module(config: Any, dtype: torch.dtype, trust_remote_code: bool, where: str, device: str = "meta") -> nn.Module:
    """The causal language model of a configuration, in eval mode; on meta, without memory. Raises `UnknownModelError`."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device(device):
            named = None if type(config) in AutoModelForCausalLM._model_mapping else _named_class(config)
            if named is not None:
                module: nn.Module = named._from_config(config, dtype=dtype)
            else:
                module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # the constructor of any model, the author's own code among them
        kind = getattr(config, "model_type", None)
        raise UnknownModelError(
            f"no causal language model can be built for model_type {kind!r}",
            where=where,
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            hint="only text generation models are served; check config.json, or install what the error names",
        ) from error
    _keep_in_float32(module, dtype)
    return module.eval().requires_grad_(False)


def _named_class(config: Any) -> Any | None:
    """The class of transformers that the configuration itself names, if it generates text from it: the one that a part of a larger model
    was saved as, whose own type the library lists nowhere."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if (
            isinstance(kind, type)
            and issubclass(kind, transformers.GenerationMixin)
            and getattr(kind, "config_class", None) is type(config)
        ):
            return kind
    return None


def _keep_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Some modules say which of their parameters lose too much in half precision."""
    strict, half = (set(getattr(module, name, None) or ()) for name in ("_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"))
    patterns = (strict if dtype in (torch.float16, torch.bfloat16) else set()) | (half if dtype is torch.float16 else set())
    if not patterns:
        return
    import re

    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    for path, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point() and kept.search(f"{path}.{name}"):
                parameter.data = parameter.data.float()


def _from_memory(
    module: nn.Module, tokenizer: Any, dtype: str | torch.dtype, max_model_len: int | None, eos_token_id: int | Sequence[int] | None
) -> ModelSource:
    forward_form(module)  # raises for what cannot be called with ids
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lost = [name for name, tensor in tensors if tensor.is_meta]
    if lost:
        raise ModelError(
            f"the module has no weights: {lost[0]!r} is on device meta",
            where=type(module).__name__,
            hint="load its weights first, or give a directory",
        )
    own = next((tensor.dtype for _, tensor in tensors if tensor.is_floating_point()), torch.float32)
    if _dtype(dtype, own) is not own:
        raise ConfigError(
            f"dtype={dtype!r} was asked for a module in memory that is {own}",
            why="its weights are lent as they are",
            hint=f"leave dtype out, or cast it first: module.to({_dtype(dtype, own)})",
        )
    config = getattr(module, "config", None)
    ends = eos_token_id
    if ends is None:
        ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = _of_text(config, "eos_token_id")
    return ModelSource(
        module,
        name=type(module).__name__,
        dtype=own,
        config=config,
        max_model_len=max_model_len,
        eos_token_ids=_ids(ends),
        tokenizer=_given_tokenizer(tokenizer, False),
    )


def _loader_for(path: Path, loaders: Iterable[Any]) -> Loader:
    from ad_core.capture.safetensors import SafetensorsLoader

    reasons = []
    for offered in [SafetensorsLoader(), *(getattr(entry, "item", entry) for entry in loaders)]:
        declined = offered.accepts(path)
        if declined is None:
            return offered  # type: ignore[no-any-return]
        reasons.append(f"{offered.name}: {declined.reason}")
    raise UnknownModelError(
        "no loader opens this file",
        where=str(path),
        why="; ".join(reasons),
        hint="a directory needs config.json and safetensors; a .gguf file needs the plugin ad-quant",
    )


def _given_tokenizer(tokenizer: Any, trust_remote_code: bool) -> Any:
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises ValueError, OSError, KeyError
        raise ModelError(
            "the tokenizer cannot be loaded",
            where=str(tokenizer),
            why=str(error).strip().splitlines()[0],
            hint="give a directory with tokenizer files",
        ) from error


def _dtype(asked: str | torch.dtype, own: Any) -> torch.dtype:
    value = own if asked == "auto" else asked
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), None)
    if value is None and asked == "auto":
        return torch.float32
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ConfigError(f"{asked!r} is no dtype for a model", hint='use "auto", "float32", "bfloat16" or "float16"')
    return value


def _longest(asked: int | None, config: Any, table: int | None) -> int | None:
    """Positions behind the model's last have no embedding (of which a `table` has so many), or one that it was never trained on."""
    own = min((length for length in (_length(config), table) if length is not None), default=None)
    if asked is not None and own is not None and asked > own:
        raise ConfigError(
            f"max_model_len {asked} is more than the model's {own}",
            hint="leave it out; a model that can do more says so in its config.json",
        )
    return asked or own


def _length(config: Any) -> int | None:
    return next((value for name in _LENGTHS if isinstance(value := _of_text(config, name), int) and value > 0), None)


def _of_text(config: Any, name: str) -> Any:
    """An attribute of the configuration, or of the part of it that describes the text model."""
    value = getattr(config, name, None)
    if value is None and callable(getattr(config, "get_text_config", None)):
        value = getattr(config.get_text_config(), name, None)
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else tuple(int(item) for item in value)
