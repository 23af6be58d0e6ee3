"""The built-in checkpoint format: a directory with config.json, safetensors and, if it has one, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ad_core.api.errors import CheckpointError, ModelError, UnknownModelError, nearest
from ad_core.api.loading import Checkpoint, Loader
from ad_core.api.types import Declined
from ad_core.capture.code import check_remote_code
from ad_core.capture.conversion import Conversion
from ad_core.capture.tensor_file import StoredTensor, TensorFile

INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.tiktoken",
)


class SafetensorsLoader(Loader):
    """Opens a directory in Hugging Face's form."""

    name = "core.safetensors"

    def accepts(self, path: Path) -> Declined | None:
        """Every directory: what is missing in it is an error that says so."""
        return None if path.is_dir() else Declined("it is no directory")

    def open(self, path: Path, *, trust_remote_code: bool = False) -> Checkpoint:
        """Reads config.json and the headers of the weights. Raises a `ModelError` that says what is wrong with the files."""
        config = _read_json(path / "config.json")
        if config is None:
            raise UnknownModelError(
                "the directory holds no config.json",
                where=str(path),
                why=f"it holds {_listing(path)}",
                hint="give the directory that `save_pretrained` wrote, or a .gguf file",
            )
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "unknown")
            raise CheckpointError(
                f"the checkpoint is quantised ({method}), which this loader does not read",
                where=str(path / "config.json"),
                hint="give the checkpoint in its original precision, or a .gguf file",
            )
        check_remote_code(path, config, trust_remote_code)
        return SafetensorsCheckpoint(path, _files(path), trust_remote_code)


class SafetensorsCheckpoint(Checkpoint):
    """Tensors are read from the files into memory of their own, piece by piece: the directory may change or go once they are loaded."""

    def __init__(self, path: Path, files: list[TensorFile], trust_remote_code: bool = False):
        self.path = path
        self._files = files
        self._trust = trust_remote_code
        self._stored: dict[str, StoredTensor] = {name: stored for file in files for name, stored in file.tensors.items()}

    def config(self) -> Any:
        """The configuration; its dtype is the checkpoint's if it names none. Raises `UnknownModelError` for a type nobody knows."""
        from transformers import CONFIG_MAPPING, AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=self._trust, local_files_only=True)
        except Exception as error:  # transformers raises ValueError, KeyError, OSError and what the author's code raises
            kind = (_read_json(self.path / "config.json") or {}).get("model_type")
            if kind is None or kind not in CONFIG_MAPPING:
                close = nearest(kind, CONFIG_MAPPING) if kind else None
                raise UnknownModelError(
                    f"transformers does not know the architecture {kind!r}" if kind else "config.json names no model_type",
                    where=str(self.path / "config.json"),
                    why=_first_line(error),
                    hint=f"is it {close!r}? " * bool(close)
                    + "a newer transformers may know it; a module in memory can be given instead of a directory",
                ) from error
            raise UnknownModelError(
                "config.json cannot be read as a configuration", where=str(self.path), why=_first_line(error)
            ) from error
        if getattr(config, "dtype", None) is None:
            floating = (stored.dtype for stored in self._stored.values() if stored.dtype.is_floating_point)
            config.dtype = next(floating, torch.float32)
        return config

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None if the directory has no files of one."""
        if not any(next(self.path.glob(pattern), None) for pattern in _TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self._trust, local_files_only=True)
        except Exception as error:  # as above
            raise ModelError(
                "the tokenizer cannot be loaded", where=str(self.path), why=_first_line(error), hint="token ids work without it"
            ) from error

    def tensors(self, model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Streams the weights as `model` names and lays them out, each in the dtype that `model` has for it."""
        yield from Conversion(model, self._stored, str(self.path)).stream()

    def separate(self, model: nn.Module) -> Iterator[str]:
        """Names that `model` ties and that the checkpoint holds with values of their own."""
        conversion = Conversion(model, self._stored, str(self.path))
        yield from conversion.separate()

    def generation_defaults(self) -> dict[str, Any]:
        """What generation_config.json says."""
        return _read_json(self.path / "generation_config.json") or {}


def _files(path: Path) -> list[TensorFile]:
    """The files of weights, of one or many parts."""
    if (path / "model.safetensors").is_file():
        return [TensorFile(path / "model.safetensors")]
    index = _read_json(path / INDEX)
    if index is not None:
        names = sorted(set(index.get("weight_map", {}).values()))
        absent = [name for name in names if not (path / name).is_file()]
        if absent or not names:
            raise CheckpointError(
                f"{len(absent)} of the checkpoint's {len(names)} parts are missing: {', '.join(absent[:4])}",
                where=str(path / INDEX),
                hint="the download is incomplete: fetch the missing files",
            )
        return [TensorFile(path / name) for name in names]
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return [TensorFile(found[0])]
    if found:
        raise CheckpointError(
            f"the directory holds {len(found)} safetensors files and no {INDEX} that says how they belong together",
            where=str(path),
            hint=f"fetch {INDEX} too, or name the only file model.safetensors",
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"the weights are only there as pickles ({', '.join(pickles[:3])}), which are never loaded",
            where=str(path),
            why="loading a pickle runs whatever code it holds",
            hint="convert them where you trust them: load the model with transformers and call save_pretrained, which writes safetensors",
        )
    raise CheckpointError(
        "the directory holds no weights", where=str(path), why=f"it holds {_listing(path)}", hint="expected model.safetensors"
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read", where=str(path), why=str(error), hint="the file is damaged: fetch it again"
        ) from error
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path.name} holds no object", where=str(path), hint="the file is damaged: fetch it again")
    return dict(value)


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
