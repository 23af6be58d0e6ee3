"""SSD in C where the kit's inputs do not go: decay that grows, and blocks that are full, begun and continued."""

from __future__ import annotations

import pytest
import torch

from ad_mamba.kernels.native_ssd import LIBRARY, ssd_native
from ad_mamba.op.ssd import ssd_reference

pytestmark = pytest.mark.skipif(LIBRARY.declined(torch.float32) is not None, reason=str(LIBRARY.declined(torch.float32)))


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["decays", "grows"])
@pytest.mark.parametrize("steps", ["positive", "any"])
@pytest.mark.parametrize("lengths", [(150,), (1, 63, 64, 65), (128, 2)])
def test_prompts_of_any_length_and_decay_are_those_of_float64(sign, steps, lengths):
    torch.manual_seed(0)
    heads, width, groups, size, tokens = 4, 20, 2, 24, sum(lengths)
    x, dt = torch.randn(1, tokens, heads, width), torch.randn(1, tokens, heads) * 0.1
    A, D, bias = sign * torch.rand(heads), torch.randn(heads, width), torch.randn(heads) * 0.1
    B, C, z = torch.randn(1, tokens, groups, size), torch.randn(1, tokens, groups, size), torch.randn_like(x)
    bias = bias - 3.0 if steps == "positive" else bias  # so that nothing grows out of what float32 can tell apart
    options = {"dt_softplus": steps == "positive", "dt_min": 0.0 if steps == "positive" else -9.0, "dt_max": None}
    state = torch.full((len(lengths) + 1, heads, width, size), torch.nan)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    rows_of = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    records = torch.tensor([[rows.start, rows.stop - rows.start, len(lengths) - index, 1] for index, rows in enumerate(rows_of)])
    plan = torch.tensor([tokens, 0, len(lengths), 0, -1])
    out = ssd_native(x, dt, A, B, C, D, z, bias, *options.values(), state, plan, records)
    for rows in rows_of:
        tokenwise = [wide(value[:, rows]) for value in (x, dt, B, C, z)]
        wanted = ssd_reference(*tokenwise[:2], wide(A), *tokenwise[2:4], D=wide(D), z=tokenwise[4], dt_bias=wide(bias), **options)
        torch.testing.assert_close(out[:, rows].double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert state[0].isnan().all(), "a slot of no sequence was written"
