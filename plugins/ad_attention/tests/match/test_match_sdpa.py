"""Attention as one ATen node: masks told apart by their values, key heads found before they were repeated."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

sdpa = F.scaled_dot_product_attention


def positions(length, device=None):
    return torch.arange(length)[:, None], torch.arange(length)[None]


def repeated(k, times):
    return k.repeat_interleave(times, dim=1)


def expanded(k, times):
    b, g, s, d = k.shape
    return k[:, :, None].expand(b, g, times, s, d).reshape(b, g * times, s, d)


def is_causal(self, q, k, v, ids, position_ids):
    return sdpa(q, repeated(k, 2), repeated(v, 2), is_causal=True)


def expanded_heads(self, q, k, v, ids, position_ids):
    return sdpa(q, expanded(k, 2), expanded(v, 2), is_causal=True)


def grouped_flag(self, q, k, v, ids, position_ids):
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def custom_scale(self, q, k, v, ids, position_ids):
    return sdpa(q * 1.5, repeated(k, 2), repeated(v, 2), is_causal=True, scale=0.3)


def tril_mask(self, q, k, v, ids, position_ids):
    length = q.shape[2]
    return sdpa(q, repeated(k, 2), repeated(v, 2), attn_mask=torch.ones(length, length, dtype=torch.bool).tril())


def triu_mask(self, q, k, v, ids, position_ids):
    length = q.shape[2]
    return sdpa(q, repeated(k, 2), repeated(v, 2), attn_mask=torch.full((length, length), float("-inf")).triu(1))


def mask_of_positions(self, q, k, v, ids, position_ids):
    mask = position_ids[:, None, :, None] >= position_ids[:, None, None, :]
    return sdpa(q, repeated(k, 2), repeated(v, 2), attn_mask=torch.where(mask, 0.0, torch.finfo(q.dtype).min))


def heads_in_another_order(self, q, k, v, ids, position_ids):
    # query head h reads key head h % G: no grouping that the op has, so the repeated heads must be kept
    k, v = (x.repeat(1, 2, 1, 1) for x in (k, v))
    return sdpa(q, k, v, is_causal=True)


def sliding(window):
    def attend(self, q, k, v, ids, position_ids):
        i, j = positions(q.shape[2])
        return sdpa(q, repeated(k, 2), repeated(v, 2), attn_mask=(j <= i) & (j > i - window))

    return attend


def chunked(size):
    def attend(self, q, k, v, ids, position_ids):
        i, j = positions(q.shape[2])
        return sdpa(q, repeated(k, 2), repeated(v, 2), attn_mask=(j <= i) & (j // size == i // size))

    return attend


def band(self, q, k, v, ids, position_ids):
    length = q.shape[2]
    return sdpa(q, repeated(k, 2), repeated(v, 2), attn_mask=torch.ones(length, length, dtype=torch.bool).tril().triu(-4999))


def alibi(self, q, k, v, ids, position_ids):
    i, j = positions(q.shape[2])
    slopes = 2.0 ** -torch.arange(1, 5)
    bias = slopes[:, None, None] * j
    return sdpa(q, repeated(k, 2), repeated(v, 2), attn_mask=bias.masked_fill(j > i, float("-inf"))[None])


def check(driver, attend, key_heads=2, heads=(4, 2), buffers=None, **constants):
    toy = driver.Toy(attend, heads, buffers)
    wanted = driver.logits(toy)
    matched = driver.match(driver.export(toy))
    assert matched.declined == []
    (call,) = matched.calls
    for name in ("window", "chunk", "softcap"):
        assert call.kwargs.get(name) == constants.get(name), name
    if "scale" in constants:
        assert call.kwargs["scale"] == constants["scale"]
    assert list(call.args[1].meta["val"].shape[2:]) == [key_heads, 8]
    assert driver.square_nodes(matched.graph) == []
    assert driver.worst_difference(matched.graph, wanted) < 2e-5
    return matched


@pytest.mark.parametrize("attend", [is_causal, expanded_heads, grouped_flag, tril_mask, triu_mask, mask_of_positions])
def test_causal_attention_is_found_with_its_key_heads_unrepeated(driver, attend):
    check(driver, attend, scale=8**-0.5)


def test_one_key_head_is_found(driver):
    def attend(self, q, k, v, ids, position_ids):
        return sdpa(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1), is_causal=True)

    check(driver, attend, heads=(4, 1), key_heads=1)


def test_heads_repeated_in_an_order_that_the_op_has_not_stay_repeated(driver):
    check(driver, heads_in_another_order, key_heads=4)


def test_the_scale_is_the_nodes_and_a_scaled_query_stays_scaled(driver):
    check(driver, custom_scale, scale=0.3)


@pytest.mark.parametrize("window", [1, 3, 8, 191, 193, 4096])
def test_windows_are_found_though_no_test_is_as_long(driver, window):
    check(driver, sliding(window), window=window)


def test_a_window_made_of_two_triangles_is_found(driver):
    check(driver, band, window=5000)


@pytest.mark.parametrize("size", [2, 8, 8192])
def test_chunks_are_found(driver, size):
    check(driver, chunked(size), chunk=size)


def test_a_mask_in_a_buffer_is_looked_at_to_its_end(driver):
    i, j = positions(300)

    def attend(self, q, k, v, ids, position_ids):
        length = q.shape[2]
        return sdpa(q, repeated(k, 2), repeated(v, 2), attn_mask=self.mask[:length, :length])

    check(driver, attend, buffers={"mask": (j <= i) & (j > i - 250)}, window=250)


def test_a_plain_causal_buffer_of_many_positions_is_cheap(driver):
    def attend(self, q, k, v, ids, position_ids):
        length = q.shape[2]
        mask = torch.zeros(length, length).masked_fill(self.mask[:length, :length] == 0, -10000)
        return sdpa(q, repeated(k, 2), repeated(v, 2), attn_mask=mask)

    check(driver, attend, buffers={"mask": torch.ones(4096, 4096, dtype=torch.uint8).tril()})


def test_a_window_compared_as_a_float_is_found(driver):
    def attend(self, q, k, v, ids, position_ids):
        i, j = positions(q.shape[2])
        return sdpa(q, repeated(k, 2), repeated(v, 2), attn_mask=(j <= i) & ((i - j).float() < 2000.0))

    check(driver, attend, window=2000)


def test_alibi_slopes_become_a_constant(driver):
    matched = check(driver, alibi)
    slopes = matched.calls[0].kwargs["alibi_slopes"]
    assert slopes.op == "get_attr"
    assert torch.equal(getattr(matched.graph, slopes.target), 2.0 ** -torch.arange(1, 5))
    assert slopes.target not in matched.graph.state_dict()  # no checkpoint has it


def test_layers_that_share_a_key_and_a_value_share_their_nodes(driver):
    def attend(self, q, k, v, ids, position_ids):
        k, v = torch.tanh(k), torch.tanh(v)  # no views of [B, S, G, D]: each needs a new node
        first = sdpa(q, k, v, is_causal=True, enable_gqa=True)
        return sdpa(first + q, k.contiguous(), v.contiguous(), is_causal=True, enable_gqa=True)

    toy = driver.Toy(attend)
    matched = driver.match(driver.export(toy))
    first, second = matched.calls
    assert first.args[1:3] == second.args[1:3]
    assert driver.worst_difference(matched.graph, driver.logits(toy)) < 2e-5


@pytest.mark.parametrize(
    ("name", "calls", "windows", "chunks"),
    [
        ("llama", 4, {None}, {None}),
        ("mistral", 4, {8}, {None}),
        ("falcon-alibi", 3, {None}, {None}),
        ("llama4_text", 4, {None}, {None, 8}),
    ],
)
def test_models_exported_with_sdpa(driver, name, calls, windows, chunks):
    model = driver.build(name, "sdpa")
    wanted = driver.logits(model)
    matched = driver.match(driver.export(model))
    assert (len(matched.calls), matched.declined) == (calls, [])
    assert (set(matched.constants("window")), set(matched.constants("chunk"))) == (windows, chunks)
    assert driver.square_nodes(matched.graph) == []
    assert driver.worst_difference(matched.graph, wanted) < 2e-5
