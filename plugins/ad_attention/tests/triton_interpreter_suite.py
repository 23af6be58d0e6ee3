"""The Triton kernels in Triton's interpreter, against a dense float64 oracle. Run by test_triton_interpreter.py, not collected.

A file of its own because TRITON_INTERPRET must be set before the kernels are imported. Pools are full of NaN where nothing was
written, pages are in random order, and every tensor that is written has guard bands: the interpreter does not check bounds.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: run test_triton_interpreter.py", allow_module_level=True)

from ad_attention.kernels import triton_launch
from ad_attention.kernels.triton_paged import TritonPaged, attention_triton
from ad_attention.op import attention
from ad_core.api import Environment, Limits, OpCall

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FP32: 2e-6, FP16: 2e-3, BF16: 1.6e-2}
"""Of the largest output. float32: rounding of sums; the others: their own rounding of weights and result."""
OWN = ("key_bias", "distance_bias", "query_sinks")
"""Modifiers that every token has of its own."""
EXTENT = 12
GUARD = 64
SENTINEL = 7.0


@dataclass(frozen=True)
class Case:
    """`rows` are (tokens cached, tokens new) a sequence; `options` are arguments of the canonical call by name."""

    rows: tuple[tuple[int, int], ...]
    dtype: torch.dtype = FP32
    H: int = 2
    G: int = 1
    D: int = 16
    DV: int = 16
    page_size: int = 16
    padded_rows: int = 0
    padded_sequences: int = 0
    append: bool = True
    scale: float = 0.25
    options: dict[str, Any] = field(default_factory=dict)


class Step:
    """One step of the kernel on random data, with what float64 says to it."""

    def __init__(self, case: Case, seed: int = 0, page_seed: int = 0, max_model_len: int | None = None):
        self.case = case
        totals = [context + new for context, new in case.rows]
        pages = [-(-total // case.page_size) for total in totals]
        B, width, size = len(totals), max(pages) + 2, case.page_size
        draw = torch.Generator().manual_seed(seed)
        # Two pages more than needed: one of them must stay as it is.
        order = (torch.randperm(sum(pages) + 1, generator=torch.Generator().manual_seed(page_seed)) + 1).tolist()
        self.page_table = torch.zeros(B + case.padded_sequences, width, dtype=torch.int32)
        shapes = {"key_pages": (case.G, case.D), "value_pages": (case.G, case.DV)}
        if "key_bias" in case.options:
            shapes["key_bias_pages"] = (case.G,)
        self.pools = {name: guarded((sum(pages) + 2, case.page_size, *shape), case.dtype) for name, shape in shapes.items()}
        packed: dict[str, list[torch.Tensor]] = {name: [] for name in ("query", "key", "value", *OWN, "slots")}
        expected = []
        for b, (context, _) in enumerate(case.rows):
            for block in range(pages[b]):
                self.page_table[b, block] = order.pop()
            table = self.page_table[b].tolist()
            slots = torch.tensor([table[i // size] * size + i % size for i in range(totals[b])], dtype=torch.int64)
            tokens = {
                "query": torch.randn(totals[b], case.H, case.D, generator=draw).to(case.dtype),
                "key": torch.randn(totals[b], case.G, case.D, generator=draw).to(case.dtype),
                "value": torch.randn(totals[b], case.G, case.DV, generator=draw).to(case.dtype),
                "key_bias": torch.randn(totals[b], case.G, generator=draw).to(case.dtype),
                "distance_bias": torch.randn(totals[b], case.H, EXTENT, generator=draw).to(case.dtype),
                "query_sinks": torch.randn(totals[b], case.H, generator=draw).to(case.dtype),
            }
            cached = context if case.append else totals[b]
            for name, pool in self.pools.items():
                flat(pool)[slots[:cached]] = tokens[name.removesuffix("_pages")][:cached]
            expected.append(dense(tokens, case)[context:])
            for name, values in (tokens | {"slots": slots}).items():
                packed[name].append(values[context:])
        self.expected = torch.cat(expected)
        self.slots = torch.cat(packed.pop("slots"))
        poison = {name: values[0].new_full((case.padded_rows, *values[0].shape[1:]), math.nan) for name, values in packed.items()}
        self.tokens = {name: torch.cat([*values, poison[name]])[None] for name, values in packed.items()}
        for name in OWN:
            if name not in case.options:
                del self.tokens[name]
        new = torch.tensor([new for _, new in case.rows] + [0] * case.padded_sequences, dtype=torch.int32)
        self.fields = {
            "cu_seqlens": torch.nn.functional.pad(new.cumsum(0), (1, 0)).int(),
            "context_lens": torch.tensor([context for context, _ in case.rows] + [0] * case.padded_sequences, dtype=torch.int32),
            "page_table": self.page_table,
            "token_slots": torch.nn.functional.pad(self.slots, (0, case.padded_rows)).int(),
        }
        absent = dict.fromkeys(("window", "chunk", "softcap", "sinks", "alibi_slopes", "rel_bias")) | {"rel_bias_rule": ""}
        options = absent | {name: value for name, value in case.options.items() if name not in OWN}
        self.call = OpCall("node", "module", TritonPaged.target, {"scale": case.scale} | dict.fromkeys(OWN) | self.tokens | options)
        self.buffers = self._buffers(max_model_len or max(totals))

    def _buffers(self, max_model_len: int) -> dict[str, torch.Tensor]:
        kernel = TritonPaged()
        limits = Limits(self.tokens["query"].shape[1], len(self.page_table), max_model_len, self.case.page_size)
        specs = kernel.buffers(self.call, limits)
        buffers = {name: guarded(spec.shape, spec.dtype) for name, spec in specs.items()}
        kernel.prepare(None, self.call, buffers)  # type: ignore[arg-type]  # the only buffer filled does not depend on the batch
        return buffers

    def arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        optional = dict.fromkeys(("key_bias_pages", "partial_output", "partial_lse", "distance_buckets"))
        named = dict(self.call.arguments)
        positional = tuple(named.pop(name) for name in ("query", "key", "value"))
        return positional, optional | named | self.pools | self.fields | self.buffers | {"append": self.case.append}

    def run(self) -> torch.Tensor:
        """Runs the op, checks all that holds in every case, and returns the rows that are no padding."""
        before = {name: flat(pool).clone() for name, pool in self.pools.items()}
        arguments, named = self.arguments()
        output = attention_triton(*arguments, **named)
        count = len(self.slots)
        assert output.shape == (1, self.tokens["query"].shape[1], self.case.H, self.case.DV)
        assert output.is_contiguous()
        assert output.dtype == self.case.dtype
        assert torch.equal(output[0, count:], torch.zeros_like(output[0, count:])), "rows of padding are zero"
        for name, pool in self.pools.items():
            wanted = before[name]
            if self.case.append:
                wanted[self.slots] = self.tokens[name.removesuffix("_pages")][0, :count]
            assert same_bits(flat(pool), wanted), f"{name}: exactly the step's slots are written"
        for name, tensor in (self.pools | self.buffers).items():
            assert guards_intact(tensor), f"{name}: nothing is written outside"
        return output[0, :count]

    def error(self) -> float:
        difference = (self.run().double() - self.expected).abs().max()
        return float(difference / self.expected.abs().max()) if difference == difference else math.inf


def dense(tokens: dict[str, torch.Tensor], case: Case) -> torch.Tensor:
    """The definition of the canonical op, on one sequence, in float64: no cache, no blocks, one matrix of scores."""
    query, key, value, key_bias, distance_bias, query_sinks = (tokens[name].double() for name in ("query", "key", "value", *OWN))
    group = case.H // case.G
    options = case.options
    S = len(query)
    distance = torch.arange(S)[:, None] - torch.arange(S)[None, :]
    chunks = torch.arange(S) // (options.get("chunk") or S)
    rows = []
    for h in range(case.H):
        scores = query[:, h] @ key[:, h // group].T * case.scale
        if "softcap" in options:
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        if "alibi_slopes" in options:
            scores = scores - options["alibi_slopes"][h].double() * distance
        if "rel_bias" in options:
            table = options["rel_bias"][h].double()
            by_distance = torch.stack([table[bucket(n, len(table), options["rel_bias_rule"])] for n in range(S)])
            scores = scores + by_distance[distance.clamp(min=0)]
        if "key_bias" in options:
            scores = scores + key_bias[:, h // group]
        if "distance_bias" in options:
            for back in range(min(EXTENT, S)):
                scores.diagonal(-back).add_(distance_bias[back:, h, back])
        seen = (distance >= 0) & (distance < options.get("window", S + 1)) & (chunks[:, None] == chunks[None, :])
        scores = scores.masked_fill(~seen, -math.inf)
        if "sinks" in options:
            scores = torch.cat([scores, options["sinks"][h].double().expand(S, 1)], dim=1)
        if "query_sinks" in options:
            scores = torch.cat([scores, query_sinks[:, h, None]], dim=1)
        rows.append(scores.softmax(dim=1)[:, :S] @ value[:, h // group])
    return torch.stack(rows, dim=1)


def bucket(distance: int, buckets: int, rule: str) -> int:
    if rule == "clip":
        return min(distance, buckets - 1)
    exact, furthest = buckets // 2, int(rule.removeprefix("t5:"))
    if distance < exact:
        return distance
    return min(exact + int(math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact)), buckets - 1)


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """NaN everywhere (0 in integers), between two bands of a value of its own."""
    size = math.prod(shape)
    whole = torch.full((size + 2 * GUARD,), SENTINEL).to(dtype)
    whole[GUARD : GUARD + size] = math.nan if dtype.is_floating_point else 0
    return whole[GUARD : GUARD + size].view(shape)


def guards_intact(tensor: torch.Tensor) -> bool:
    whole = tensor.new_empty(0).set_(tensor.untyped_storage())
    return bool((whole[:GUARD] == SENTINEL).all() and (whole[-GUARD:] == SENTINEL).all())


def flat(pool: torch.Tensor) -> torch.Tensor:
    return pool.view(-1, *pool.shape[2:])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def close(case: Case, **arguments: Any) -> bool:
    error = Step(case, **arguments).error()
    assert error <= TOLERANCE[case.dtype], f"relative error {error:.2e}"
    return True


# -- the three ways through the kernels, in every dtype ------------------------------------------------------------------

MODIFIERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 10},
    "chunk": {"chunk": 24},
    "window and chunk": {"window": 10, "chunk": 24},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.25, 0.03])},
    "t5 bias": {"rel_bias": torch.linspace(-1, 1, 16).reshape(2, 8), "rel_bias_rule": "t5:20"},
    "clipped bias": {"rel_bias": torch.linspace(-1, 1, 10).reshape(2, 5), "rel_bias_rule": "clip"},
    "key bias": {"key_bias": True},
    "distance bias": {"distance_bias": True},
    "query sinks": {"query_sinks": True},
}
EVERYTHING: dict[str, Any] = {name: value for options in MODIFIERS.values() for name, value in options.items()}
EVERYTHING |= {"window": 40, "chunk": 128}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("length", [1, 7, 63, 100])
def test_a_prompt_and_then_a_token(dtype: torch.dtype, length: int) -> None:
    assert close(Case(((0, length),), dtype))
    assert close(Case(((length, 1),), dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_a_ragged_batch_with_padding(dtype: torch.dtype) -> None:
    assert close(Case(((40, 1), (3, 1), (0, 7), (50, 13), (0, 1)), dtype, padded_rows=3, padded_sequences=2))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_a_long_row_is_split_and_merged(dtype: torch.dtype) -> None:
    step = Step(Case(((299, 1), (5, 1)), dtype))
    assert step.buffers["partial_lse"].shape[-1] == 3
    assert step.error() <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_modifier_in_mixed_batches(name: str) -> None:
    assert close(Case(((70, 1), (45, 7)), options=MODIFIERS[name], padded_rows=1))


@pytest.mark.parametrize("name", ["softcap", "sinks", "alibi", "t5 bias", "clipped bias", "key bias", "distance bias", "query sinks"])
def test_a_modifier_in_split_rows(name: str) -> None:
    assert close(Case(((260, 1),), options=MODIFIERS[name], padded_sequences=1))


@pytest.mark.parametrize("options", [{"window": 150}, {"chunk": 200}], ids=str)
def test_splits_of_a_window_start_at_the_window(options: dict[str, int]) -> None:
    assert close(Case(((330, 1), (20, 1)), options=options))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_all_modifiers_at_once(dtype: torch.dtype) -> None:
    assert close(Case(((140, 1), (120, 20)), dtype, options=EVERYTHING, padded_rows=1))


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {"H": 3, "G": 3},
        {"H": 6, "G": 2, "D": 24, "DV": 40},  # nothing is a power of two, and values are wider than keys
        {"H": 40, "G": 2},  # groups larger than what a program packs
        {"H": 2, "G": 1, "D": 80, "DV": 32},
        {"H": 2, "G": 2, "D": 8, "DV": 8},  # smaller than a matrix instruction
    ],
    ids=str,
)
def test_head_shapes(shape: dict[str, int]) -> None:
    assert close(Case(((20, 1), (9, 8)), padded_rows=1, **shape))
    assert close(Case(((20, 1), (9, 1)), padded_rows=1, padded_sequences=1, **shape))


@pytest.mark.parametrize("page_size", [1, 3, 16, 128])
def test_page_sizes(page_size: int) -> None:
    assert close(Case(((33, 1), (30, 5)), page_size=page_size))


def test_the_scale_is_the_callers() -> None:
    assert close(Case(((33, 1), (30, 5)), scale=1.7))


def test_strided_inputs_are_read_in_place() -> None:
    step = Step(Case(((33, 1), (30, 5)), H=4, G=2))
    arguments = step.call.arguments
    for name in ("query", "key", "value"):  # [T, H, D] as a view of [H, T, D]: what a transpose after the projections gives
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)  # type: ignore[index]
    assert step.error() <= TOLERANCE[FP32]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_without_append_the_pools_are_only_read() -> None:
    assert close(Case(((33, 1), (30, 5)), append=False))


def test_chunks_equal_the_whole() -> None:
    whole = Step(Case(((0, 50),)))
    expected = whole.run()
    for cut in (1, 16, 49):
        step = Step(Case(((cut, 50 - cut),)))
        assert torch.allclose(step.run(), expected[cut:], atol=1e-6)


def test_the_order_of_pages_changes_nothing() -> None:
    case = Case(((40, 1), (150, 1), (50, 9)), page_size=4)
    one, other = Step(case), Step(case, page_seed=1)
    assert not torch.equal(one.page_table, other.page_table)
    assert same_bits(one.run(), other.run())


def test_freed_pages_before_a_window_are_not_read() -> None:
    case = Case(((150, 1), (60, 7)), options={"window": 10}, page_size=4)
    step = Step(case)
    for b, (context, _) in enumerate(case.rows):
        step.page_table[b, : (context - 9) // 4] = 0
    assert step.error() <= TOLERANCE[FP32]  # the null page is NaN


@pytest.mark.parametrize(("count", "splits"), [(1, 3), (2, 3)])
def test_a_row_does_not_depend_on_its_mates(count: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda device: count)
    step = Step(Case(((299, 1), (70, 1))))
    assert step.buffers["partial_lse"].shape[-1] == splits
    alone = Step(Case(((299, 1),)))
    assert same_bits(step.run()[:1], alone.run())


def test_a_padded_batch_with_fewer_rows_than_sequences_may_hold_a_chunk() -> None:
    """T <= B does not say that every sequence decodes: three tokens of one sequence, and three padded sequences."""
    assert close(Case(((20, 1), (140, 3)), padded_sequences=3))


def test_a_row_more_than_sequences_keeps_within_the_scratch() -> None:
    assert close(Case(((299, 1), (260, 2))))


def test_more_padding_than_tokens() -> None:
    assert close(Case(((20, 1), (9, 2)), padded_rows=150))


def test_nothing_but_padding() -> None:
    step = Step(Case(((5, 1),), padded_rows=1))
    step.fields["cu_seqlens"].zero_()
    arguments, named = step.arguments()
    before = {name: pool.clone() for name, pool in step.pools.items()}
    assert not attention_triton(*arguments, **named).any()
    assert all(same_bits(pool, before[name]) for name, pool in step.pools.items())


def test_an_empty_step() -> None:
    step = Step(Case(((5, 1),)))
    arguments, named = step.arguments()
    named["cu_seqlens"].zero_()
    assert attention_triton(*(argument[:, :0] for argument in arguments), **named).shape == (1, 0, 2, 16)


# -- the op and its descriptor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "all modifiers"])
def test_the_schema_and_the_fake_are_honest(options: dict[str, Any]) -> None:
    step = Step(Case(((140, 1), (0, 3)), DV=32, options=options))
    for pool in step.pools.values():  # the check compares copies, and NaN is not equal to itself
        pool.nan_to_num_()
    for buffer in step.buffers.values():
        buffer.nan_to_num_()
    arguments, named = step.arguments()
    torch.library.opcheck(attention_triton, arguments, named, test_utils=("test_schema", "test_faketensor"))


def test_the_cpu_is_supported_in_the_interpreter() -> None:
    assert TritonPaged().supports(Step(Case(((5, 1),))).call, Environment("cpu", interpret=True)) is None


@pytest.mark.parametrize("options", [*MODIFIERS.values(), EVERYTHING], ids=[*MODIFIERS, "everything"])
def test_the_oracle_is_the_canonical_op(options: dict[str, Any]) -> None:
    case = Case(((0, 90),), DV=24, options=options)
    step = Step(case)
    named = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in step.call.arguments.items()}
    query, key, value = (named.pop(name) for name in ("query", "key", "value"))
    assert torch.allclose(attention(query, key, value, **named)[0], step.expected, atol=1e-12)


def test_the_oracle_sees_a_wrong_window() -> None:
    """The comparison itself can fail."""
    case = Case(((45, 7),), options={"window": 10})
    wrong = Step(replace(case, options={"window": 11}))
    wrong.expected = Step(case).expected
    assert wrong.error() > 1e-2
