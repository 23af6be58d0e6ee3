"""Mixers, canonical ops without memory, and kernels: what a plugin brings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ad_core.api.resources import BufferSpec, Resource
from ad_core.api.types import Declined, Environment, Limits, OpCall, Role, ShardRule

if TYPE_CHECKING:
    import torch
    from torch._ops import OpOverload

    from ad_core.api.batch import BatchView
    from ad_core.api.matching import Matcher, Seam


class Kernel(ABC):
    """One implementation of the cached form of a canonical op.

    Every argument of `op` is bound by name: an argument of the canonical call, a batch field (`ad_core.api.batch`), a
    resource of the mixer, the constant `append`, or one of the kernel's own buffers. The op writes to resources, and to
    those of its buffers that are scratch; the schema declares both mutable (`Tensor(a!)`). `prepare` fills the other buffers.
    """

    name: str
    """"toy.mix.triton"."""
    target: str
    """The canonical op that it serves: "ad_toy::mix"."""
    op: str
    """The cached op: "ad_toy::mix_triton"."""
    priority: int = 0
    """0 reference, 100 portable, 200 vendor."""
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    dtypes: frozenset[str] = frozenset({"float32", "bfloat16", "float16"})
    requires: tuple[str, ...] = ()
    """PEP 508 requirements, checked from installed metadata, never by importing."""
    graph: Literal["full", "decode", "never"] = "never"
    """How far a CUDA graph may include it: every step, steps of pure decode, or none."""

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        """None if the kernel computes this call here, else why not. Devices, dtypes and requirements are checked before."""
        return None

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        """The kernel's own tensors by argument name. Calls of one `group_key` share them."""
        return {}

    def group_key(self, call: OpCall) -> Hashable:
        """Calls with equal keys share buffers and one `prepare` a step (within a page group)."""
        return ()

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        """Fills `out`, its buffers, in place from the batch's host side. Runs once a step and group, before the graph."""


class CanonicalOp(ABC):
    """A canonical op: stateless, causal, whole sequence in, whole sequence out. The semantic truth of a computation."""

    name: str
    """"toy.mix"."""
    op: OpOverload
    """Made by `ad_core.graph.define_op(schema, reference, fake)`."""
    roles: Mapping[str, Role]
    """The role of every argument of the schema."""
    matchers: Sequence[Matcher | Seam] = ()
    kernels: Sequence[Kernel] = ()

    def shard_rules(self) -> Sequence[ShardRule]:
        """How the op divides over ranks."""
        return ()


class Mixer(CanonicalOp):
    """A canonical op that moves information between tokens, so it keeps memory between steps."""

    @abstractmethod
    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        """What the call keeps, by argument name of the cached ops. Shapes are read from the call's fake tensors only.

        `options` is the plugin's section of the configuration.
        """

    def sharing_key(self, call: OpCall) -> tuple[str, ...]:
        """Names of the arguments whose nodes identify the memory: calls that agree in them share one resource, and only
        the first of them appends. Empty: the memory belongs to this call alone."""
        return ()
