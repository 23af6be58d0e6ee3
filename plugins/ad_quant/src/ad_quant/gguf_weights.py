"""A GGUF file's tensors as a transformers module names and lays them out, by transformers' own tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from ad_core.api.errors import CheckpointError
from ad_quant.gguf_file import GgufFile, GgufTensor

_DEPTH = 3
"""How many leading parts of a module's names may be missing in a file, and one more."""
_LARGE = 1 << 22
"""Elements from which on a tensor that needs no rearranging is converted in pieces."""


def module_tensors(file: GgufFile, module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that `module` has a place for, in the dtype of that place (else `dtype`), one at a time.

    Raises `CheckpointError` if transformers has no table for this architecture.
    """
    processor, names = _tables(file, module)
    slots = {name: tensor.dtype for name, tensor in module.state_dict(keep_vars=True).items()}
    waiting = Counter(target for tensor in file.tensors if (target := _target(tensor.name, names)) is not None)
    gathered: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
    for tensor in file.tensors:
        target = _target(tensor.name, names)
        if target is None:  # tables of rotary frequencies and the like, which the module computes
            continue
        wanted = slots.get(target, dtype)
        if tensor.name in names and _untouched(processor, tensor):
            yield target, file.read(tensor, wanted)
            continue
        result = processor.process(weights=file.array(tensor), name=tensor.name, tensor_key_mapping=names, parsed_parameters=gathered)
        if result.name in names:
            yield names[result.name], torch.from_numpy(np.ascontiguousarray(result.weights)).to(wanted)
        waiting[target] -= 1
        for name in [name for name in gathered["tensors"] if not waiting[name]]:  # all of its parts have come
            yield name, gathered["tensors"].pop(name).to(slots.get(name, dtype))


def _tables(file: GgufFile, module: nn.Module) -> tuple[Any, Mapping[str, str]]:
    """transformers' object that undoes the layout changes of the conversion to GGUF, and the module's names by the file's."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = str(file.metadata.get("general.architecture"))
    config: Any = module.config
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise CheckpointError(
            f"nobody knows which tensors of a GGUF file of the architecture {architecture!r} are which",
            where=str(file.path),
            hint="a newer gguf package may; or give the model's original checkpoint, a directory with safetensors",
        )
    table = gguf.get_tensor_name_map(kind, config.get_text_config().num_hidden_layers)
    return processor, _names(list(module.state_dict()), table, processor)


def _names(state: list[str], table: Any, processor: Any) -> dict[str, str]:
    """As transformers.modeling_gguf_pytorch_utils.get_gguf_hf_weights_map, which builds the table anew for every part of the module.

    Files of some models were made from the model without its head: names are looked up without their first parts too.
    """
    names: dict[str, str] = {}
    for depth in range(_DEPTH):
        for full in state:
            parts = full.split(".", depth)
            if len(parts) <= depth:
                continue
            lead = "".join(f"{part}." for part in parts[:depth])
            name = processor.preprocess_name(parts[depth])
            stem, dot, leaf = name.rpartition(".")
            suffix = f".{leaf}" if dot and leaf in ("weight", "bias") else ""
            found = table.get_name(stem if suffix else name)
            if found is not None:
                names.setdefault(found + suffix, lead + name)
            else:
                extra: dict[str, str] = {}
                processor.perform_fallback_tensor_mapping(extra, suffix, lead, name)
                for key, value in extra.items():
                    names.setdefault(key, value)
    return names


def _target(name: str, names: Mapping[str, str]) -> str | None:
    """The module's name for a tensor of the file. Stacked experts are listed without ".weight"."""
    return names.get(name) or names.get(name.removesuffix(".weight"))


def _untouched(processor: Any, tensor: GgufTensor) -> bool:
    """Whether a large tensor is taken as it is: tried on one of the same shape that takes no memory."""
    elements = int(np.prod(tensor.shape))
    if elements < _LARGE or "_exps" in tensor.name:
        return False
    stand_in = np.broadcast_to(np.float32(0), tensor.shape)
    result = processor.process(weights=stand_in, name=tensor.name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
    return result.weights is stand_in and result.name == tensor.name
