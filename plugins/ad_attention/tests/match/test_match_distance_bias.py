"""What queries have of their own - a bias for every distance, a sink - is found behind any spelling, and nothing else passes for it."""

from __future__ import annotations

import pytest
import torch

E = 5


def rep(x):
    return x.repeat_interleave(2, 1)


def distances(length):
    return torch.arange(length)[:, None] - torch.arange(length)


def rows_of(self, q):
    """[B, H, S, E]"""
    return q @ self.bias[:, :8, :E]


def spread(rows, distance):
    index = distance.clamp(0, E - 1).expand(*rows.shape[:2], -1, -1)
    return rows.gather(-1, index).masked_fill((distance < 0) | (distance >= E), 0.0)


def attention(q, k, v, bias, scale=1.0, column=None):
    scores = (q @ rep(k).mT * scale + bias).masked_fill(distances(q.shape[2]) < 0, float("-inf"))
    if column is None:
        return scores.softmax(-1) @ rep(v)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ rep(v)


def plain(self, q, k, v, ids, position_ids):
    return attention(q, k, v, spread(rows_of(self, q), distances(q.shape[2])))


def scaled_by_position(self, q, k, v, ids, position_ids):
    bias = spread(rows_of(self, q), distances(q.shape[2]))
    factor = 1.0 + 0.5 * torch.log((position_ids[0] + 1).float()).view(1, 1, -1, 1)
    return attention(q, k, v, (bias.double() * factor).to(bias.dtype) / 2, scale=0.3)


def cut_by_a_product(self, q, k, v, ids, position_ids):
    distance = distances(q.shape[2])
    bias = rows_of(self, q).gather(3, distance.abs().clamp(max=E - 1).expand(*q.shape[:2], -1, -1))
    return attention(q, k, v, torch.where(distance < E, bias * (distance >= 0), 0.0))


def masked_with_its_bias(self, q, k, v, ids, position_ids):
    distance = distances(q.shape[2])
    mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill(distance < 0, torch.finfo(torch.float32).min)
    return (q @ rep(k).mT + (spread(rows_of(self, q), distance) + mask)).softmax(-1) @ rep(v)


def in_a_window(self, q, k, v, ids, position_ids):
    distance = distances(q.shape[2])
    scores = q @ rep(k).mT + spread(rows_of(self, q), distance)
    return scores.masked_fill((distance < 0) | (distance >= 7), float("-inf")).softmax(-1) @ rep(v)


def soft_capped(self, q, k, v, ids, position_ids):
    scores = torch.tanh(q @ rep(k).mT / 2.0) * 2.0 + spread(rows_of(self, q), distances(q.shape[2]))
    return scores.masked_fill(distances(q.shape[2]) < 0, float("-inf")).softmax(-1) @ rep(v)


def check(driver, attend, **constants):
    toy = driver.Toy(attend)
    wanted = driver.logits(toy)
    matched = driver.match(driver.export(toy))
    assert matched.declined == []
    (call,) = matched.calls
    assert {name: call.kwargs.get(name) for name in ("window", "softcap", "sinks")} == {
        "window": None,
        "softcap": None,
        "sinks": None,
    } | constants
    assert driver.square_nodes(matched.graph) == []
    assert driver.worst_difference(matched.graph, wanted) < 2e-5
    return call


@pytest.mark.parametrize(
    ("attend", "constants"),
    [
        (plain, {}),
        (scaled_by_position, {}),
        (cut_by_a_product, {}),
        (masked_with_its_bias, {}),
        (in_a_window, {"window": 7}),
        (soft_capped, {"softcap": 2.0}),
    ],
)
def test_spellings_of_a_bias_by_distance(driver, attend, constants):
    call = check(driver, attend, **constants)
    assert list(call.kwargs["distance_bias"].meta["val"].shape[2:]) == [4, E]


def test_rows_are_taken_where_they_were_made(driver):
    """Not the transpose of a transpose."""

    def attend(self, q, k, v, ids, position_ids):
        rows = q.transpose(1, 2) @ self.bias[0, :8, :E]
        return attention(q, k, v, spread(rows.transpose(1, 2), distances(q.shape[2])))

    assert check(driver, attend).kwargs["distance_bias"].target is torch.ops.aten.matmul.default


def test_a_mask_that_is_gathered_is_a_mask(driver):
    def attend(self, q, k, v, ids, position_ids):
        distance = distances(q.shape[2])
        window = (torch.arange(E) < 3).float().log().expand(1, 1, q.shape[2], -1)
        mask = window.gather(-1, distance.clamp(0, E - 1)[None, None])
        return attention(q, k, v, mask)

    assert check(driver, attend, window=3).kwargs.get("distance_bias") is None


def test_sinks_of_every_query(driver):
    def attend(self, q, k, v, ids, position_ids):
        return attention(q, k, v, 0.0, column=q.sum(-1, keepdim=True))

    assert list(check(driver, attend).kwargs["query_sinks"].meta["val"].shape[2:]) == [4]


def test_sinks_and_a_bias_together(driver):
    def attend(self, q, k, v, ids, position_ids):
        return attention(q, k, v, spread(rows_of(self, q), distances(q.shape[2])), column=q.sum(-1, keepdim=True))

    call = check(driver, attend)
    assert {"distance_bias", "query_sinks"} <= {name for name, value in call.kwargs.items() if value is not None}


# -- what is something else ---------------------------------------------------------------------------------------------


def changed(index=lambda d: d.clamp(0, E - 1), hidden=lambda d: (d < 0) | (d >= E), after=lambda bias, d: bias, heads=4):
    def attend(self, q, k, v, ids, position_ids):
        distance = distances(q.shape[2])
        rows = rows_of(self, q)[:, :heads]
        bias = rows.gather(-1, index(distance).expand(*rows.shape[:2], -1, -1)).masked_fill(hidden(distance), 0.0)
        return attention(q, k, v, after(bias, distance))

    return attend


def scaled_with_the_scores(self, q, k, v, ids, position_ids):
    scores = (q @ rep(k).mT + spread(rows_of(self, q), distances(q.shape[2]))) * 0.5
    return scores.masked_fill(distances(q.shape[2]) < 0, float("-inf")).softmax(-1) @ rep(v)


def twice(self, q, k, v, ids, position_ids):
    bias = spread(rows_of(self, q), distances(q.shape[2]))
    return attention(q, k, v, bias + spread(rows_of(self, 2 * q), distances(q.shape[2])))


def late(distance, first):
    return torch.arange(distance.shape[0])[:, None] > first


DECLINED = {
    "another distance": (changed(index=lambda d: (d + 1).clamp(0, E - 1)), "not gathered by the distance"),
    "another distance from a query on": (changed(index=lambda d: (d + late(d, 11)).clamp(0, E - 1)), "not gathered by the distance"),
    "another distance from a later one on": (changed(index=lambda d: (d + late(d, 900)).clamp(0, E - 1)), "computed with 900"),
    "cut otherwise from a later query on": (changed(hidden=lambda d: (d < 0) | (d >= E) | late(d, 900)), "computed with 900"),
    "by key and not by distance": (
        changed(index=lambda d: (torch.arange(d.shape[0]) + 0 * d).clamp(0, E - 1)),
        "not gathered by the distance",
    ),
    "the last value goes on": (changed(hidden=lambda d: d < 0), "goes on for keys that are 5 and more away"),
    "it ends too early": (changed(hidden=lambda d: (d < 0) | (d >= E - 1)), "changed at keys that are nearer than 5"),
    "a factor by key": (changed(after=lambda bias, d: bias * (torch.arange(d.shape[0]) + 1)), "goes through mul"),
    "a nonlinear op": (changed(after=lambda bias, d: torch.sigmoid(bias)), "goes through sigmoid"),
    "scaled with the scores": (scaled_with_the_scores, "go through more than"),
    "two of them": (twice, "more than one bias that is gathered"),
    "one for all heads": (changed(heads=1), "not one for each query of 4 heads"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_other_biases_are_declined_with_the_reason(driver, name):
    attend, why = DECLINED[name]
    toy = driver.Toy(attend)
    matched = driver.match(driver.export(toy))
    assert matched.calls == []
    assert why in matched.declined[0], matched.declined
