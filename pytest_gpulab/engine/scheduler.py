"""The V1 scheduler of vLLM 0.32, step by step, as a pure state machine without a clock.

Scope: one full-attention KV group, first come first served, chunked prefill, recompute on preemption; no
speculative decoding, LoRA or KV connector. Batches, queue lengths, free blocks and prefix statistics equal
those of vLLM's `Scheduler` and `AsyncScheduler` (tests/data holds traces of the real ones).

    scheduler.add(Request("a", prompt_tokens=512, max_tokens=128))
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        ...                               # execute batch.chunks
        finished = scheduler.update(batch)

With `async_scheduling` a second step may be scheduled before the first one is updated, as vLLM does.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from pytest_gpulab.engine.blocks import BlockHashes, BlockPool, unique_hashes


class EngineRefused(ValueError):
    """No engine starts with these arguments: vLLM refuses them, or its model here lacks them."""


MAX_GRAPH_TOKENS: Final = 512
"""vLLM captures 1, 2 and 4 tokens, then every 8th size, and from 256 on every 16th
(``VllmConfig._set_cudagraph_sizes``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """vLLM's scheduler and cache settings, by vLLM's names and with its defaults where it has fixed ones.

    EngineRefused for settings that vLLM refuses at start-up.
    """

    num_blocks: int  # KV blocks, the null block included
    max_num_seqs: int  # requests running at once
    max_num_batched_tokens: int  # token budget of a step
    max_model_len: int  # prompt and output tokens of one request
    block_size: int = 16  # tokens per block
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    long_prefill_token_threshold: int = 0  # tokens per prompt chunk while others wait or run; 0: no limit
    scheduler_reserve_full_isl: bool = True  # admit only when the whole sequence fits, not just its chunk
    watermark: float = 0.0  # share of num_blocks kept free when admitting next to running requests

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size"):
            _at_least(name, getattr(self, name), 1)
        _at_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        if not 0.0 <= self.watermark < 1.0:
            raise EngineRefused(f"watermark must be in [0, 1), got {self.watermark}: use a share of num_blocks")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise EngineRefused(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), got "
                f"{self.max_num_batched_tokens}: raise it or lower max_num_seqs"
            )
        longest = -(-self.max_model_len // self.block_size)
        if self.num_blocks < longest:
            raise EngineRefused(
                f"num_blocks must be at least {longest}, the blocks of one request of max_model_len="
                f"{self.max_model_len}, got {self.num_blocks}: lower max_model_len or give the engine more "
                "KV cache memory"
            )

    @property
    def graph_tokens(self) -> int:
        """The largest step for which vLLM has CUDA graphs, in tokens: by its default, at most twice the sequences."""
        largest = min(2 * self.max_num_seqs, self.max_num_batched_tokens, MAX_GRAPH_TOKENS)
        if largest < 8:
            return next(size for size in (4, 2, 1) if size <= largest)
        return largest - largest % (16 if largest >= 256 else 8)

    @property
    def max_in_flight(self) -> int:
        """Steps that may be scheduled and not yet updated."""
        return 2 if self.async_scheduling else 1


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise EngineRefused(f"{name} must be at least {least}, got {value}: raise it")


@dataclass(slots=True, eq=False)
class Request:
    """One sequence and where the scheduler has it. The caller sets the first four fields and reads the rest.

    The output ends after `max_tokens`, or earlier where the sequence reaches max_model_len.
    Default content is shared with no other request.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    block_hashes: BlockHashes = field(default_factory=unique_hashes, repr=False)

    num_tokens: int = field(init=False)  # prompt and delivered output
    computed: int = field(default=0, init=False)  # tokens whose KV is computed, steps in flight included
    placeholders: int = field(default=0, init=False)  # async: output tokens of steps in flight
    preemptions: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)  # prompt tokens found in the cache at first admission
    finished: bool = field(default=False, init=False)  # stopped or aborted

    blocks: list[int] = field(default_factory=list, init=False, repr=False)
    capacity: int = field(default=0, init=False, repr=False)  # tokens its blocks can hold
    registered: int = field(default=0, init=False, repr=False)  # leading blocks that have a hash
    hash_at: int = field(default=sys.maxsize, init=False, repr=False)  # length that fills the next such block
    stop_at: int = field(default=0, init=False, repr=False)  # num_tokens when done; 0: not added yet
    stale_step: int = field(default=0, init=False, repr=False)  # last step in flight when it was preempted

    def __post_init__(self) -> None:
        _at_least(f"prompt_tokens of request {self.id!r}", self.prompt_tokens, 1)
        _at_least(f"max_tokens of request {self.id!r}", self.max_tokens, 1)
        self.num_tokens = self.prompt_tokens

    @property
    def output_tokens(self) -> int:
        """Output tokens delivered so far."""
        return self.num_tokens - self.prompt_tokens


Chunk = tuple[Request, int, int]
"""A request's part of a step: (request, position of the first token, tokens)."""


@dataclass(slots=True, eq=False)
class Batch:
    """One engine step. `samples` are the requests that get an output token from it when it is updated."""

    step: int  # 1, 2, ...
    chunks: list[Chunk] = field(default_factory=list)
    samples: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)  # left the waiting queue in this step
    preempted: list[Request] = field(default_factory=list)  # went back to it

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(tokens for _, _, tokens in self.chunks)


class Scheduler:
    """Decides what each step computes.

    `running` (in order of admission) and `waiting` (in order of service) are for reading only.
    Counters never reset: `preemptions`, and `prefix_queries` and `prefix_hits` in tokens.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[Batch] = deque()
        self._step = 0
        self._placeholder = 1 if config.async_scheduling else 0
        self._watermark = int(config.watermark * config.num_blocks)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._requests)

    @property
    def free_blocks(self) -> int:
        """KV blocks that no request owns."""
        return self.pool.free_blocks

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that requests own, 0 to 1."""
        return self.pool.usage

    def add(self, request: Request) -> None:
        """Queue a new request. ValueError when its id is in use, it was added before, or it can never run."""
        if request.id in self._requests:
            raise ValueError(f"ids of unfinished requests must differ, got {request.id!r} twice: rename one")
        if request.stop_at:
            raise ValueError(f"request {request.id!r} must be new, got one added before: create another")
        longest = self.config.max_model_len
        if request.prompt_tokens >= longest:
            raise ValueError(
                f"prompt_tokens must be below max_model_len={longest}, got {request.prompt_tokens} in "
                f"request {request.id!r}: shorten the prompt or raise max_model_len"
            )
        stop_at = min(request.prompt_tokens + request.max_tokens, longest)
        needed, usable = self._blocks_for(stop_at - 1), self.config.num_blocks - 1
        if needed > usable:  # vLLM would preempt it for ever
            raise ValueError(
                f"request {request.id!r} must fit into the {usable} usable KV blocks, got one that needs "
                f"{needed}: shorten it or give the engine more KV cache memory"
            )
        request.stop_at = stop_at
        self._requests[request.id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """Drop a request and its blocks; steps in flight deliver nothing to it. False when none has this id.

        As in vLLM an unknown id is no error: the request may just have finished.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        for batch in self._in_flight:
            batch.samples = [other for other in batch.samples if other is not request]
        self._finish(request)
        self._remove([request])
        return True

    def schedule(self) -> Batch:
        """Form the next step. RuntimeError when too many steps are in flight."""
        config = self.config
        if len(self._in_flight) >= config.max_in_flight:
            raise RuntimeError(
                f"at most {config.max_in_flight} steps may be in flight with async_scheduling="
                f"{config.async_scheduling}, got one more: update the oldest first"
            )
        chunk_limit = config.max_num_batched_tokens
        if config.long_prefill_token_threshold and len(self.running) + len(self.waiting) > 1:
            chunk_limit = min(chunk_limit, config.long_prefill_token_threshold)
        self._step += 1
        batch = Batch(self._step)
        budget = self._schedule_running(batch, config.max_num_batched_tokens, chunk_limit)
        if not batch.preempted:
            self._schedule_waiting(batch, budget, chunk_limit)
        self._in_flight.append(batch)
        return batch

    def update(self, batch: Batch) -> list[Request]:
        """Deliver the step's tokens: one to each of `batch.samples`. Returns those that it finished.

        Steps return in the order in which they were scheduled. ValueError otherwise.
        """
        if not self._in_flight or self._in_flight[0] is not batch:
            oldest = self._in_flight[0].step if self._in_flight else None
            raise ValueError(
                f"the oldest step in flight ({oldest}) must be updated, got {batch.step}: "
                "update each batch once, in order"
            )
        self._in_flight.popleft()
        step = batch.step
        placeholder = self._placeholder
        finished: list[Request] = []
        for request in batch.samples:
            request.num_tokens = num_tokens = request.num_tokens + 1
            if step > request.stale_step:  # else it was preempted since: it gets the token but holds no KV
                request.placeholders -= placeholder
                if num_tokens > request.hash_at:  # the KV of this token itself is not computed yet
                    self._register(request, num_tokens - 1)
            if num_tokens >= request.stop_at:
                self._finish(request)
                finished.append(request)
        if finished:
            self._remove(finished)
        return finished

    def _schedule_running(self, batch: Batch, budget: int, chunk_limit: int) -> int:
        """Continue running requests, preempting from the end when blocks run out. Returns the budget left."""
        placeholder = self._placeholder
        add_chunk, add_sample = batch.chunks.append, batch.samples.append
        for request in self.running:  # preemption only pops from the end, behind this position
            if budget == 0:
                break
            start = request.computed
            placeholders = request.placeholders
            wanted = end = request.num_tokens + placeholders
            # vLLM has two rules here, for max_tokens and for max_model_len. With one step in flight both say:
            # the last token is on its way.
            if wanted >= request.stop_at:
                continue
            if end - start != 1:
                end = start + min(end - start, chunk_limit, budget)
            # Only a step that starts or fills a block touches the pool.
            if (end > request.capacity or end >= request.hash_at) and not self._grow(request, end, batch):
                break
            # The same as _commit, written out because a decode step spends its time here.
            add_chunk((request, start, end - start))
            request.computed = end
            if end == wanted:
                request.placeholders = placeholders + placeholder
                add_sample(request)
            budget -= end - start
        return budget

    def _schedule_waiting(self, batch: Batch, budget: int, chunk_limit: int) -> None:
        """Admit from the head of the queue until something runs out; a misfit holds up the rest."""
        waiting, running = self.waiting, self.running
        while waiting and budget > 0 and len(running) < self.config.max_num_seqs:
            request = waiting[0]
            hit = self._cached_prefix(request)
            start = len(hit) * self.config.block_size
            tokens = min(request.num_tokens - start, chunk_limit, budget)
            if not self._admit(request, hit, start + tokens):
                break
            running.append(waiting.popleft())
            batch.admitted.append(request)
            self._count_prefix(request, start)
            self._commit(batch, request, start, tokens)
            budget -= tokens

    def _commit(self, batch: Batch, request: Request, start: int, tokens: int) -> None:
        """Put a chunk into the step. It brings a token unless it is a part of a prompt that goes on."""
        batch.chunks.append((request, start, tokens))
        request.computed = start + tokens
        if request.computed >= request.num_tokens + request.placeholders:
            request.placeholders += self._placeholder
            batch.samples.append(request)

    def _cached_prefix(self, request: Request) -> list[int]:
        """Cached blocks that the request can start from; at least one token is left as the step's input."""
        if not self.config.enable_prefix_caching:
            return []
        limit = (request.num_tokens - 1) // self.config.block_size
        return self.pool.find_prefix(request.block_hashes, limit)

    def _count_prefix(self, request: Request, hit_tokens: int) -> None:
        """Prefix statistics of a first admission: a preempted request would find its own blocks."""
        if request.preemptions == 0 and self.config.enable_prefix_caching:
            request.cached_tokens = hit_tokens
            self.prefix_queries += request.num_tokens
            self.prefix_hits += hit_tokens

    def _admit(self, request: Request, hit: list[int], end: int) -> bool:
        """Give a waiting request its cached blocks and new ones up to position `end`, if there are enough."""
        config, pool = self.config, self.pool
        # A cached block without an owner counts as free until it is shared.
        kept = len(hit) - pool.unreferenced(hit)
        available = pool.free_blocks - (self._watermark if self.running else 0)
        reserve = request.num_tokens if config.scheduler_reserve_full_isl else end
        if self._blocks_for(reserve) - kept > available:
            return False
        pool.share(hit)
        request.blocks = hit + pool.take(self._blocks_for(end) - len(hit))
        request.capacity = len(request.blocks) * config.block_size
        if config.enable_prefix_caching:
            request.registered = len(hit)
            self._register(request, end)
        return True

    def _grow(self, request: Request, end: int, batch: Batch) -> bool:
        """Give a running request blocks up to position `end`. False when it was itself preempted for that."""
        missing = self._blocks_for(end) - len(request.blocks)
        while missing > self.pool.free_blocks:
            victim = self.running.pop()
            self._preempt(victim)
            batch.preempted.append(victim)
            if victim is request:
                return False
        if missing > 0:
            request.blocks += self.pool.take(missing)
            request.capacity = len(request.blocks) * self.config.block_size
        if end >= request.hash_at:
            self._register(request, min(end, request.num_tokens))
        return True

    def _blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens of one request."""
        return -(-tokens // self.config.block_size)

    def _register(self, request: Request, tokens: int) -> None:
        """Make the full blocks among the first `tokens` known to the prefix cache.

        vLLM does so when it schedules them, so that later requests of the same step can share them.
        """
        full = tokens // self.config.block_size
        for index in range(request.registered, full):
            self.pool.register(request.blocks[index], request.block_hashes(index))
        request.registered = full
        request.hash_at = (full + 1) * self.config.block_size

    def _preempt(self, request: Request) -> None:
        """Take everything back from a request; it starts again from the head of the waiting queue.

        vLLM also keeps it there while a step in flight holds it. With at most two steps in flight that step
        has always been updated when the next one admits requests.
        """
        self._free(request)
        request.computed = 0
        request.placeholders = 0
        request.preemptions += 1
        request.stale_step = self._last_step_in_flight(request)
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _last_step_in_flight(self, request: Request) -> int:
        """The newest step in flight that computes the request, or 0."""
        for batch in reversed(self._in_flight):
            if any(other is request for other, _, _ in batch.chunks):
                return batch.step
        return 0

    def _free(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        request.capacity = 0
        request.registered = 0
        request.hash_at = sys.maxsize

    def _finish(self, request: Request) -> None:
        """Free the blocks at once: vLLM does not wait for steps in flight."""
        self._free(request)
        request.finished = True
        del self._requests[request.id]

    def _remove(self, finished: list[Request]) -> None:
        """Take finished requests out of their queue. A preempted one can finish while it waits."""
        running = [request for request in self.running if not request.finished]
        some_waited = len(self.running) - len(running) < len(finished)
        self.running = running
        if some_waited:
            self.waiting = deque(request for request in self.waiting if not request.finished)
