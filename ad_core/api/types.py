"""The small words of the contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pydantic

API_VERSION = (1, 0)
"""(major, minor) of the contract. A minor adds; only a major, which has a new entry-point group, changes a meaning."""

ENTRY_POINT_GROUP = "ad_core.plugins.v1"

Safety = Literal["exact", "reordered", "lossy"]
"""What a pass may do to the numbers: nothing, rounding of reordered sums, or a stated loss (quantisation)."""


@dataclass(frozen=True)
class PluginInfo:
    """What a plugin says of itself, as the module's `INFO`."""

    name: str
    api: tuple[int, int]
    op_namespaces: tuple[str, ...] = ()
    config: type[pydantic.BaseModel] | None = None
    summary: str = ""


class Stage(IntEnum):
    """Where in the pipeline a pass runs. Stages follow each other in this order."""

    CAPTURE = 0
    CLEAN = 1
    MATCH = 2
    QUANTIZE = 3
    SHARD = 4
    LOAD = 5
    FUSE = 6
    CACHE = 7
    COMPILE = 8


class Role(StrEnum):
    """What an argument of a canonical op is. It makes the conformance kit generic."""

    TOKEN = "token"
    """[B, S, ...]: one entry a token, the sequence at dimension 1. Outputs are always TOKEN."""
    PARAM = "param"
    """A weight: the same for all tokens."""
    CONST = "const"
    """A Python value of the call: a scale, a window."""


@dataclass(frozen=True)
class Declined:
    """A no, with its reason. Returned, never raised, and always recorded in the plan."""

    reason: str


@dataclass(frozen=True)
class OpCall:
    """One call of an op in a graph: everything a plugin may look at to decide, and nothing it can change.

    `arguments` holds every argument of the schema by name, defaults filled in: a fake tensor, a constant, or None.
    Sizes that depend on the batch or the length are `torch.SymInt`.
    """

    node: str
    module: str
    op: str
    arguments: Mapping[str, Any] = field(hash=False)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


@dataclass(frozen=True)
class Environment:
    """Where a kernel would run."""

    device: str
    capability: tuple[int, int] | None = None
    page_size: int = 16
    interpret: bool = False
    """Triton kernels are run by Triton's interpreter, on CPU tensors."""


@dataclass(frozen=True)
class Limits:
    """The largest step that the engine will ever make. Buffers are sized from it, once."""

    max_tokens: int
    max_sequences: int
    max_model_len: int
    page_size: int

    @property
    def max_pages(self) -> int:
        """Pages that the longest sequence takes: the width of `page_table`."""
        return -(-self.max_model_len // self.page_size)


@dataclass(frozen=True)
class ShardRule:
    """How an op divides over the ranks of one mesh axis: a fact about the op, whoever decides to use it.

    `splits` maps an argument or resource to the dimension that is cut; `output` is the dimension of the result that is
    cut, or "sum" for partial sums; `divides` names the count that the number of ranks must divide.
    """

    op: str
    axis: str
    splits: Mapping[str, int] = field(hash=False)
    output: int | Literal["sum"]
    divides: str
