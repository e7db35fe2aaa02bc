"""The paged KV cache as the scheduler sees it: block ids, their owners, and what they hold.

Source: the block pool of vLLM 0.32 with one full-attention KV group. A block holds `block_size`
tokens. Block 0 is the null block and is never handed out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import count

BlockHashes = Callable[[int], Hashable]
"""Names a request's content: index of a full block -> hash of that block and of all before it.

Two requests whose first `(i + 1) * block_size` tokens are equal must return the same value for `i`, and
otherwise different ones. Generated tokens count: the function is also asked about blocks behind the prompt.
"""

_unique_contents = count(1)


def unique_hashes() -> BlockHashes:
    """Content that no other request shares. A preempted request still finds its own blocks."""
    start = next(_unique_contents) << 64  # larger than any hash(), so it equals no token_hashes either
    return lambda index: start + index


def token_hashes(tokens: Sequence[int], block_size: int, *, generated: int = 0) -> BlockHashes:
    """Content given by token ids, followed by any number of `generated` tokens."""
    chain: list[int] = []

    def block_hash(index: int) -> int:
        while len(chain) <= index:
            start = len(chain) * block_size
            block = tuple(tokens[start : start + block_size])
            block += (generated,) * (block_size - len(block))
            chain.append(hash((chain[-1] if chain else None, block)))
        return chain[index]

    return block_hash


class BlockPool:
    """Hands out blocks, counts their references, and remembers the content of blocks that were given back.

    vLLM keeps one free list: taken from the head; a block that comes back goes to the head when it holds
    nothing reusable and to the tail when it has a hash. So the list is always blank blocks, then cached
    ones, and a block can leave the middle only from the cached part. Two plain containers say the same:
    a stack of blank blocks (its end is the head of the list) and a queue of cached ones.

    Invariants: a block is free exactly when its reference count is 0; a block with a hash is found by it
    until the block is taken for new content.
    """

    __slots__ = ("_blank", "_cached", "_first", "_hashes", "_others", "_references", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` includes the null block. ValueError when no block is left to hand out."""
        if num_blocks < 2:
            raise ValueError(
                f"num_blocks must be at least 2 (block 0 is the null block), got {num_blocks}: "
                "give the engine more KV cache memory"
            )
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hashes: list[Hashable | None] = [None] * num_blocks
        self._blank = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._first: dict[Hashable, int] = {}
        self._others: dict[Hashable, OrderedDict[int, None]] = {}  # later ones with an equal hash, in order

    @property
    def free_blocks(self) -> int:
        """Blocks without an owner, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the blocks that have an owner, 0 to 1 (vLLM's `kv_cache_usage_perc`)."""
        return 1.0 - self.free_blocks / (self.num_blocks - 1)

    def references(self, block: int) -> int:
        """How many requests own the block."""
        return self._references[block]

    def find(self, block_hash: Hashable) -> int | None:
        """The block with this content; of several, the one that was registered first."""
        return self._first.get(block_hash)

    def find_prefix(self, block_hashes: BlockHashes, limit: int) -> list[int]:
        """The longest run of cached blocks from the start of the content, at most `limit`."""
        found: list[int] = []
        for index in range(limit):
            block = self._first.get(block_hashes(index))
            if block is None:
                break
            found.append(block)
        return found

    def unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are free: sharing those uses up free blocks."""
        references = self._references
        return sum(1 for block in blocks if references[block] == 0)

    def take(self, count: int) -> list[int]:
        """Take `count` blocks for new content from the head of the free list. MemoryError when too few."""
        if count > self.free_blocks:
            raise MemoryError(
                f"taking {count} blocks needs as many free ones, got {self.free_blocks}: "
                "compare with free_blocks first, or release blocks"
            )
        taken: list[int] = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._references[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to cached blocks."""
        references = self._references
        for block in blocks:
            if references[block] == 0:
                del self._cached[block]
            references[block] += 1

    def register(self, block: int, block_hash: Hashable) -> None:
        """Name the content of an owned block, once. ValueError when it is free or already has a hash."""
        if self._references[block] == 0 or self._hashes[block] is not None:
            raise ValueError(
                f"block {block} must be owned and without a hash to be registered, got "
                f"{self._references[block]} owners and hash {self._hashes[block]!r}: take a block first"
            )
        self._hashes[block] = block_hash
        if block_hash in self._first:
            self._others.setdefault(block_hash, OrderedDict())[block] = None
        else:
            self._first[block_hash] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each block of a request, in the order of its content.

        The end of a content is the first to be reused, because a prefix is useful to more requests.
        """
        references, hashes = self._references, self._hashes
        blank: list[int] = []
        for block in reversed(blocks):
            if references[block] == 0:
                raise ValueError(f"block {block} must have an owner to be released, got none: release once")
            references[block] -= 1
            if references[block] == 0:
                if hashes[block] is None:
                    blank.append(block)
                else:
                    self._cached[block] = None
        self._blank.extend(reversed(blank))

    def _evict(self) -> int:
        """Take the oldest cached block and forget its content."""
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hashes[block]
        self._hashes[block] = None
        others = self._others.get(block_hash)
        if others is None:
            del self._first[block_hash]
            return block
        if self._first[block_hash] == block:
            self._first[block_hash], _ = others.popitem(last=False)
        else:
            del others[block]
        if not others:
            del self._others[block_hash]
        return block
