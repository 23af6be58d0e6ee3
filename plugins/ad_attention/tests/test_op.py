"""The canonical op against an oracle that is written as the definition reads: one score at a time, in float64."""

import itertools
import math

import pytest
import torch

from ad_attention.op import ROW_BLOCK, attention
from ad_core.api.errors import ConfigError

S = 11


def t5_bucket(distance: int, buckets: int, furthest: int) -> int:
    exact = buckets // 2
    if distance < exact:
        return distance
    return min(buckets - 1, exact + int(math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact)))


def definition(
    q,
    k,
    v,
    *,
    scale,
    window=None,
    chunk=None,
    softcap=None,
    sinks=None,
    alibi_slopes=None,
    rel_bias=None,
    rel_bias_rule="",
    key_bias=None,
    distance_bias=None,
    query_sinks=None,
    rows=None,
):
    """[B, S, H, Dv] by loops over batch, query (all, or `rows`) and head."""
    heads_per_group = q.shape[2] // k.shape[2]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, i, h in itertools.product(range(q.shape[0]), rows or range(q.shape[1]), range(q.shape[2])):
        g, scores, seen = h // heads_per_group, [], []
        for j in range(i + 1):
            if (window is not None and i - j >= window) or (chunk is not None and i // chunk != j // chunk):
                continue
            score = float(q[b, i, h] @ k[b, j, g]) * scale
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            if alibi_slopes is not None:
                score += float(alibi_slopes[h]) * (j - i)
            if rel_bias is not None:
                buckets = rel_bias.shape[1]
                kind, _, furthest = rel_bias_rule.partition(":")
                score += float(rel_bias[h, t5_bucket(i - j, buckets, int(furthest)) if kind == "t5" else min(i - j, buckets - 1)])
            if key_bias is not None:
                score += float(key_bias[b, j, g])
            if distance_bias is not None and i - j < distance_bias.shape[3]:
                score += float(distance_bias[b, i, h, i - j])
            scores.append(score)
            seen.append(v[b, j, g])
        if sinks is not None:
            scores.append(float(sinks[h]))
        if query_sinks is not None:
            scores.append(float(query_sinks[b, i, h]))
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        out[b, i, h] = sum(weight * value for weight, value in zip(weights, seen, strict=False)) / sum(weights)
    return out


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(heads, groups, dim, value_dim, length=S):
    return normal(2, length, heads, dim), normal(2, length, groups, dim, seed=1), normal(2, length, groups, value_dim, seed=2)


MODIFIERS = {
    "plain": lambda heads, groups: {},
    "window": lambda heads, groups: {"window": 4},
    "window of one": lambda heads, groups: {"window": 1},
    "window longer than the sequence": lambda heads, groups: {"window": 100},
    "chunk": lambda heads, groups: {"chunk": 3},
    "window and chunk": lambda heads, groups: {"window": 3, "chunk": 5},
    "softcap": lambda heads, groups: {"softcap": 0.7},
    "sinks": lambda heads, groups: {"sinks": normal(heads, seed=3)},
    "alibi": lambda heads, groups: {"alibi_slopes": 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float64)},
    "t5": lambda heads, groups: {"rel_bias": normal(heads, 6, seed=4), "rel_bias_rule": "t5:9"},
    "clip": lambda heads, groups: {"rel_bias": normal(heads, 4, seed=4), "rel_bias_rule": "clip"},
    "key bias": lambda heads, groups: {"key_bias": normal(2, S, groups, seed=5)},
    "distance bias": lambda heads, groups: {"distance_bias": normal(2, S, heads, 4, seed=7)},
    "distance bias longer than the sequence": lambda heads, groups: {"distance_bias": normal(2, S, heads, S + 2, seed=7)},
    "distance bias in a window": lambda heads, groups: {"distance_bias": normal(2, S, heads, 4, seed=7), "window": 5},
    "query sinks": lambda heads, groups: {"query_sinks": normal(2, S, heads, seed=8)},
    "all": lambda heads, groups: {
        "window": 7,
        "chunk": 8,
        "softcap": 1.1,
        "sinks": normal(heads, seed=3),
        "alibi_slopes": normal(heads, seed=6).abs(),
        "rel_bias": normal(heads, 6, seed=4),
        "rel_bias_rule": "t5:9",
        "key_bias": normal(2, S, groups, seed=5),
        "distance_bias": normal(2, S, heads, 4, seed=7),
        "query_sinks": normal(2, S, heads, seed=8),
    },
}


@pytest.mark.parametrize("modifiers", MODIFIERS.values(), ids=MODIFIERS)
@pytest.mark.parametrize("heads", [(2, 2, 8, 8), (4, 2, 8, 8), (4, 1, 8, 8), (4, 2, 8, 5), (2, 2, 5, 8)], ids=str)
def test_every_modifier_is_what_the_definition_says(heads, modifiers):
    arguments = {"scale": 0.37, **modifiers(*heads[:2])}
    q, k, v = qkv(*heads)
    torch.testing.assert_close(attention(q, k, v, **arguments), definition(q, k, v, **arguments), rtol=1e-12, atol=1e-12)


def test_a_distance_bias_over_more_than_one_block_of_rows():
    length = ROW_BLOCK + 3
    q, k, v = qkv(1, 1, 2, 2, length)
    arguments = {"scale": 1.0, "distance_bias": normal(2, length, 1, ROW_BLOCK, seed=7), "query_sinks": normal(2, length, 1, seed=8)}
    rows = [0, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 2]
    got, want = attention(q, k, v, **arguments), definition(q, k, v, **arguments, rows=rows)
    torch.testing.assert_close(got[:, rows], want[:, rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["window", "alibi", "t5"])
def test_sequences_longer_than_one_block_of_rows(name):
    q, k, v = qkv(1, 1, 2, 2, ROW_BLOCK + 3)
    arguments = {"scale": 1.0, **MODIFIERS[name](1, 1)}
    rows = [0, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 2]
    got, want = attention(q, k, v, **arguments), definition(q, k, v, **arguments, rows=rows)
    torch.testing.assert_close(got[:, rows], want[:, rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "softcap", "sinks"])
def test_half_precision_rounds_its_inputs_and_its_result_and_nothing_else(dtype, name):
    q, k, v = (x.to(dtype) for x in qkv(4, 2, 16, 16))
    arguments = {"scale": 0.6, **MODIFIERS[name](4, 2)}
    want = definition(q.double(), k.double(), v.double(), **arguments)
    got = attention(q, k, v, **{key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()})
    assert got.dtype == dtype
    assert float((got.double() - want).abs().max()) < (2 if name != "sinks" else 4) * torch.finfo(dtype).eps * float(want.abs().max())


def test_queries_that_are_not_contiguous():
    q, k, v = qkv(4, 2, 8, 8)
    for axis, arguments in ((2, {}), (3, {}), (2, {"window": 4}), (3, {"window": 4})):
        strided = [x.transpose(1, axis).contiguous().transpose(1, axis) for x in (q, k, v)]
        got = attention(*strided, scale=0.3, **arguments)
        assert got.is_contiguous()
        torch.testing.assert_close(got, attention(q, k, v, scale=0.3, **arguments), rtol=1e-12, atol=1e-12)


def test_an_unknown_rule_for_the_relative_bias_is_named():
    q, k, v = qkv(2, 2, 8, 8)
    with pytest.raises(ConfigError, match="swin"):
        attention(q, k, v, scale=1.0, rel_bias=normal(2, 4), rel_bias_rule="swin")


def test_the_op_survives_export_with_dynamic_batch_and_length():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, scale=0.5, window=3)

    batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", min=1, max=64)
    program = torch.export.export(Module(), qkv(4, 2, 8, 8), dynamic_shapes=({0: batch, 1: length},) * 3)
    calls = [node for node in program.graph.nodes if node.target is torch.ops.ad_attention.attention.default]
    assert len(calls) == 1
    q, k, v = (x[:1, :1] for x in qkv(4, 2, 8, 8))
    torch.testing.assert_close(program.module()(q, k, v), attention(q, k, v, scale=0.5, window=3))
