"""The kit and a kernel that keeps one entry for several tokens: a toy, and one that writes its entries too early."""

import functools
import itertools

import torch

from ad_core.api import BufferSpec, PagedTokens, Role
from ad_core.graph.ops import define_op
from ad_core.testing import Case, run_checks
from ad_core.testing.toys import Recall, RecallPaged

EVERY = 3
NUMBERS = itertools.count()
LATEST_PAGED = "(Tensor x, Tensor(a!) entries, Tensor page_table, Tensor bounds) -> Tensor"


def latest_reference(x):
    """What the last token of the latest complete block was, or zero."""
    blocks = (torch.arange(x.shape[1]) + 1) // EVERY
    return torch.where((blocks > 0)[:, None], x[:, (blocks * EVERY - 1).clamp(min=0)], 0)


def latest_paged(x, entries, page_table, bounds, early=0):
    """`early`: an entry is written so many tokens before its block is complete."""
    out = torch.zeros_like(x)
    for row, (first, count, context, page_size) in enumerate(bounds.tolist()):
        place = lambda end, row=row, size=page_size: (page_table[row, end // size].long(), end % size // EVERY)  # noqa: E731
        for position in range(context, context + count):
            token, end = first + position - context, (position + 1) // EVERY * EVERY - 1
            if (position + 1) % EVERY >= EVERY - early:
                entries[place(position - position % EVERY + EVERY - 1)] = x[0, token]
            if end == position:
                entries[place(end)] = x[0, token]
            if end >= 0:
                out[0, token] = entries[place(end)]
    return out


class Latest(Recall):
    """One entry for three tokens."""

    op = define_op("mutant::latest(Tensor x) -> Tensor", latest_reference, torch.empty_like)
    roles = {"x": Role.TOKEN}

    def resources(self, call, options):
        return {"entries": PagedTokens((int(call["x"].shape[2]),), call["x"].dtype, every=EVERY)}

    def sharing_key(self, call):
        return ()


def red_latest(**options):
    name = f"mutant::latest_{next(NUMBERS)}"
    define_op(name + LATEST_PAGED, functools.partial(latest_paged, **options), lambda x, *_: torch.empty_like(x))

    class Paged(RecallPaged):
        target, op = "mutant::latest", name

        def buffers(self, call, limits):
            return {"bounds": BufferSpec((limits.max_sequences, 4), torch.int64, "host")}

        def prepare(self, batch, call, out):
            rows = [batch.host(name) for name in ("cu_seqlens", "query_lens", "context_lens")]
            out["bounds"].zero_()
            sizes = torch.full_like(rows[1], batch.page_size)
            out["bounds"][: batch.num_sequences] = torch.stack([rows[0][:-1], *rows[1:], sizes], 1)

    def make(generator, batch, length, dtype):
        return {"x": torch.randn(batch, length, 6, generator=generator).to(dtype)}

    return run_checks(Latest(), [Case("blocks", make)], [Paged()]).red


def test_an_entry_of_several_tokens_belongs_to_the_step_that_completes_it():
    assert red_latest() == set()
    assert "padding" in red_latest(early=1)
