"""Latent and sparse attention in Triton's interpreter: the conformance kit, and what its short sequences leave out. Run by
test_triton_interpreter.py, not collected."""

import os

import pytest
import torch

from ad_core.testing import MixerConformance
from ad_core.testing.poison import same_bits
from ad_core.testing.subject import Subject

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: run test_triton_interpreter.py", allow_module_level=True)

from ad_attention.kernels import triton_launch, triton_tiles
from ad_attention.latent import triton_launch as latent_launch
from ad_attention.latent.mixer import LatentAttention
from ad_attention.latent.testing import CASES, case
from ad_attention.sparse import triton_launch as sparse_launch
from ad_attention.sparse.mixer import Select, Selected
from ad_attention.sparse.testing import SELECT_CASES, SELECTED_CASES, select_case, selected_case


class TestLatent(MixerConformance):
    mixer = LatentAttention
    cases = CASES
    kernels = ("attention.mla.triton",)
    min_checks = 140


class TestSelect(MixerConformance):
    mixer = Select
    cases = SELECT_CASES
    kernels = ("attention.select.triton",)
    min_checks = 30


class TestSelected(MixerConformance):
    mixer = Selected
    cases = SELECTED_CASES
    kernels = ("attention.selected.triton",)
    min_checks = 45


LONG = {
    "mla": (LatentAttention(), case("mla", 4, 16, 8, 16, 24)),
    "mla window": (LatentAttention(), case("window", 4, 16, 8, 16, 24, window=34)),
    "mla sinks": (LatentAttention(), case("sinks", 3, 16, 8, 16, 24, sinks=True)),
    "mla selected": (LatentAttention(), case("selected", 4, 16, 8, 16, 24, count=36)),
    "mla exact": (LatentAttention(), case("exact", 4, 16, 8, 16, 16)),
    "mla exact selected": (LatentAttention(), case("exact", 4, 16, 8, 16, 16, count=36)),
    "mla many heads": (LatentAttention(), case("many", 18, 8, 8, 8, 16)),
    "selected": (Selected(), selected_case("gqa", 4, 2, 16, 16, 36)),
    "selected sinks": (Selected(), selected_case("sinks", 4, 2, 16, 16, 36, sinks=True)),
}


def subject(name):
    mixer, case = LONG[name]
    return Subject(mixer, case, mixer.kernels[1], interpret=True)


@pytest.fixture
def short_splits(monkeypatch):
    """Two tiles of keys are a split, so that nothing long has to be interpreted."""
    for module in (triton_tiles, triton_launch, latent_launch):
        monkeypatch.setattr(module, "MIN_SPLIT", 32)


@pytest.mark.parametrize("name", [name for name in LONG if "exact" not in name])
@pytest.mark.usefixtures("short_splits")
def test_single_tokens_are_split_and_merged(name):
    long = subject(name)
    harness = long.harness(length=48, sequences=2, page_size=16)
    assert harness.buffers["partial_lse"].shape[-1] > 1
    long.follow(harness, [[(0, 40), (1, 9)], [(0, 1), (1, 1)], [(1, 1), (0, 3)], [(0, 1)]], name)


@pytest.mark.parametrize("name", ["mla exact", "mla exact selected", "selected"])
@pytest.mark.usefixtures("short_splits")
def test_a_row_does_not_depend_on_its_mates(name, monkeypatch):
    """Neither on how many programs share its splits, nor on whether the step is all of single tokens.

    Latent attention is given identities as up-projections: PyTorch rounds a product of one row otherwise than one of several."""
    results = []
    for count, work in ((1, [(0, 1)]), (2, [(0, 1), (1, 1)]), (64, [(0, 1), (1, 3)])):
        for launches in (triton_launch, latent_launch):
            monkeypatch.setattr(launches, "multiprocessors", lambda device, count=count: count)
        harness = subject(name).harness(length=48, sequences=2, page_size=16)
        if "up_weight" in harness.data:
            harness.data["up_weight"] = torch.eye(16).repeat(8, 1)
        harness.step([(0, 40)])
        results.append(harness.step(work)[0][0])
    assert all(same_bits(each, results[0]) for each in results[1:])


def test_a_step_that_is_scored_in_parts_chooses_the_same(monkeypatch):
    mixer, few = Select(), select_case("few", 12, 16, 4)
    long = Subject(mixer, few, mixer.kernels[1], interpret=True)
    monkeypatch.setattr(sparse_launch, "MAX_SCORES", 5 * 32)
    long.follow(long.harness(sequences=2, page_size=16), [[(0, 20), (1, 9)], [(0, 1), (1, 1)], [(0, 2), (1, 5)]], "in parts")


def test_equal_scores_are_settled_by_position():
    """As in the torch kernel, whatever is beside them: with weights of zero every score is zero."""
    mixer, few = Select(), select_case("few", 12, 16, 4)
    harness = Subject(mixer, few, mixer.kernels[1], interpret=True).harness(sequences=2)
    harness.data["weight"].zero_()
    chosen = harness.step([(0, 6), (1, 3)])[0][0]
    assert chosen.tolist() == [[-1, -1, -1, 0], [-1, -1, 0, 1], [-1, 0, 1, 2], *[[0, 1, 2, 3]] * 3]


def test_the_cached_rows_are_latent_and_rope_side_by_side():
    mixer, plain = LONG["mla"]
    harness = Subject(mixer, plain, mixer.kernels[1], interpret=True).harness(sequences=1, dtype=torch.bfloat16)
    bound = harness.bind([(0, 5)])
    harness.run(bound)
    rows = harness.pools["latent_pages"].flatten(0, 1)[bound.arguments["token_slots"].long()]
    assert torch.equal(rows, torch.cat([harness.data["latent"][0, :5], harness.data["k_rope"][0, :5]], -1))
