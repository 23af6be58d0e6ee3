"""Attention written out in ATen ops, for calls of a seam that no constants describe: what they compute is for the matcher to find out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ad_attention.match.hf_masks import MaskDescription

if TYPE_CHECKING:
    import torch


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskDescription | None,
    scale: float,
    softcap: float | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query [B, H, S, D], key [B, G, L, D], value [B, G, L, Dv] -> [B, S, H, Dv]; L is S if there is a mask. `bias` broadcasts to
    [B, H, S, L], `sinks` are [H] or [B, H, S, 1]. In float32 at least, whatever the dtype."""
    import torch
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    wide = torch.promote_types(query.dtype, torch.float32)
    if not statically_known_true(query.shape[1] == key.shape[1]):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query.to(wide) @ key.to(wide).transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask.seen(query.shape[2], query.device), -torch.inf)
    length = scores.shape[3]
    if sinks is not None:
        column = sinks if sinks.dim() > 1 else sinks.view(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], 1)
        scores = torch.cat([scores, column.to(wide)], -1)
    weights = scores.softmax(-1)[..., :length] if sinks is not None else scores.softmax(-1)
    return (weights @ value.to(wide)).transpose(1, 2).to(value.dtype)
