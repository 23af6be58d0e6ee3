"""Attention written out: located at its softmax, whatever the scores go through, and proven by numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

MIN = torch.finfo(torch.float32).min


def lower(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def rep(x, times=2):
    return x.repeat_interleave(times, dim=1)


def plain(self, q, k, v, ids, position_ids):
    scores = q @ rep(k).transpose(-1, -2) / 8**0.5
    return scores.masked_fill(~lower(q.shape[2]), float("-inf")).softmax(-1) @ rep(v)


def additive(self, q, k, v, ids, position_ids):
    scores = torch.matmul(q, rep(k).mT) * 0.25
    mask = torch.full(scores.shape[-2:], MIN).triu(1)
    return F.dropout(F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype), 0.1, training=self.training) @ rep(v)


def in_place(self, q, k, v, ids, position_ids):
    scores = q @ rep(k).mT
    scores *= 0.5
    scores += torch.zeros(q.shape[2], q.shape[2]).masked_fill(~lower(q.shape[2]), MIN)
    return scores.softmax(-1) @ rep(v)


def einsum(self, q, k, v, ids, position_ids):
    q, k, v = q.transpose(1, 2), rep(k).transpose(1, 2), rep(v).transpose(1, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(~lower(q.shape[1]), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def batched(self, q, k, v, ids, position_ids):
    b, h, s, d = q.shape
    q, k, v = (x.reshape(b * h, s, d) for x in (q, rep(k), rep(v)))
    scores = torch.baddbmm(torch.zeros(b * h, s, s), q, k.transpose(1, 2), alpha=0.125)
    scores = scores.view(b, h, s, s) + torch.where(lower(s), 0.0, MIN)
    return torch.bmm(scores.softmax(-1).view(b * h, s, s), v).view(b, h, s, d)


def grouped(self, q, k, v, ids, position_ids):
    b, h, s, d = q.shape
    q = q.reshape(b, 2, 2, s, d)
    scores = q @ k[:, :, None].mT
    scores = scores.masked_fill(~lower(s), MIN)
    return (scores.softmax(-1) @ v[:, :, None]).reshape(b, h, s, d)


def key_first_transposed(self, q, k, v, ids, position_ids):
    key = self.k(self.embed(ids)).view(*ids.shape, 2, 8).permute(0, 2, 3, 1)  # [B, G, D, S]
    scores = q @ rep(key) * lower(q.shape[2]) - 1e4 * (1 - lower(q.shape[2]).float())
    return scores.softmax(-1) @ rep(v)


def clamped(self, q, k, v, ids, position_ids):
    scores = q @ rep(k).mT + torch.where(lower(q.shape[2]), 0.0, MIN)
    return torch.max(scores, torch.tensor(MIN)).softmax(-1) @ rep(v)


def soft_capped(self, q, k, v, ids, position_ids):
    scores = torch.tanh(q @ rep(k).mT * 0.5 / 3.0) * 3.0
    return scores.masked_fill(~lower(q.shape[2]), MIN).softmax(-1) @ rep(v)


def with_sinks(self, q, k, v, ids, position_ids):
    scores = (q @ rep(k).mT).masked_fill(~lower(q.shape[2]), MIN)
    column = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    scores = torch.cat([scores, column], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ rep(v)


def biased_twice(self, q, k, v, ids, position_ids):
    # slope * j, as it is written where softmax's invariance is used, scaled with the scores
    length = q.shape[2]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    scores = (q @ rep(k).mT + slopes[:, None, None] * torch.arange(length)) * 0.5
    return (scores + torch.where(lower(length), 0.0, MIN)).softmax(-1) @ rep(v)


def windowed(self, q, k, v, ids, position_ids):
    length = q.shape[2]
    scores = torch.where(self.mask[:length, :length], q @ rep(k).mT, MIN)
    return scores.softmax(-1) @ rep(v)


def check(driver, attend, key_heads=2, buffers=None, heads=(4, 2), **constants):
    toy = driver.Toy(attend, heads, buffers)
    wanted = driver.logits(toy)
    matched = driver.match(driver.export(toy))
    assert matched.declined == []
    (call,) = matched.calls
    for name in ("window", "chunk", "softcap"):
        assert call.kwargs.get(name) == constants.get(name), name
    if "scale" in constants:
        assert call.kwargs["scale"] == pytest.approx(constants["scale"], rel=1e-12)
    assert list(call.args[1].meta["val"].shape[2:]) == [key_heads, 8]
    assert driver.square_nodes(matched.graph) == []
    assert driver.worst_difference(matched.graph, wanted) < 2e-5
    return matched


@pytest.mark.parametrize(
    ("attend", "scale"),
    [
        (plain, 8**-0.5),
        (additive, 0.25),
        (in_place, 0.5),
        (einsum, 1.0),
        (batched, 0.125),
        (grouped, 1.0),
        (key_first_transposed, 1.0),
        (clamped, 1.0),
    ],
)
def test_spellings_of_causal_attention(driver, attend, scale):
    check(driver, attend, scale=scale)


def test_one_head_without_a_head_dimension(driver):
    def attend(self, q, k, v, ids, position_ids):
        q, k, v = (x.squeeze(1) for x in (q, k, v))
        return (q @ k.mT).masked_fill(~lower(q.shape[1]), float("-inf")).softmax(-1).matmul(v)[:, None]

    check(driver, attend, heads=(1, 1), key_heads=1)


def test_keys_shared_by_all_heads_through_broadcasting(driver):
    def attend(self, q, k, v, ids, position_ids):
        return (q @ k.mT).masked_fill(~lower(q.shape[2]), float("-inf")).softmax(-1) @ v

    check(driver, attend, heads=(4, 1), key_heads=1)


def test_soft_cap(driver):
    check(driver, soft_capped, scale=0.5, softcap=3.0)


def test_sinks(driver):
    matched = check(driver, with_sinks)
    assert matched.calls[0].kwargs["sinks"].target == "model.sinks"


def test_slopes_are_scaled_with_the_scores(driver):
    matched = check(driver, biased_twice, scale=0.5)
    slopes = matched.calls[0].kwargs["alibi_slopes"]
    assert torch.equal(getattr(matched.graph, slopes.target), torch.tensor([0.25, 0.125, 0.0625, 0.03125]))


def test_a_window_in_a_buffer(driver):
    i, j = torch.arange(128)[:, None], torch.arange(128)[None]
    check(driver, windowed, buffers={"mask": (j <= i) & (j > i - 100)}, window=100)


def test_keys_cast_up_for_the_scores_are_kept_as_they_were(driver):
    def attend(self, q, k, v, ids, position_ids):
        q, k, v = (x.to(torch.bfloat16) for x in (q, rep(k), rep(v)))
        scores = (q.float() @ k.float().mT).masked_fill(~lower(q.shape[2]), float("-inf"))
        return (scores.softmax(-1).to(v.dtype) @ v).float()

    toy = driver.Toy(attend)
    matched = driver.match(driver.export(toy))
    assert matched.declined == []
    (call,) = matched.calls
    assert {argument.meta["val"].dtype for argument in call.args} == {torch.bfloat16}
    assert driver.worst_difference(matched.graph, driver.logits(toy)) < 0.1


DEFAULT = {"bloom": 4, "falcon": 4, "gpt_neo": 4, "openai-gpt": 4, "gpt_oss": 4}
SLOW = {
    "big_bird": 4,
    "codegen": 3,
    "diffllama": 8,
    "falcon-alibi": 3,
    "gemma2": 4,
    "gemma3n_text": 4,
    "git": 4,
    "gpt_neox_japanese": 3,
    "gptj": 4,
    "llama": 4,
    "llama4_text": 4,
    "megatron-bert": 4,
    "mpt": 4,
    "mvp": 4,
    "rembert": 3,
    "roformer": 3,
    "trocr": 3,
    "xglm": 3,
    "xlm": 4,
}


@pytest.mark.parametrize(("name", "calls"), [*DEFAULT.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.items())])
def test_models_exported_with_eager_attention(driver, name, calls):
    model = driver.build(name, "eager")
    wanted = driver.logits(model)
    matched = driver.match(driver.export(model))
    assert (len(matched.calls), matched.declined) == (calls, [])
    assert driver.square_nodes(matched.graph) == []
    assert driver.worst_difference(matched.graph, wanted) < 2e-5
    if name == "gpt_neo":
        assert matched.constants("window") == [None, 8, None, 8]
    if name in ("bloom", "mpt", "falcon-alibi"):
        assert None not in matched.constants("alibi_slopes")
