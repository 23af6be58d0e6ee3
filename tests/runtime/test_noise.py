"""Noise: pure, uniform, and unrelated between neighbours of every kind."""

from __future__ import annotations

import math

import pytest
import torch

from ad_core.runtime.noise import gumbel, mix64, position_keys, scatter, stream_key, uniform

V = 4096
IDS = torch.arange(V)
CPU = torch.device("cpu")


def noise(seed: int, sample: int, position: int, ids: torch.Tensor = IDS) -> torch.Tensor:
    return uniform(position_keys([stream_key(seed, sample)], [position], CPU), ids)[0].double()


def chi_square(counts: torch.Tensor, expected: float) -> float:
    """The statistic in standard deviations from its mean, for many cells."""
    cells = counts.numel()
    return (((counts - expected) ** 2 / expected).sum().item() - (cells - 1)) / math.sqrt(2 * (cells - 1))


def test_the_number_of_a_token_depends_on_nothing_but_its_key_and_id():
    keys = position_keys([stream_key(1, 0), stream_key(2, 5)], [7, 9], CPU)
    together = uniform(keys, IDS)
    for row, (seed, sample, position) in enumerate([(1, 0, 7), (2, 5, 9)]):
        assert torch.equal(together[row].double(), noise(seed, sample, position))
    some = torch.tensor([[5, 900, 17], [3, 3, 4095]])
    assert torch.equal(uniform(keys, some), together.gather(1, some))


def test_numbers_lie_strictly_between_0_and_1_so_noise_is_finite():
    keys = position_keys([stream_key(seed, 0) for seed in range(64)], [3] * 64, CPU)
    numbers = uniform(keys, torch.arange(20000))
    assert 0 < numbers.min() < 1e-5
    assert 1 - 1e-5 < numbers.max() < 1
    assert gumbel(keys, torch.arange(20000)).isfinite().all()


def test_keys_are_64_bit_and_every_part_of_them_matters():
    seeds = [0, 1, -1, 2**63, 2**64 - 2, 12345]
    keys = {stream_key(seed, sample) for seed in seeds for sample in range(100)}
    assert len(keys) == 600
    assert stream_key(-1, 0) == stream_key(2**64 - 1, 0)
    assert mix64(0) != 0
    both = torch.unique(position_keys([stream_key(0, 0)] * 5000, range(5000), CPU), dim=0)
    assert len(both) == 5000


def test_no_two_ids_have_the_same_bits():
    keys = position_keys([stream_key(1, 0)], [4], CPU)
    assert scatter(keys, torch.arange(1 << 20)).unique().numel() == 1 << 20


def test_both_halves_of_a_key_change_the_bits_and_not_by_a_constant():
    keys = torch.tensor([[5, 1], [5, 2], [6, 1]], dtype=torch.int32)
    bits = scatter(keys, IDS)
    for row in (1, 2):
        difference = bits[0] ^ bits[row]
        assert difference.unique().numel() > 0.99 * V
        assert (difference == 0).sum() == 0
        assert abs(torch.corrcoef(torch.stack([bits[0], bits[row]]).double())[0, 1]) < 5 / math.sqrt(V)


@pytest.mark.parametrize("axis", ["tokens", "positions", "samples", "seeds"])
def test_numbers_are_uniform_and_neighbours_are_independent(axis):
    if axis == "tokens":
        grid = torch.stack([noise(11, 0, position) for position in range(64)])
    elif axis == "positions":
        grid = torch.stack([noise(11, 0, position, IDS[:64]) for position in range(V)], 1)
    elif axis == "samples":
        grid = torch.stack([noise(11, sample, 3, IDS[:64]) for sample in range(V)], 1)
    else:
        grid = torch.stack([noise(seed, 0, 3, IDS[:64]) for seed in range(V)], 1)
    # 64 rows of 4096 along the axis: each number, and each pair of neighbours, falls into equal cells equally often.
    counts = torch.histc(grid, 256, 0, 1)
    assert abs(chi_square(counts, grid.numel() / 256)) < 4
    pairs = (grid[:, :-1] * 16).long() * 16 + (grid[:, 1:] * 16).long()
    assert abs(chi_square(torch.bincount(pairs.flatten(), minlength=256).double(), pairs.numel() / 256)) < 4
    across = (grid[:-1] * 16).long() * 16 + (grid[1:] * 16).long()
    assert abs(chi_square(torch.bincount(across.flatten(), minlength=256).double(), across.numel() / 256)) < 4


def test_every_bit_of_a_number_is_fair_and_a_bit_of_the_id_flips_half_of_them():
    keys = position_keys([stream_key(seed, 0) for seed in range(256)], [0] * 256, CPU)
    bits = (uniform(keys, torch.arange(1024)).double() * 2**24).long()  # [256, 1024]
    total = bits.numel()
    for bit in range(24):
        ones = ((bits >> bit) & 1).sum().item()
        assert abs(ones - total / 2) < 5 * math.sqrt(total) / 2
    for flip in range(10):
        changed = bits ^ bits[:, torch.arange(1024) ^ (1 << flip)]
        for bit in range(4, 24):
            ones = ((changed >> bit) & 1).sum().item()
            assert abs(ones - total / 2) < 7 * math.sqrt(total) / 2  # pairs are counted twice


def test_the_largest_of_noisy_logits_is_a_sample_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0])
    draws = 40_000
    keys = position_keys([stream_key(5, 0)] * draws, range(draws), CPU)
    counts = torch.bincount((logits + gumbel(keys, torch.arange(5))).argmax(1), minlength=5).double()
    expected = logits.double().softmax(0) * draws
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 99.9 % of chi-square with 4 degrees of freedom
