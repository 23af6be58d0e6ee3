"""A complete op without memory, as small as it can be: every token is multiplied with the row of a table that it chose."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.api import CanonicalOp, Kernel, Role
from ad_core.graph.ops import define_op
from ad_core.testing.cases import Case

LOOKUP = "(Tensor x, Tensor chosen, Tensor table) -> Tensor"


def lookup_reference(x: torch.Tensor, chosen: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x [B, S, C], chosen [B, S] integer, table [E, C] -> [B, S, C]. Every row is a row of the table: what is out of range wraps around."""
    return x * table[chosen % table.shape[0]]


def lookup_sorted(x: torch.Tensor, chosen: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The same row by row of the table, on packed tokens [1, T, C]."""
    out, wrapped = x.new_empty(x.shape), chosen % table.shape[0]
    for row in wrapped.unique().tolist():
        mine = wrapped == row
        out[mine] = x[mine] * table[row]
    return out


def like(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """The result has the form of x."""
    return x.new_empty(x.shape)


lookup = define_op(f"toy::lookup{LOOKUP}", lookup_reference, like)
define_op(f"toy::lookup_sorted{LOOKUP}", lookup_sorted, like)


class LookupSorted(Kernel):
    """The toy's kernel."""

    name = "toy.lookup.sorted"
    target = "toy::lookup"
    op = "toy::lookup_sorted"


class Lookup(CanonicalOp):
    """The toy."""

    name = "toy.lookup"
    op = lookup
    roles = {"x": Role.TOKEN, "chosen": Role.TOKEN, "table": Role.PARAM}
    kernels = (LookupSorted(),)


def _arguments(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, length, 6, generator=generator).to(dtype),
        "chosen": torch.randint(0, 4, (batch, length), generator=generator),
        "table": torch.randn(4, 6, generator=generator).to(dtype),
    }


LOOKUP_CASES = [Case("four_rows", _arguments)]
