"""Tile sizes of latent attention in Triton: from what compiles for sm_90 without local memory, unmeasured on a device."""

from __future__ import annotations

from ad_attention.kernels.triton_tiles import Tiles, block, num_splits

MAX_HEADS = 64
"""Heads of a program: with 512 latent features their sums take half of an SM's registers. float32 has no matrix units and a quarter."""
MAX_LATENT, MAX_ROPE = 512, 128
CHUNK_ROWS = 64
"""Rows of a program that has several tokens: a warpgroup's."""
SCRATCH_BYTES = 1 << 28
"""What the splits of all sequences may take. One split of 128 heads over 512 latent features is a quarter of a megabyte a sequence."""


def heads_together(heads: int, itemsize: int) -> int:
    """Heads that share a program: as even as can be."""
    return -(-heads // -(-heads // (MAX_HEADS // 4 if itemsize > 2 else MAX_HEADS)))


def tiles(rows: int, latent: int, itemsize: int) -> Tiles:
    """For a program of so many rows: the heads of one token, or `CHUNK_ROWS`. Eight warps share the sums, [rows, latent] in float32."""
    if itemsize > 2:
        return Tiles(16, 16, 8, 1)
    return Tiles(rows, 64, 8, 3) if rows * block(latent) <= 64 * 256 else Tiles(rows, 32, 8, 2)


def latent_splits(max_keys: int, heads: int, latent: int, max_sequences: int) -> int:
    """Into how many splits a row's keys may be cut, if it sees `max_keys` at most."""
    return max(1, min(num_splits(max_keys), SCRATCH_BYTES // (4 * heads * latent * max_sequences)))
