"""Pools: what a page of each resource holds, and how many bytes the page manager counts for it."""

import pytest
import torch

from ad_core.api import Limits, PagedTokens, SlotState
from ad_core.cache.layout import CacheLayout, PoolInput
from ad_core.cache.pools import Pools


def test_an_entry_of_several_tokens_takes_its_share_of_a_page():
    layout = CacheLayout(Limits(8, 2, 64, 16), windows=(None,))
    kept = {"each": PagedTokens((2, 3), torch.float32), "fourth": PagedTokens((5,), torch.int8, every=4)}
    kept |= {"odd": PagedTokens((7,), torch.int8, every=5), "long": PagedTokens((9,), torch.int8, every=40)}
    layout.inputs = [PoolInput(name, resource, 0) for name, resource in kept.items()]
    layout.inputs.append(PoolInput("state", SlotState((11,), torch.int8), -1))
    (group,) = layout.spec().groups
    assert group.page_bytes == 16 * 24 + 4 * 5 + 4 * 7 + 9
    pools = Pools(layout, (3,), 2, torch.device("cpu"))
    assert {name: tuple(pool.shape) for name, pool in pools.tensors.items()} == {
        "each": (3, 16, 2, 3),
        "fourth": (3, 4, 5),
        "odd": (3, 4, 7),
        "long": (3, 1, 9),
        "state": (2, 11),
    }
    assert pools.pool_bytes == 3 * group.page_bytes + 2 * 11


@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 16, 40])
def test_no_two_entries_share_a_place(page_size, every):
    entries = PagedTokens((1,), torch.int8, every=every).entries(page_size)
    ends = range(every - 1, 40 * every, every)
    places = [(end // page_size, end % page_size // every) for end in ends]
    assert len(set(places)) == len(places)
    assert all(place < entries for _, place in places)
