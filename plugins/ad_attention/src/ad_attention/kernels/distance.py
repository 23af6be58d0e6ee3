"""Bucketed relative biases as tables by distance, so that a kernel needs one lookup and knows no rule."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from ad_core.api import Declined


def parse_rule(rule: str) -> int | Declined | None:
    """The maximum distance of a rule "t5:MAX_DISTANCE"; None for "clip", whose buckets are distances already."""
    if rule == "clip":
        return None
    kind, _, distance = rule.partition(":")
    if kind == "t5" and distance.isdecimal() and int(distance) > 0:
        return int(distance)
    return Declined(f"unknown rule {rule!r} for rel_bias; known are 'clip' and 't5:MAX_DISTANCE'")


@lru_cache
def distance_buckets(rule: str, buckets: int) -> torch.Tensor | None:
    """The bucket of every distance i - j >= 0 as int64 [distances]; its last entry holds for all larger ones. None: the identity.

    "t5" is the causal half of Raffel et al. (2020): half of the buckets are exact, the others grow by logarithm up to
    the maximum distance. The logarithm is taken in float32, as the models that use it do.
    """
    furthest = parse_rule(rule)
    if not isinstance(furthest, int):
        return None
    exact = buckets // 2
    distances = torch.arange(max(furthest, exact) + 1)
    if furthest <= exact:  # nothing is left for the logarithm: the exact buckets, then the last one
        return torch.where(distances < exact, distances, buckets - 1)
    growth = torch.log(distances.clamp(min=1).float() / exact) / math.log(furthest / exact) * (buckets - exact)
    return torch.where(distances < exact, distances, (exact + growth.long()).clamp(max=buckets - 1))
