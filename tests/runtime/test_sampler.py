"""The sampler: each parameter against its definition, and each row alone."""

from __future__ import annotations

import random

import pytest
import torch

from ad_core.runtime.params import SamplingParams
from ad_core.runtime.sampler import Sampler

V = 50
CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(3)


def make(*lanes: SamplingParams, tokens: list[int] | None = None, prompt_len: int = 2, stop_ids: tuple[int, ...] = ()) -> Sampler:
    """A sampler whose lane i has the i-th parameters."""
    sampler = Sampler(len(lanes), V, CPU)
    for lane, params in enumerate(lanes, 1):
        sampler.add(lane, params, seed=params.seed or 0, sample=0, tokens=tokens or [1, 2], prompt_len=prompt_len, stop_ids=stop_ids)
    return sampler


def test_greedy_takes_the_highest_logit_and_leaves_the_logits_alone():
    logits = torch.randn(3, V, generator=GENERATOR)
    before = logits.clone()
    params = SamplingParams(temperature=0.0)
    sampled = make(params, SamplingParams(temperature=0.0, logprobs=1), SamplingParams(seed=1)).sample(logits, [1, 2, 3], [2, 2, 2])
    assert sampled.ids_on_host()[:2] == logits.argmax(1).tolist()[:2]
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 5},
        {"top_p": 0.6},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_samples_follow_the_filtered_distribution(options):
    draws, logits = 20_000, torch.randn(V, generator=GENERATOR).double() * 1.5
    params = SamplingParams(seed=17, **options)
    sampler = make(params)
    # One lane at many positions is the same as many steps.
    counts = torch.zeros(V)
    for start in range(0, draws, 1000):
        ids = sampler.sample(logits.float().expand(1000, V), [1] * 1000, range(start, start + 1000)).ids
        counts += torch.bincount(ids, minlength=V)
    probabilities = (logits / params.temperature).softmax(0)
    order = probabilities.argsort(descending=True)
    if params.top_k:
        probabilities[order[params.top_k :]] = 0
        probabilities /= probabilities.sum()
    if params.top_p < 1:
        before = probabilities[order].cumsum(0) - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    expected = probabilities / probabilities.sum() * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    rare = expected < 5  # chi-square wants cells that are not tiny: put those together
    cells = [(counts[cell].item(), expected[cell].item()) for cell in (possible & ~rare).nonzero()[:, 0]]
    cells.append((counts[rare].sum().item(), expected[rare].sum().item()))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells if wanted > 0)
    freedom = len(cells) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_a_row_is_drawn_alike_whoever_is_in_the_batch_and_wherever_it_stands():
    options = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"top_k": 4},
        {"top_p": 0.7, "temperature": 2.0},
        {"min_p": 0.05},
        {"temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
        {"temperature": 0.0, "logprobs": 3},
        {"top_k": 300, "top_p": 0.99, "temperature": 4.0, "min_tokens": 9},
    ]
    params = [SamplingParams(seed=seed, **option) for seed, option in enumerate(options)]
    logits = torch.randn(len(params), V, generator=GENERATOR) * 2
    lengths = [2, 9, 2, 5, 7, 3, 4, 6]
    alone = [
        make(p, stop_ids=(4,)).sample(logits[row : row + 1], [1], lengths[row : row + 1]).ids_on_host()[0] for row, p in enumerate(params)
    ]
    shuffled = random.Random(0)
    for _ in range(10):
        rows = shuffled.sample(range(len(params)), shuffled.randint(1, len(params)))
        sampler = make(*params, stop_ids=(4,))
        ids = sampler.sample(logits[rows], [row + 1 for row in rows], [lengths[row] for row in rows]).ids_on_host()
        assert ids == [alone[row] for row in rows]


def test_seed_sample_and_position_each_change_the_draw_and_repeat_it():
    logits = torch.zeros(1, V)

    def run(seed: int, sample: int, position: int) -> list[int]:
        sampler = Sampler(1, V, CPU)
        sampler.add(1, SamplingParams(seed=seed), seed=seed, sample=sample, tokens=[1], prompt_len=1, stop_ids=())
        return [sampler.sample(logits, [1], [position + step]).ids_on_host()[0] for step in range(12)]

    base = run(1, 0, 5)
    assert run(1, 0, 5) == base
    assert run(2, 0, 5) != base
    assert run(1, 1, 5) != base
    assert run(1, 0, 6) == [*base[1:], run(1, 0, 17)[0]]


def naive_penalties(logits: list[float], prompt: list[int], answer: list[int], params: SamplingParams) -> list[float]:
    out = list(logits)
    for index in range(len(out)):
        if index in prompt or index in answer:
            out[index] = out[index] / params.repetition_penalty if out[index] > 0 else out[index] * params.repetition_penalty
        out[index] -= params.frequency_penalty * answer.count(index) + params.presence_penalty * (index in answer)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.9},
        {"frequency_penalty": -0.5, "presence_penalty": -0.3, "repetition_penalty": 1.2},
    ],
)
def test_penalties_count_what_was_sampled_and_a_lane_taken_up_again_counts_the_same(options):
    params = SamplingParams(temperature=0.0, **options)
    prompt, answer = [3, 3, 8, 11], []
    sampler = make(params, SamplingParams(temperature=0.0), tokens=prompt, prompt_len=4)
    for step in range(30):
        logits = torch.randn(2, V, generator=GENERATOR)
        expected = naive_penalties(logits[0].tolist(), prompt, answer, params)
        ids = sampler.sample(logits, [1, 2], [4 + step] * 2).ids_on_host()
        assert ids == [max(range(V), key=expected.__getitem__), logits[1].argmax().item()]
        answer.append(ids[0])
        if step % 10 == 7:  # preempted, and back on the other lane
            sampler = make(SamplingParams(temperature=0.0), SamplingParams(temperature=0.0))
            sampler.add(1, params, seed=0, sample=0, tokens=[*prompt, *answer], prompt_len=4, stop_ids=())


def test_a_lane_forgets_who_had_it_before():
    greedy = SamplingParams(temperature=0.0)
    first = SamplingParams(temperature=0.0, repetition_penalty=50.0, min_tokens=5)
    sampler = make(first, greedy, tokens=[7, 7, 7], stop_ids=(9,))
    logits = torch.zeros(1, V)
    logits[0, 3], logits[0, 5], logits[0, 7], logits[0, 9] = 4.0, 1.0, 5.0, 6.0
    assert sampler.sample(logits, [1], [3]).ids_on_host() == [3]  # 7 is penalised and 9 is banned
    sampler.add(1, greedy, seed=0, sample=0, tokens=[7], prompt_len=1, stop_ids=(9,))
    assert sampler.sample(logits, [1], [1]).ids_on_host() == [9]
    assert not sampler._special, "a plain lane does not take the slow way"
    logits[0, 9] = 0.0
    sampler.add(2, SamplingParams(seed=1), seed=1, sample=0, tokens=[1], prompt_len=1, stop_ids=())  # sends both the slow way
    assert sampler.sample(logits.expand(2, V), [1, 2], [1, 1]).ids_on_host()[0] == 7
    penalised = SamplingParams(temperature=0.0, repetition_penalty=50.0)
    sampler.add(1, penalised, seed=0, sample=0, tokens=[3], prompt_len=1, stop_ids=())
    assert sampler.sample(logits, [1], [1]).ids_on_host() == [7]  # of the first prompt, not of this one


def test_a_row_in_which_every_token_is_banned_fails():
    sampler = make(SamplingParams(temperature=0.0, min_tokens=1), SamplingParams(seed=1, min_tokens=1), stop_ids=tuple(range(V)))
    assert sampler.sample(torch.zeros(2, V), [1, 2], [2, 2]).ids_on_host() == [-1, -1]


def test_nothing_ends_the_answer_before_min_tokens():
    logits = torch.zeros(1, V)
    logits[0, [4, 9]] = 10.0
    for params in (SamplingParams(temperature=0.0, min_tokens=3), SamplingParams(seed=1, min_tokens=3, top_k=2)):
        sampler = make(params, stop_ids=(4, 9))
        for length in (2, 3, 4):
            assert sampler.sample(logits, [1], [length]).ids_on_host()[0] not in (4, 9)
        assert sampler.sample(logits, [1], [5]).ids_on_host()[0] in (4, 9)


def test_logprobs_are_of_the_model_itself_the_chosen_token_first():
    logits = torch.randn(3, V, generator=GENERATOR)
    params = [
        SamplingParams(seed=4, temperature=5.0, logprobs=3, repetition_penalty=2.0),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logprobs=0),
    ]
    sampled = make(*params).sample(logits, [1, 2, 3], [2, 2, 2])
    ids, exact = sampled.ids_on_host(), logits.double().log_softmax(1)
    first = sampled.logprobs_on_host(0)
    assert next(iter(first)) == ids[0]
    assert set(first) == {ids[0], *exact[0].topk(3).indices.tolist()}
    for index, value in first.items():
        assert value == pytest.approx(exact[0, index].item(), abs=1e-5)
    assert sampled.logprobs_on_host(1) is None
    assert list(sampled.logprobs_on_host(2)) == [ids[2]]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), "all"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_row_that_is_no_number_fails_alone(poison, fast):
    logits = torch.randn(3, V, generator=GENERATOR)
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0 if fast else 1.0, seed=1), SamplingParams(temperature=0.0)]
    clean = make(*params).sample(logits, [1, 2, 3], [2, 2, 2]).ids_on_host()
    if poison == "all":
        logits[1] = float("-inf")
    else:
        logits[1, 7] = poison
    sampled = make(*params).sample(logits, [1, 2, 3], [2, 2, 2])
    assert sampled.ids_on_host() == [clean[0], -1, clean[2]]
    assert ((sampled.ids >= 0) & (sampled.ids < V)).all()  # what is fed to the next step stays an id


@pytest.mark.parametrize("options", [{"temperature": 1e-7}, {"temperature": 100.0}, {"temperature": 1e-30, "top_p": 0.5}])
def test_extreme_temperatures_stay_finite(options):
    logits = torch.randn(1, V, generator=GENERATOR) * 1000
    sampled = make(SamplingParams(seed=1, **options)).sample(logits, [1], [2])
    assert not sampled.failed.any()
    if options["temperature"] < 1:
        assert sampled.ids_on_host() == logits.argmax(1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_as_they_are(dtype):
    logits = torch.randn(2, V, generator=GENERATOR).to(dtype)
    params = [SamplingParams(temperature=0.0), SamplingParams(seed=1, top_p=0.9, logprobs=2)]
    half = make(*params).sample(logits, [1, 2], [2, 2])
    full = make(*params).sample(logits.float(), [1, 2], [2, 2])
    assert half.ids_on_host() == full.ids_on_host()
    assert half.logprobs_on_host(1) == full.logprobs_on_host(1)
