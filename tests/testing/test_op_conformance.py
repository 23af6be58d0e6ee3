"""The kit on an op without memory: it passes what is right, and each mutant is caught by the check that asks for it."""

import itertools

import pytest
import torch

from ad_core.graph.ops import define_op
from ad_core.testing import OpConformance, run_checks
from ad_core.testing.toy_op import LOOKUP, LOOKUP_CASES, Lookup, LookupSorted, like, lookup_reference, lookup_sorted

NUMBERS = itertools.count()


class TestLookup(OpConformance):
    op = "ad_core.testing.toy_op:Lookup"
    cases = "ad_core.testing.toy_op:LOOKUP_CASES"
    min_checks = 17


def test_checks_about_memory_are_not_asked():
    report = run_checks(Lookup(), LOOKUP_CASES)
    assert not report.failed
    asked = {name.split("[")[0] for name in report.passed}
    assert "op_tokens_apart" in asked
    assert not asked & {"page_boundary", "permutation", "window"}
    assert len(report.passed) == 17


def red(function, fake=like):
    """The checks that fail for a kernel with this body."""
    name = f"mutant::lookup_{next(NUMBERS)}"
    define_op(name + LOOKUP, function, fake)
    return run_checks(Lookup(), LOOKUP_CASES, [type("Mutant", (LookupSorted,), {"op": name})()]).red


def red_op(function, fake=like):
    op = define_op(f"mutant::lookup_op_{next(NUMBERS)}{LOOKUP}", function, fake)
    return run_checks(type("Mutant", (Lookup,), {"op": op, "kernels": ()})(), LOOKUP_CASES).red


def test_an_op_in_which_tokens_meet():
    assert red_op(lambda x, chosen, table: lookup_reference(x, chosen, table) + x.cumsum(1)) == {"op_tokens_apart"}


def test_an_op_that_looks_ahead():
    assert red_op(lambda x, chosen, table: lookup_reference(x, chosen, table) + x.mean(1, True)) == {"op_tokens_apart", "op_causality"}


def test_an_op_whose_fake_lies():
    assert red_op(lookup_reference, lambda x, chosen, table: x.new_empty(*x.shape[:2], 7)) == {"op_fake"}


def with_capacity(x, chosen, table):
    """Only so many tokens a row of the table, as some routers have it: the rest gets nothing."""
    out = lookup_sorted(x, chosen, table)
    for row in range(table.shape[0]):
        out[0, (chosen[0] % table.shape[0] == row).nonzero().flatten()[4:]] = 0
    return out


def test_a_kernel_that_drops_tokens_when_many_choose_the_same():
    assert {"prefill", "ragged", "float64"} <= red(with_capacity)


def unwritten(x, chosen, table):
    """Rows that chose row 0 are left as memory was."""
    out = x.new_empty(x.shape) if torch.are_deterministic_algorithms_enabled() else torch.zeros_like(x)
    zero = chosen % table.shape[0] == 0
    out[~zero] = lookup_reference(x, chosen, table)[~zero]
    return out if torch.are_deterministic_algorithms_enabled() else lookup_reference(x, chosen, table)


def test_a_kernel_that_leaves_rows_unwritten():
    assert red(unwritten) == {"dirty_memory"}


def in_place(x, chosen, table):
    return x.mul_(table[chosen % table.shape[0]]).clone()


def test_a_kernel_that_writes_to_its_tokens():
    assert "mutation" in red(in_place)


def scaled_by_mates(x, chosen, table):
    """Tokens are normed over the whole step, padded rows among them."""
    return lookup_reference(x, chosen, table) * (1 + 1e-3 * x.abs().mean())


def test_a_kernel_in_which_a_padded_row_is_felt():
    assert {"padding", "independence"} <= red(scaled_by_mates)


def first_strides_only(x, chosen, table):
    """Reads the tokens as if they lay in a row."""
    flat = torch.as_strided(x, x.shape, (x[0].numel(), x.shape[2], 1), x.storage_offset())
    return lookup_reference(flat, chosen, table)


def test_a_kernel_that_believes_in_contiguous_tokens():
    assert red(first_strides_only) == {"strides"}


def by_columns(x, chosen, table):
    """Takes any table that lies in one piece, by its strides or across them."""
    strides = (1, table.shape[0]) if table.stride(0) == 1 else (table.shape[1], 1)
    return lookup_reference(x, chosen, table.as_strided(table.shape, strides))


def rows_in_a_row(x, chosen, table):
    """Makes a copy where numbers lie apart, and believes that rows do not."""
    table = table if table.stride(1) == 1 else table.contiguous()
    return lookup_reference(x, chosen, table.as_strided(table.shape, (table.shape[1], 1)))


def columns_in_a_row(x, chosen, table):
    """Goes by the distance of rows, and believes that numbers lie together."""
    return lookup_reference(x, chosen, table.as_strided(table.shape, (table.stride(0), 1)))


@pytest.mark.parametrize("kernel", [by_columns, rows_in_a_row, columns_in_a_row])
def test_a_kernel_that_believes_in_a_contiguous_table(kernel):
    assert red(kernel) == {"strides"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_kernel_that_accepts_a_dtype_it_computes_badly(dtype):
    def rounded(x, chosen, table):
        result = lookup_reference(x, chosen, table)
        return (result * 8).round() / 8 if str(x.dtype).endswith(dtype) else result

    assert red(rounded) == {"float64"}
