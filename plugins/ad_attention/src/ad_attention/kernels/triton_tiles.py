"""Tile sizes of the Triton kernels: a table instead of an autotuner, so that the numbers of a model never depend on a timing.

They come from what compiles for sm_90 without local memory (`aot_budget.json`), not from measurements: unmeasured on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_SPLIT = 128
"""Keys that are worth a program of their own when one query is spread over the device."""
MAX_SPLITS = 32
PACK_LIMIT = 16
"""Query heads of one key/value head that share a program: the rows of the smallest matrix instruction."""
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Tiles:
    """`block_m` rows (query tokens x packed heads) against `block_n` keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps, "num_stages": self.num_stages}


def block(size: int) -> int:
    """The padded size of a head: a power of two, at least 16, as matrix instructions want it."""
    return max(16, 1 << (size - 1).bit_length())


def decode_tiles(head_dim: int, value_dim: int, itemsize: int) -> Tiles:
    """For one query of every sequence. Memory-bound, so what counts is bytes in flight.

    A tile's address needs its pages first: two loads in a row, so that three stages keep one tile under way, five keep two.
    """
    width = max(block(head_dim), block(value_dim))
    if itemsize > 2:
        return Tiles(16, 32, 8, 2)
    # The masks of a padded head cost registers, of which eight warps have twice as many.
    padded = (block(head_dim), block(value_dim)) != (head_dim, value_dim)
    return Tiles(16, 64 if width <= 128 else 32, 8 if padded else 4, 3 if width <= 64 else 5)


def prefill_tiles(head_dim: int, value_dim: int, itemsize: int) -> Tiles:
    """For chunks. Eight warps issue a warpgroup instruction of 128 rows; float32 has none and must stay within registers."""
    width = max(block(head_dim), block(value_dim))
    if itemsize > 2:
        return Tiles(32, 32 if width <= 64 else 16, 8, 2 if width <= 128 else 1)
    return Tiles(128, 64, 8, 3) if width <= 128 else Tiles(128, 32, 8, 2)


def num_splits(max_keys: int) -> int:
    """Into how many splits a row's keys may be cut, if it sees `max_keys` at most."""
    return max(1, min(MAX_SPLITS, -(-max_keys // MIN_SPLIT)))
