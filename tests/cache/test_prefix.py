"""The tree of blocks: exact keys, content that comes and goes, nothing left over."""

from __future__ import annotations

import pytest

from ad_core.api.errors import CacheAuditError
from ad_core.cache.prefix import Block, PrefixStore


def grow(store: PrefixStore, tokens: list[int], pages: list[int]) -> list[Block]:
    """Publishes full pages of `tokens` under `pages` of group 0."""
    chain, block = [], store.root
    for index, page in enumerate(pages):
        block = store.descend(block, tokens[index * store.page_size : (index + 1) * store.page_size])
        if not block.pages[0]:
            store.put_page(block, 0, page)
        chain.append(block)
    return chain


def test_a_prefix_is_found_as_far_as_it_agrees():
    store = PrefixStore(2, 1)
    chain = grow(store, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert store.walk([1, 2, 3, 4, 9, 9], 3) == chain[:2]
    assert store.walk([1, 2, 3, 4, 5, 6], 2) == chain[:2]
    assert store.walk([9, 2, 3, 4], 2) == []
    store.audit([])


def test_the_same_tokens_behind_another_prefix_are_another_block():
    store = PrefixStore(1, 1)
    grow(store, [1, 7], [10, 11])
    grow(store, [2, 7], [12, 13])
    assert [block.pages for block in store.walk([2, 7], 2)] == [[12], [13]]


def test_prefixes_with_equal_hashes_are_told_apart():
    twin = 2**61  # Python hashes integers modulo 2**61 - 1
    assert hash((0, (1,))) == hash((0, (twin,)))
    store = PrefixStore(1, 1)
    grow(store, [1, 5], [10, 11])
    assert store.walk([twin, 5], 2) == []
    grow(store, [twin, 5], [12, 13])
    assert [block.pages for block in store.walk([1, 5], 2)] == [[10], [11]]
    assert [block.pages for block in store.walk([twin, 5], 2)] == [[12], [13]]


def test_a_block_stays_while_a_descendant_has_content_and_the_whole_chain_goes_with_the_last():
    store = PrefixStore(1, 1)
    grow(store, [1, 2, 3], [10, 11, 12])
    store.forget_page(0, 10)
    store.forget_page(0, 11)
    assert [block.pages for block in store.walk([1, 2, 3], 3)] == [[0], [0], [12]]
    store.audit([])
    store.forget_page(0, 12)
    assert len(store) == 0
    store.audit([])


def test_a_pinned_block_stays_without_content():
    store = PrefixStore(1, 1)
    chain = grow(store, [1], [10])
    store.pin(chain[0])
    store.forget_page(0, 10)
    store.audit([chain[0]])
    store.descend(chain[0], [2])
    store.put_checkpoint(store.walk([1, 2], 2)[1], 3)
    store.unpin(chain[0])
    assert len(store) == 2
    store.forget_checkpoint(3)
    assert len(store) == 0


@pytest.mark.parametrize("corrupt", ["page", "checkpoint", "children", "pin", "idle"])
def test_the_audit_sees_each_kind_of_disorder(corrupt):
    store = PrefixStore(1, 1)
    chain = grow(store, [1, 2], [10, 11])
    store.put_checkpoint(chain[1], 4)
    store.audit([])
    if corrupt == "page":
        chain[0].pages[0] = 0
    elif corrupt == "checkpoint":
        chain[1].checkpoint = 5
    elif corrupt == "children":
        chain[1].children = 1
    elif corrupt == "pin":
        store.pin(chain[1])
    elif corrupt == "idle":
        store.descend(chain[1], [3])
    with pytest.raises(CacheAuditError):
        store.audit([])
