"""What is not causal softmax attention is declined, and the reason names the node and the cause."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F

sdpa = F.scaled_dot_product_attention


def lower(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def steps(length):
    return torch.arange(length)[:, None], torch.arange(length)[None]


def with_mask(mask_of):
    """SDPA, and the same written out, under a boolean or additive mask."""

    def attend(self, q, k, v, ids, position_ids):
        mask = mask_of(self, q.shape[2], ids)
        by_node = sdpa(q, k, v, attn_mask=mask, enable_gqa=True)
        scores = q @ k.repeat_interleave(2, 1).mT
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return by_node + scores.softmax(-1) @ v.repeat_interleave(2, 1)

    return attend


def bidirectional(self, length, ids):
    return torch.ones(length, length, dtype=torch.bool)


def prefix(self, length, ids):
    i, j = steps(length)
    return (j <= i) | (j < 4)


def anticausal_window(self, length, ids):
    i, j = steps(length)
    return (j - i).abs() < 4


def padding(self, length, ids):
    return lower(length) & (ids != 7)[:, None, None, :]


def growing_window(self, length, ids):
    i, j = steps(length)
    return (j <= i) & (j > i - 3 - i // 8)


def dilated(self, length, ids):
    i, j = steps(length)
    return (j <= i) & ((i - j) % 2 == 0)


def window_per_head(self, length, ids):
    i, j = steps(length)
    return (j <= i) & (j > i - torch.tensor([2, 3, 4, 5])[:, None, None])


def per_sequence(self, length, ids):
    i, j = steps(length)
    return (j <= i) & (j > i - 2 - torch.arange(ids.shape[0])[:, None, None, None])


def window_only_when_long(self, length, ids):
    i, j = steps(length)
    return (j <= i) & ((j > i - 4) | (i < 64))


def far_jump(self, length, ids):
    i, j = steps(length)
    return (j <= i) & ((j > i - 4) | (i < 5000))


def sees_not_itself(self, length, ids):
    i, j = steps(length)
    return (j < i) | (j == 0)


def learned_bias(self, length, ids):
    return self.bias[:, :length, :length].masked_fill(~lower(length), float("-inf"))


def quadratic_bias(self, length, ids):
    i, j = steps(length)
    return (-0.01 * (i - j) ** 2).masked_fill(j > i, float("-inf"))


MASKS = [
    (bidirectional, "not causal"),
    (prefix, "not causal"),
    (anticausal_window, "not causal"),
    (padding, "values of the input input_ids"),
    (growing_window, "neither a window nor a chunk"),
    (dilated, "hides keys|neither a window nor a chunk"),
    (window_per_head, "differs between heads"),
    (per_sequence, "differs between the sequences"),
    (window_only_when_long, "neither a window nor a chunk"),
    (far_jump, "neither a window nor a chunk"),
    (sees_not_itself, "its own key"),
    (learned_bias, "the weight model.bias"),
    (quadratic_bias, "not a slope times the distance"),
]


@pytest.mark.parametrize(("mask_of", "reason"), MASKS, ids=[mask.__name__ for mask, _ in MASKS])
def test_masks_that_the_op_does_not_have(driver, mask_of, reason):
    declines(driver, with_mask(mask_of), reason, count=2)


def declines(driver, attend, reason, count=1, buffers=None):
    graph = driver.export(driver.Toy(attend, buffers=buffers))
    before = [node.format_node() for node in graph.graph.nodes]
    matched = driver.match(graph)
    assert matched.calls == []
    assert len(matched.declined) == count
    for why in matched.declined:
        assert re.match(rf"(softmax|scaled_dot_product_attention) in model: .*({reason})", why), why
    assert before == [node.format_node() for node in graph.graph.nodes]


def test_sdpa_without_any_mask(driver):
    def attend(self, q, k, v, ids, position_ids):
        return sdpa(q, k, v, enable_gqa=True)

    declines(driver, attend, "neither a mask nor is_causal")


def test_a_softmax_without_any_mask(driver):
    def attend(self, q, k, v, ids, position_ids):
        return (q @ k.repeat_interleave(2, 1).mT).softmax(-1) @ v.repeat_interleave(2, 1)

    declines(driver, attend, "not causal")


def test_weights_that_are_read_twice(driver):
    def attend(self, q, k, v, ids, position_ids):
        weights = (q @ k.repeat_interleave(2, 1).mT).masked_fill(~lower(q.shape[2]), float("-inf")).softmax(-1)
        return weights @ v.repeat_interleave(2, 1) + weights.sum(-1, keepdim=True)

    declines(driver, attend, "read by .* and not by one value product")


def test_scores_that_are_read_twice(driver):
    def attend(self, q, k, v, ids, position_ids):
        scores = q @ k.repeat_interleave(2, 1).mT
        weights = scores.masked_fill(~lower(q.shape[2]), float("-inf")).softmax(-1)
        return weights @ v.repeat_interleave(2, 1) + scores.sum(-1, keepdim=True)

    declines(driver, attend, "matmul is also read by sum")


def test_weights_that_are_changed(driver):
    def attend(self, q, k, v, ids, position_ids):
        weights = (q @ k.repeat_interleave(2, 1).mT).masked_fill(~lower(q.shape[2]), float("-inf")).softmax(-1)
        return (weights * 0.5) @ v.repeat_interleave(2, 1)

    declines(driver, attend, "more than a scale")


def test_scores_of_two_products(driver):
    def attend(self, q, k, v, ids, position_ids):
        k = k.repeat_interleave(2, 1)
        scores = q[..., :4] @ k[..., :4].mT + q[..., 4:] @ k[..., 4:].mT
        return scores.masked_fill(~lower(q.shape[2]), float("-inf")).softmax(-1) @ v.repeat_interleave(2, 1)

    declines(driver, attend, "one query-key product must lead to it")


def test_scores_through_something_else(driver):
    def attend(self, q, k, v, ids, position_ids):
        scores = torch.relu(q @ k.repeat_interleave(2, 1).mT)
        return scores.masked_fill(~lower(q.shape[2]), float("-inf")).softmax(-1) @ v.repeat_interleave(2, 1)

    declines(driver, attend, "more than a scale")


def test_a_scale_that_grows_with_the_length(driver):
    def attend(self, q, k, v, ids, position_ids):
        scale = torch.log(torch.arange(1, q.shape[2] + 1) + 1.0)[:, None]
        scores = q @ k.repeat_interleave(2, 1).mT * scale
        return scores.masked_fill(~lower(q.shape[2]), float("-inf")).softmax(-1) @ v.repeat_interleave(2, 1)

    declines(driver, attend, "not one number|more than a scale")


def test_a_pool_over_the_whole_sequence(driver):
    def attend(self, q, k, v, ids, position_ids):
        weights = q.sum(-1).softmax(-1)
        return (weights[..., None, :] @ v.repeat_interleave(2, 1)).expand(q.shape)

    declines(driver, attend, "no query position")


def test_a_mask_that_is_written_through_a_view(driver):
    def attend(self, q, k, v, ids, position_ids):
        mask = torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)
        mask[0] = 0.0  # the first token sees all
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

    declines(driver, attend, "changed in place")


def test_a_mask_in_a_buffer_that_is_not_loaded(driver):
    def attend(self, q, k, v, ids, position_ids):
        return sdpa(q, k, v, attn_mask=self.mask[: q.shape[2], : q.shape[2]], enable_gqa=True)

    graph = driver.export(driver.Toy(attend, buffers={"mask": lower(128)}))
    graph.model.mask = graph.model.mask.to("meta")
    matched = driver.match(graph)
    assert matched.calls == []
    assert "the buffer model.mask, whose values are not loaded yet" in matched.declined[0]


def test_a_buffer_that_is_no_mask_we_know_is_looked_at_to_its_end(driver):
    def attend(self, q, k, v, ids, position_ids):
        return sdpa(q, k, v, attn_mask=self.mask[: q.shape[2], : q.shape[2]], enable_gqa=True)

    mask = lower(900)
    mask[899, 3] = False
    declines(driver, attend, "hides keys", buffers={"mask": mask})


def test_a_graph_of_one_length(driver):
    program = torch.export.export(
        driver.Toy(lambda self, q, k, v, ids, at: sdpa(q, k, v, lower(12), enable_gqa=True)), driver.prompt(2, 12)
    )
    matched = driver.match(program.module())
    assert matched.calls == []
    assert len(matched.declined) == 1
