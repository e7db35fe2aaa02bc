"""The block pool against the free list as vLLM describes it: one list, in plain order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pytest_gpulab.engine.blocks import BlockPool, token_hashes, unique_hashes


def test_hands_out_every_block_but_the_null_block_in_order():
    pool = BlockPool(4)
    assert pool.take(3) == [1, 2, 3]
    assert pool.free_blocks == 0
    assert pool.usage == 1.0


def test_usage_counts_blocks_without_the_null_block():
    pool = BlockPool(5)
    assert pool.usage == 0.0
    pool.take(1)
    assert pool.usage == 0.25


def test_blank_blocks_return_to_the_head_last_block_first():
    pool = BlockPool(8)
    pool.release(pool.take(3))
    assert pool.take(5) == [3, 2, 1, 4, 5]


def test_cached_blocks_return_to_the_tail_and_the_end_of_a_content_goes_first():
    pool = BlockPool(5)
    blocks = pool.take(2)
    for block in blocks:
        pool.register(block, f"content {block}")
    pool.release(blocks)
    assert pool.take(3) == [3, 4, 2]
    assert pool.find("content 1") == 1
    assert pool.find("content 2") is None


def test_a_shared_block_is_free_when_its_last_owner_leaves():
    pool = BlockPool(3)
    (block,) = pool.take(1)
    pool.register(block, "content")
    pool.share([block])
    assert pool.references(block) == 2
    pool.release([block])
    assert pool.free_blocks == 1
    pool.release([block])
    assert pool.free_blocks == 2
    assert pool.unreferenced([block]) == 1
    pool.share([block])
    assert pool.free_blocks == 1


def test_of_equal_contents_the_first_registered_is_found():
    pool = BlockPool(4)
    first, second, third = pool.take(3)
    for block in (second, first, third):
        pool.register(block, "content")
    assert pool.find("content") == second
    pool.release([second])
    assert pool.take(1) == [second]
    assert pool.find("content") == first
    pool.release([third])
    pool.take(1)
    pool.release([first])
    pool.take(1)
    assert pool.find("content") is None


def test_a_prefix_ends_at_the_first_unknown_block():
    pool = BlockPool(8)
    hashes = token_hashes(list(range(16)), 4)
    blocks = pool.take(4)
    for index in (0, 1, 3):
        pool.register(blocks[index], hashes(index))
    assert pool.find_prefix(hashes, 4) == blocks[:2]
    assert pool.find_prefix(hashes, 1) == blocks[:1]


def test_equal_tokens_have_equal_hashes_as_far_as_they_agree():
    first = token_hashes([1] * 8 + [2] * 8, 4)
    second = token_hashes([1] * 8 + [3] * 4 + [2] * 4, 4)
    assert [first(index) == second(index) for index in range(4)] == [True, True, False, False]


def test_generated_tokens_continue_the_content():
    prompt = token_hashes([7] * 6, 4, generated=5)
    conversation = token_hashes([7] * 6 + [5] * 6, 4)
    assert [prompt(index) for index in range(3)] == [conversation(index) for index in range(3)]


def test_unique_contents_never_agree():
    first, second = unique_hashes(), unique_hashes()
    assert len({first(0), first(1), second(0), second(1)}) == 4
    assert first(1) == first(1)


@pytest.mark.parametrize(
    ("error", "message", "misuse"),
    [
        (ValueError, "num_blocks must be at least 2", lambda: BlockPool(1)),
        (MemoryError, "taking 3 blocks", lambda: BlockPool(3).take(3)),
        (ValueError, "must have an owner", lambda: BlockPool(3).release([1])),
        (ValueError, "must be owned", lambda: BlockPool(3).register(1, "content")),
    ],
)
def test_misuse_says_what_must_hold(error, message, misuse):
    with pytest.raises(error, match=message):
        misuse()


class PoolAgainstOneList(RuleBasedStateMachine):
    """`free` is vLLM's free list, literally; `owners` the requests, each a list of blocks."""

    @initialize(num_blocks=st.integers(2, 12))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.free = list(range(1, num_blocks))
        self.owners: list[list[int]] = []
        self.named: list[tuple[str, int]] = []  # (hash, block), in order of registration

    def named_blocks(self):
        return {block for _, block in self.named}

    def owned_blocks(self):
        return {block for blocks in self.owners for block in blocks}

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def take(self, data):
        count = data.draw(st.integers(1, len(self.free)))
        taken, self.free = self.free[:count], self.free[count:]
        self.named = [(name, block) for name, block in self.named if block not in taken]
        assert self.pool.take(count) == taken
        self.owners.append(taken)

    @precondition(lambda self: self.owned_blocks() - self.named_blocks())
    @rule(data=st.data(), name=st.sampled_from("abc"))
    def register(self, data, name):
        block = data.draw(st.sampled_from(sorted(self.owned_blocks() - self.named_blocks())))
        self.pool.register(block, name)
        self.named.append((name, block))

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def share(self, data):
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.named_blocks())), min_size=1, unique=True))
        self.pool.share(blocks)
        self.free = [block for block in self.free if block not in blocks]
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data):
        blocks = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.pool.release(blocks)
        freed = [block for block in reversed(blocks) if block not in self.owned_blocks()]
        blank = [block for block in freed if block not in self.named_blocks()]
        cached = [block for block in freed if block in self.named_blocks()]
        self.free = blank + self.free + cached

    @invariant()
    def agrees(self):
        if not hasattr(self, "pool"):
            return
        assert self.pool.free_blocks == len(self.free)
        assert self.pool.unreferenced(self.free) == len(self.free)
        for block in self.owned_blocks():
            assert self.pool.references(block) == sum(block in blocks for blocks in self.owners)
        for name in "abc":
            assert self.pool.find(name) == next((block for known, block in self.named if known == name), None)

    def teardown(self):
        if hasattr(self, "pool"):  # the order of the whole list
            assert self.pool.take(len(self.free)) == self.free


TestPoolAgainstOneList = PoolAgainstOneList.TestCase
TestPoolAgainstOneList.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
