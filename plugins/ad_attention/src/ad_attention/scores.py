"""What may change a score between its dot product and the softmax: visibility and biases, as functions of positions.

i is the position of a query, j the position of a key in the same sequence.
"""

from __future__ import annotations

import torch

from ad_attention.kernels.distance import distance_buckets, parse_rule
from ad_core.api import Declined
from ad_core.api.errors import ConfigError


def first_visible(position: int, window: int | None, chunk: int | None) -> int:
    """The earliest key position that the query at `position` sees."""
    first = 0 if window is None else max(0, position - window + 1)
    return first if chunk is None else max(first, position // chunk * chunk)


def bucket_table(rel_bias: torch.Tensor, rule: str) -> torch.Tensor | None:
    """The column of `rel_bias` [H, columns] for each distance i - j, int64; None if the distance is the column. The last
    entry (or column) holds for all larger distances. Raises `ConfigError` for an unknown rule."""
    if isinstance(parsed := parse_rule(rule), Declined):
        raise ConfigError(parsed.reason, where="ad_attention::attention", hint='give rel_bias_rule "clip" or "t5:MAX_DISTANCE"')
    table = distance_buckets(rule, rel_bias.shape[1])
    return table if table is None else table.to(rel_bias.device)


def score_bias(
    i: torch.Tensor,
    j: torch.Tensor,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    chunk: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    rel_bias: torch.Tensor | None = None,
    buckets: torch.Tensor | None = None,
) -> torch.Tensor:
    """What is added to the scores: [m, n], or [H, m, n] if a bias has heads; -inf where the query does not see the key.

    `i` [m] and `j` [n] int64; `alibi_slopes` [H], `rel_bias` [H, columns] with its `bucket_table`.
    """
    distance = i[:, None] - j
    blocked = distance < 0
    if window is not None:
        blocked |= distance >= window
    if chunk is not None:
        blocked |= (j // chunk) != (i // chunk)[:, None]
    bias = head_bias(distance, dtype, alibi_slopes, rel_bias, buckets)
    if bias is None:
        return torch.zeros(distance.shape, dtype=dtype, device=i.device).masked_fill_(blocked, -torch.inf)
    return bias.masked_fill_(blocked, -torch.inf)


def head_bias(
    distance: torch.Tensor,
    dtype: torch.dtype,
    alibi_slopes: torch.Tensor | None,
    rel_bias: torch.Tensor | None,
    buckets: torch.Tensor | None,
) -> torch.Tensor | None:
    """The biases that depend on the head and on the distance i - j: [H, *distance.shape], new memory; None if there are none."""
    bias = None
    if alibi_slopes is not None:
        bias = alibi_slopes.to(dtype).view(-1, *[1] * distance.dim()) * -distance
    if rel_bias is not None:
        last = (rel_bias.shape[1] if buckets is None else buckets.shape[0]) - 1
        column = distance.clamp(0, last)
        relative = rel_bias.to(dtype)[:, column if buckets is None else buckets[column]]
        bias = relative if bias is None else bias + relative
    return bias


def query_bias(distance_bias: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """The biases that queries have of their own: [..., H, m, n] of `distance_bias` [..., m, H, E] for the queries at `i` [m] and
    the keys at `j` [n], zero from distance E on. Where j > i it means nothing."""
    extent = distance_bias.shape[-1]
    distance = i[:, None] - j
    by_head = distance_bias.transpose(-3, -2)  # [..., H, m, E]
    spread = by_head.gather(-1, distance.clamp(0, extent - 1).expand(*by_head.shape[:-1], -1))
    return spread.masked_fill(distance >= extent, 0.0)
