"""Cases of compressed attention for the conformance kit."""

from __future__ import annotations

from typing import Any

import torch

from ad_attention.latent.testing import choices
from ad_core.testing import Case


def compress_case(name: str, width: int, every: int, *, overlap: bool = False, gate: bool = True, bias: str = "random") -> Case:
    """`bias`: "random", "none", or "first", which leaves of a block its first token alone."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        arguments = {"x": torch.randn(batch, length, width, generator=generator)}
        if gate:
            arguments["gate"] = 2 * torch.randn(batch, length, width, generator=generator)
        if bias == "random":
            arguments["bias"] = torch.randn(every, width, generator=generator)
        elif bias == "first":
            arguments["bias"] = torch.full((every, width), -torch.inf).index_fill_(0, torch.tensor([0]), 0.0)
        return {**{key: value.to(dtype) for key, value in arguments.items()}, "every": every, "overlap": overlap}

    return Case(name, make)


def compressed_case(name: str, heads: int, dim: int, window: int, every: int, count: int | None = None, sinks: bool = False) -> Case:
    """`count`: each token sees a choice of at most so many blocks."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        arguments = {
            "query": torch.randn(batch, length, heads, dim, generator=generator),
            "key": torch.randn(batch, length, dim, generator=generator),
            "entry": torch.randn(batch, length, dim, generator=generator),
        }
        if sinks:
            arguments["sinks"] = torch.randn(heads, generator=generator)
        arguments = {key: value.to(dtype) for key, value in arguments.items()}
        if count is not None:
            arguments["selected"] = _blocks(choices(generator, batch, length, count), every)
        return {**arguments, "scale": 1.5 * dim**-0.5, "window": window, "every": every}

    return Case(name, make)


def _blocks(chosen: torch.Tensor, every: int) -> torch.Tensor:
    """The blocks of chosen positions [B, S, K], each once; those that are not complete are listed as well, and not seen."""
    blocks = torch.where(chosen < 0, -1, chosen // every).sort(-1).values
    repeated = torch.nn.functional.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0), value=False)
    return blocks.masked_fill(repeated, -1)


COMPRESS_CASES = [
    compress_case("mean", 6, 4, gate=False, bias="none"),
    compress_case("first", 6, 4, gate=False, bias="first"),
    compress_case("gated", 6, 3),
    compress_case("gate_only", 6, 7, bias="none"),
    compress_case("each", 6, 1),
    compress_case("overlap", 12, 4, overlap=True),
    compress_case("overlap_pairs", 12, 2, overlap=True, bias="none"),
    compress_case("longer_than_most", 6, 20),
]
COMPRESSED_CASES = [
    compressed_case("all", 4, 16, 5, 4),
    compressed_case("sinks", 3, 16, 7, 3, sinks=True),
    compressed_case("narrow", 4, 16, 1, 2, sinks=True),
    compressed_case("long_blocks", 4, 16, 3, 11, sinks=True),
    compressed_case("chosen", 4, 16, 5, 2, count=4),
    compressed_case("chosen_sinks", 4, 16, 4, 3, count=9, sinks=True),
]
