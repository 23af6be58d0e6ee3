"""Noise without a history: a pure function of (seed, sample, position, token id).

So a request's text depends neither on who else is in the batch, nor on chunks, nor on a preemption. Integers are hashed
by rounds of multiply and xor-shift (with the constants of Wellons' `lowbias32`); one half of a 64-bit key enters before them
and the other between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MASK = (1 << 64) - 1
_SPREAD, _FIRST, _SECOND = (0x9E3779B1 - (1 << 32), 0x7FEB352D, 0x846CA68B - (1 << 32))  # as int32


def mix64(value: int) -> int:
    """A bijection of 64-bit integers that scatters neighbours (the finalizer of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def stream_key(seed: int, sample: int) -> int:
    """The key of one sample's noise."""
    return mix64(mix64(seed & _MASK) ^ (sample & _MASK))


def position_keys(streams: Sequence[int], positions: Sequence[int], device: torch.device) -> torch.Tensor:
    """[R, 2] int32: the key of every row, from its stream and the position of the token that is to be sampled."""
    keys = [mix64(stream ^ position) for stream, position in zip(streams, positions, strict=True)]
    halves = [[_as_int32(key >> 32), _as_int32(key & 0xFFFFFFFF)] for key in keys]
    return torch.tensor(halves, dtype=torch.int32).reshape(-1, 2).to(device, non_blocking=True)


def scatter(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """32 random-looking bits, int32, of `keys` [R, 2] and ids [V] or [R, K], as [R, V] or [R, K]. A bijection for each key."""
    high, low = keys[:, :1], keys[:, 1:]
    bits = token_ids.to(torch.int32) * _SPREAD
    bits = bits ^ high
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _FIRST
    bits ^= (bits >> 15) & 0x1FFFF
    bits ^= low
    bits *= _SECOND
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _FIRST
    bits ^= (bits >> 15) & 0x1FFFF
    return bits


def uniform(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), float32, in steps of 2^-31 near 0. Shapes as for `scatter`."""
    numbers = (scatter(keys, token_ids) & 0x7FFFFFFF).float()
    return numbers.mul_(2.0**-31).clamp_(2.0**-32, 1.0 - 2.0**-24)


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise: argmax(log p + noise) is a sample of p. Shapes as for `scatter`."""
    # -log(-log(1 - u)) and not -log(-log(u)): float32 is fine-grained near 0, and there lies the noise that wins.
    return uniform(keys, token_ids).neg_().log1p_().neg_().log_().neg_()


def _as_int32(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value
