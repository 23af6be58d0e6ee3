"""The canonical ops of sparse attention, over one whole sequence: which positions each token chooses, and attention over a choice."""

from __future__ import annotations

from typing import Any

import torch

from ad_attention.latent.op import chosen_keys
from ad_core.api import Role
from ad_core.graph.ops import define_op

ROW_BLOCK = 256
"""Query rows that are scored at once: no S x S matrix of a long sequence ever exists."""

SELECT_SCHEMA = "ad_attention::select(Tensor query, Tensor key, Tensor weight, *, int count, float scale, int every=1) -> Tensor"
SELECT_ROLES = {
    "query": Role.TOKEN,
    "key": Role.TOKEN,
    "weight": Role.TOKEN,
    "count": Role.CONST,
    "scale": Role.CONST,
    "every": Role.CONST,
}

SELECTED_SCHEMA = (
    "ad_attention::selected(Tensor query, Tensor key, Tensor value, Tensor selected, *, float scale, Tensor? sinks=None) -> Tensor"
)
SELECTED_ROLES = {
    "query": Role.TOKEN,
    "key": Role.TOKEN,
    "value": Role.TOKEN,
    "selected": Role.TOKEN,
    "scale": Role.CONST,
    "sinks": Role.PARAM,
}


def index_scores(query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """query [B, n, I, D], key [B, L, D], weight [B, n, I] -> [B, n, L]: sum over heads of weight * relu(query . key * scale)."""
    scores = torch.relu(torch.matmul(query, key.transpose(1, 2)[:, None]) * scale)  # [B, n, I, L]
    return torch.matmul(weight[:, :, None], scores)[:, :, 0]


def select_reference(
    query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor, *, count: int, scale: float, every: int = 1
) -> torch.Tensor:
    """The `count` positions j <= i of highest index score for every i: query [B, S, I, D], key [B, S, D], weight [B, S, I] ->
    [B, S, count] int64, ascending, and -1 in front where there are fewer. Of equal scores any may be taken, as by `torch.topk`.

    The score is the sum over the I index heads of weight * relu(query . key * scale), in float32 for half precision.
    DeepSeek-AI (2025), DeepSeek-V3.2: lightning indexer.

    With `every`, blocks are chosen: block j is tokens j * every to (j + 1) * every - 1, its key is that of the last of them, and from
    that one on it may be chosen. Keys of other tokens are not read.
    """
    batch, length = key.shape[:2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, weight = (x.to(dtype) for x in (query, key[:, every - 1 :: every], weight))
    visible = (torch.arange(length, device=key.device) + 1) // every
    blocks = torch.arange(key.shape[1], device=key.device)
    out = torch.full((batch, length, count), -1, dtype=torch.int64, device=key.device)
    kept = min(count, len(blocks))
    for start in range(0, length, ROW_BLOCK):
        part = slice(start, min(start + ROW_BLOCK, length))
        scores = index_scores(query[:, part], key, weight[:, part], scale).masked_fill(blocks >= visible[part, None], -torch.inf)
        best = scores.topk(kept, -1)
        out[:, part, :kept] = torch.where(best.values == -torch.inf, -1, best.indices)
    return out.sort(-1).values


def select_fake(query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor, *, count: int, scale: float, every: int = 1) -> torch.Tensor:
    """[B, S, count] int64."""
    return query.new_empty(*query.shape[:2], count, dtype=torch.int64)


def selected_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selected: torch.Tensor,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention, query [B, S, H, D], key [B, S, G, D], value [B, S, G, V] -> [B, S, H, V], where i sees of j <= i only the
    positions that `selected` [B, S, K] lists for it (negative: none). Head h reads key/value head h // (H / G). `sinks` [H] is one
    more score a row, with no value. Half precision is computed in float32.
    """
    batch, length, heads, _ = query.shape
    groups = key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [B, G, H/G, S, D]
    k, v = (x.to(dtype).transpose(1, 2)[:, :, None] for x in (key, value))
    steps = torch.arange(length, device=key.device)
    out = query.new_empty(batch, length, heads, value.shape[3])
    for start in range(0, length, ROW_BLOCK):
        part = slice(start, min(start + ROW_BLOCK, length))
        seen = chosen_keys(selected[:, part].long(), length) & (steps <= steps[part, None])
        scores = (q[..., part, :] @ k.transpose(-1, -2) * scale).masked_fill(~seen[:, None, None], -torch.inf)
        if sinks is not None:
            column = sinks.to(dtype).view(groups, -1, 1, 1).expand(batch, -1, -1, scores.shape[3], 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[:, part] = (weights @ v).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out


def selected_fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selected: torch.Tensor, **_: Any) -> torch.Tensor:
    """[B, S, H, V], contiguous, of the query's dtype."""
    return query.new_empty(*query.shape[:3], value.shape[3])


select = define_op(SELECT_SCHEMA, select_reference, select_fake)
selected = define_op(SELECTED_SCHEMA, selected_reference, selected_fake)
