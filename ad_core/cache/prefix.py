"""Full pages by the tokens that led to them, so that a prompt which begins like an earlier one need not be recomputed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ad_core.api.errors import CacheAuditError


class Block:
    """One page's worth of tokens behind a certain prefix, and where its content lies now.

    `pages` holds the page of every group, 0 where it is not cached (any more); `checkpoint` a slot with the state after
    the block's last token, or 0. `pins` counts the live sequences that stand on it.
    """

    __slots__ = ("checkpoint", "children", "pages", "parent", "pins", "serial", "tokens")

    def __init__(self, serial: int, parent: Block | None, tokens: tuple[int, ...], num_groups: int):
        self.serial, self.parent, self.tokens = serial, parent, tokens
        self.pages = [0] * num_groups
        self.checkpoint = 0
        self.children = 0
        self.pins = 0

    @property
    def is_idle(self) -> bool:
        return not (self.checkpoint or self.children or self.pins or any(self.pages))


class PrefixStore:
    """A tree of blocks, found by a hash that is chained through the parent.

    The key of a block is its parent's serial number, which is never used twice, and its tokens. Keys are compared and not
    only hashed, so two prefixes with equal hashes are never taken for each other. A block lives while a live sequence
    stands on it, or any content of it or of a descendant is there; so blocks are bounded by pages and slots times depth.

    The store owns no memory: whoever evicts a page or slot calls `forget_page` or `forget_checkpoint`.
    """

    def __init__(self, page_size: int, num_groups: int):
        self.page_size, self.num_groups = page_size, num_groups
        self.root = Block(0, None, (), num_groups)
        self._serial = 0
        self._blocks: dict[tuple[int, tuple[int, ...]], Block] = {}
        self._by_page: list[dict[int, Block]] = [{} for _ in range(num_groups)]
        self._by_checkpoint: dict[int, Block] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def walk(self, tokens: Sequence[int], limit: int) -> list[Block]:
        """The blocks that `tokens` begins with, at most `limit`. Their content may be gone in part."""
        chain: list[Block] = []
        block, size = self.root, self.page_size
        for index in range(limit):
            found = self._blocks.get((block.serial, tuple(tokens[index * size : (index + 1) * size])))
            if found is None:
                break
            chain.append(found)
            block = found
        return chain

    def descend(self, parent: Block, tokens: Sequence[int]) -> Block:
        """The block of a page's worth of `tokens` behind `parent`, made (without content) if it is new."""
        key = (parent.serial, tuple(tokens))
        block = self._blocks.get(key)
        if block is None:
            self._serial += 1
            block = self._blocks[key] = Block(self._serial, parent, key[1], self.num_groups)
            parent.children += 1
        return block

    def pin(self, block: Block) -> None:
        """A sequence stands on the block: what it computes next goes behind it, so the block stays."""
        block.pins += 1

    def unpin(self, block: Block) -> None:
        block.pins -= 1
        self._prune(block)

    def put_page(self, block: Block, group: int, page: int) -> None:
        block.pages[group] = page
        self._by_page[group][page] = block

    def put_checkpoint(self, block: Block, slot: int) -> None:
        block.checkpoint = slot
        self._by_checkpoint[slot] = block

    def forget_page(self, group: int, page: int) -> None:
        block = self._by_page[group].pop(page)
        block.pages[group] = 0
        self._prune(block)

    def forget_checkpoint(self, slot: int) -> None:
        block = self._by_checkpoint.pop(slot)
        block.checkpoint = 0
        self._prune(block)

    def pages(self, group: int) -> set[int]:
        """All pages of the group whose content can be found."""
        return set(self._by_page[group])

    def checkpoints(self) -> set[int]:
        return set(self._by_checkpoint)

    def audit(self, tips: Iterable[Block]) -> None:
        """Raises `CacheAuditError` if the indices disagree, or a block is left over that serves none of the live `tips`."""
        pins = Counter(tip.serial for tip in tips)
        children = Counter(block.parent.serial for block in self._blocks.values() if block.parent)
        for block in (self.root, *self._blocks.values()):
            if (block.children, block.pins) != (children[block.serial], pins[block.serial]):
                why = f"it has {children[block.serial]} children and {pins[block.serial]} pins"
                raise CacheAuditError(f"a block of the prefix store counts {block.children} children and {block.pins} pins", why=why)
            if block.is_idle and block is not self.root:
                raise CacheAuditError("a block without content was left in the prefix store")
        indexed = [{unit: id(block) for unit, block in index.items()} for index in (*self._by_page, self._by_checkpoint)]
        held: list[dict[int, int]] = [{} for _ in indexed]
        for block in self._blocks.values():
            for index, unit in enumerate((*block.pages, block.checkpoint)):
                if unit:
                    held[index][unit] = id(block)
        if indexed != held:
            raise CacheAuditError("the prefix store's index of pages or checkpoints is not what its blocks hold")

    def _prune(self, block: Block) -> None:
        """Removes the block, and then its ancestors, as far as they serve nobody."""
        node = block
        while node.parent is not None and node.is_idle:
            del self._blocks[node.parent.serial, node.tokens]
            node.parent.children -= 1
            node = node.parent
