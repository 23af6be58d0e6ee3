"""Stacks that are built in place: what transformers' own operations give, with one source in memory at a time."""

import weakref
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from ad_core.capture.conversion import Conversion
from ad_core.capture.stacks import stacked

from .models import build

ALIVE: "weakref.WeakSet[torch.Tensor]" = weakref.WeakSet()


class Stored:
    """A tensor that is read from nowhere, and counted while anybody holds it."""

    most = 0

    def __init__(self, value):
        self.value, self.dtype, self.shape = value, value.dtype, tuple(value.shape)

    def read(self, dtype=None):
        tensor = self.value.to(dtype, copy=True) if dtype else self.value.clone()
        ALIVE.add(tensor)
        Stored.most = max(Stored.most, len(ALIVE))
        return tensor


def sources(*stacks):
    """(pattern, name, tensor) of every part of every stack, as a conversion has them."""
    generator = torch.Generator().manual_seed(0)
    return [
        (pattern, f"{pattern}.{index}", Stored(torch.randn(shape, generator=generator)))
        for pattern, count, shape in stacks
        for index in range(count)
    ]


GATED = WeightConverter(["e.*.gate", "e.*.up"], "e.both", [MergeModulelist(dim=0), Concatenate(dim=1)])
PLAIN = WeightConverter(["e.*.down"], "e.down", [MergeModulelist(dim=0)])


def theirs(converter, given):
    """The oracle: what transformers' operations make of the same sources."""
    collected = {}
    for pattern, _, stored in given:
        collected.setdefault(pattern, []).append(stored.value)
    for operation in deepcopy(converter).operations:
        collected = operation.convert(
            collected, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns, full_layer_name="", model=None
        )
    (value,) = collected.values()
    return value[0] if isinstance(value, list) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacks_and_joined_stacks_are_what_transformers_builds(dtype):
    both = sources(("e.*.gate", 5, (3, 4)), ("e.*.up", 5, (3, 4)))
    result = stacked(GATED, both, torch.empty(5, 6, 4, dtype=dtype))
    assert torch.equal(result, theirs(GATED, both).to(dtype))
    single = sources(("e.*.down", 5, (4, 3)))
    assert torch.equal(stacked(PLAIN, single, torch.empty(5, 4, 3, dtype=dtype)), theirs(PLAIN, single).to(dtype))


def test_the_joined_stacks_follow_the_converter_and_not_the_order_of_the_names():
    both = sources(("e.*.up", 2, (1, 2)), ("e.*.gate", 2, (3, 2)))
    assert torch.equal(stacked(GATED, both, torch.empty(2, 4, 2)), theirs(GATED, both))


def test_one_source_is_in_memory_at_a_time():
    ALIVE.clear()
    Stored.most = 0
    stacked(GATED, sources(("e.*.gate", 30, (3, 4)), ("e.*.up", 30, (3, 4))), torch.empty(30, 6, 4))
    assert Stored.most == 1


@pytest.mark.parametrize(
    ("converter", "stacks", "shape"),
    [
        (WeightConverter(["e.*.down"], "e.down", [MergeModulelist(dim=0), Transpose(1, 2)]), [("e.*.down", 5, (4, 3))], (5, 3, 4)),
        (WeightConverter(["e.*.down"], "e.down", [MergeModulelist(dim=1)]), [("e.*.down", 5, (4, 3))], (4, 5, 3)),
        (PLAIN, [("e.*.down", 4, (4, 3))], (5, 4, 3)),
        (PLAIN, [("e.*.down", 5, (4, 2))], (5, 4, 3)),
        (GATED, [("e.*.gate", 5, (3, 4)), ("e.*.up", 4, (3, 4))], (5, 6, 4)),
        (GATED, [("e.*.gate", 5, (3, 4))], (5, 6, 4)),
    ],
    ids=["another operation", "another dimension", "too few", "too narrow", "one missing", "one stack missing"],
)
def test_what_is_not_understood_or_does_not_fit_is_left_to_transformers(converter, stacks, shape):
    assert stacked(converter, sources(*stacks), torch.empty(shape)) is None


def test_parts_of_different_shapes_are_left_to_transformers():
    given = sources(("e.*.down", 4, (4, 3)), ("e.*.down", 1, (4, 2)))
    assert stacked(PLAIN, given, torch.empty(5, 4, 3)) is None


def test_a_checkpoint_with_experts_is_streamed_so(tmp_path):
    module = build("mixtral")
    module.save_pretrained(tmp_path)
    stored = {name: Stored(tensor) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    ALIVE.clear()
    Stored.most, found = 0, {}
    for name, tensor in Conversion(module, stored, "here").stream():
        found[name] = tensor.clone()
    assert Stored.most <= 2, "the tensor that was given last, and the one being read"
    wanted = module.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
