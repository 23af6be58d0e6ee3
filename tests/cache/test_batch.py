"""Packed metadata against a plain loop over tokens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ad_core.api.types import Limits
from ad_core.cache.batch import SAMPLED, BatchBuilder, Row

PAGE = 3


@st.composite
def steps(draw):
    """Decodes first, then chunks; two page groups with pages in any order."""
    decodes = draw(st.integers(0, 3))
    chunks = draw(st.integers(0 if decodes else 1, 3))
    rows = []
    for index in range(decodes + chunks):
        length = 1 if index < decodes else draw(st.integers(2, 7))
        context = draw(st.integers(0, 9))
        blocks = -(-(context + length) // PAGE)
        pages = tuple(draw(st.lists(st.integers(1, 40), min_size=blocks, max_size=blocks)) for _ in range(2))
        rows.append(
            Row(list(range(100, 100 + length)), context, index + 1, pages, slot=index + 5, num_outputs=draw(st.integers(0, length)))
        )
    return rows, decodes


@settings(max_examples=60, deadline=None)
@given(steps())
def test_fields_equal_a_loop_over_tokens(step):
    rows, decodes = step
    builder = BatchBuilder(Limits(64, 8, 24, PAGE), 2, torch.device("cpu"))
    builder.build([Row([1] * 5, 3, 1, ([9] * 3, [9] * 3))])  # what an earlier step left behind must not show
    batch = builder.build(rows)
    want = {name: [] for name in ("positions", "slots0", "slots1", "outputs", "ids")}
    start = 0
    for index, row in enumerate(rows):
        length = len(row.token_ids)
        for offset, token in enumerate(row.token_ids):
            position = row.context_len + offset
            want["positions"].append(position)
            want["ids"].append(token)
            for group in range(2):
                want[f"slots{group}"].append(row.pages[group][position // PAGE] * PAGE + position % PAGE)
        want["outputs"] += range(start + length - row.num_outputs, start + length)
        start += length
        for group in range(2):
            table = batch.host_field("page_table", group)[index]
            assert table[: len(row.pages[group])].tolist() == list(row.pages[group])
        assert batch.host_field("seq_lens")[index] == row.context_len + length
        assert bool(batch.host_field("fresh")[index]) == (row.context_len == 0)
        assert batch.host_field("state_slots")[index] == row.slot
    assert batch.device_field("positions").tolist() == want["positions"]
    assert builder.input_ids(batch)[0].tolist() == want["ids"]
    assert batch.host_field("token_slots", 0).tolist() == want["slots0"]
    assert batch.host_field("token_slots", 1).tolist() == want["slots1"]
    assert batch.host_field("output_rows").tolist() == want["outputs"]
    assert batch.host_field("cu_seqlens").tolist()[-1] == batch.num_tokens == start
    assert batch.num_decodes == decodes


def test_ids_sampled_last_are_filled_in_by_lane():
    builder = BatchBuilder(Limits(8, 4, 24, PAGE), 1, torch.device("cpu"))
    builder.last_ids[2], builder.last_ids[3] = 77, 88
    batch = builder.build([Row([SAMPLED], 4, 3, ([1, 2],)), Row([SAMPLED], 2, 2, ([3],)), Row([5, 6], 0, 1, ([4],))])
    assert builder.input_ids(batch).tolist() == [[88, 77, 5, 6]]


def test_addresses_stay_and_contents_do_not_leak_between_steps():
    builder = BatchBuilder(Limits(8, 4, 24, PAGE), 1, torch.device("cpu"))
    first = builder.build([Row([1, 2, 3, 4], 0, 1, ([1, 2],))])
    address = first.device_field("positions").data_ptr()
    second = builder.build([Row([1], 0, 1, ([7],))])
    assert second.device_field("positions").data_ptr() == address
    assert second.host_field("token_slots").tolist() == [21]
