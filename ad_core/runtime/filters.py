"""Top-k, top-p and min-p as one number a row: the lowest logit that may still be drawn."""

from __future__ import annotations

import numpy as np
import torch

from ad_core.runtime.noise import gumbel

NARROW = 256
"""Candidates that are looked at first on a CPU, where sorting a whole vocabulary takes as long as a layer."""


def draw(logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A sample of every row's softmax: ids [R] of float32 `logits` [R, V], with the noise of `keys` [R, 2]."""
    every_id = torch.arange(logits.shape[1], device=logits.device)
    return argmax(gumbel(keys, every_id).add_(logits))


def draw_filtered(
    logits: torch.Tensor, keys: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, narrow: int = NARROW
) -> torch.Tensor:
    """A sample of every row's softmax over what top-k [R] (0: off), top-p [R] and min-p [R] leave. `logits` are float32.

    Equal logits are kept or dropped together, so the result does not depend on the order in which a sort leaves ties. For the
    same reason the `narrow` candidates of a row serve only if none outside of them could be kept; the other rows are sorted
    as a whole. On an accelerator, where a sort is cheap and asking for the outcome is not, all are.
    """
    if logits.device.type != "cpu" or narrow >= logits.shape[1]:
        return _draw_sorted(logits, keys, top_k, top_p, min_p)
    total = log_total(logits)
    values, ids = logits.topk(narrow, dim=1)  # [R, W], descending
    cut, settled = cutoff(values, total, top_k, top_p, min_p)
    kept = values >= cut[:, None]
    choice = (values + gumbel(keys, ids)).masked_fill_(~kept, -torch.inf).argmax(1, keepdim=True)
    drawn = ids.gather(1, choice)[:, 0]
    if not settled.all():
        rest = (~settled).nonzero()[:, 0]
        drawn[rest] = _draw_sorted(logits[rest], keys[rest], top_k[rest], top_p[rest], min_p[rest])
    return drawn


def cutoff(
    values: torch.Tensor, total: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest logit to keep, [R], and whether `values` [R, W], a row's highest in descending order, are enough to know.

    `total` [R] is the logarithm of the sum of all the row's exponentials. top-p counts probabilities among what top-k
    leaves, min-p is relative to the highest.
    """
    W = values.shape[1]
    limited = top_k > 0
    kth = values.gather(1, top_k.clamp(1, W)[:, None] - 1)
    kth = kth.masked_fill(~limited[:, None], -torch.inf)
    among = values.masked_fill(values < kth, -torch.inf)
    total = torch.where(limited, log_total(among), total)
    probabilities = (among - total[:, None]).exp_()
    summed = probabilities.cumsum(1)
    whole = (top_p >= 1.0)[:, None]
    kept = ((summed - probabilities < top_p[:, None]) | whole) & (values >= kth)
    by_mass = values.masked_fill(~kept, torch.inf).amin(1).masked_fill(whole[:, 0], -torch.inf)
    cut = torch.maximum(torch.maximum(kth[:, 0], by_mass), values[:, 0] + min_p.log())
    # With top-k all that tie with the kth must be among the values, for they count towards top-p.
    enough = torch.where(limited, (top_k < W) & (values[:, -1] < kth[:, 0]), whole[:, 0] | (summed[:, -1] >= top_p))
    return cut, enough & (values[:, -1] < cut)


def log_total(logits: torch.Tensor) -> torch.Tensor:
    """`logits.logsumexp(1)` [R], by way of softmax, whose CPU kernel is ten times as fast."""
    return logits.amax(1) - logits.softmax(1).amax(1).log()


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """ids [R] of the highest logit of each row [R, V]; the first of equals, and the first NaN before all."""
    if logits.device.type != "cpu":
        return logits.argmax(1)
    # torch's argmax over the last dimension is scalar code on a CPU, 40 times slower than numpy's.
    return torch.from_numpy(logits.float().numpy().argmax(1))


def _draw_sorted(logits: torch.Tensor, keys: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    values = _descending(logits)
    cut, _ = cutoff(values, log_total(values), top_k, top_p, min_p)
    return draw(logits.masked_fill(logits < cut[:, None], -torch.inf), keys)


def _descending(logits: torch.Tensor) -> torch.Tensor:
    if logits.device.type != "cpu":
        return logits.sort(dim=1, descending=True).values
    return torch.from_numpy(np.sort(-logits.numpy(), axis=1)).neg_()  # with vector instructions, unlike torch's
