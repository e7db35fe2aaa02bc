"""The scheduler: equal to vLLM 0.32 on recorded traces, and sound on anything else."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pytest_gpulab.engine.blocks import token_hashes
from pytest_gpulab.engine.replay import replay_trace
from pytest_gpulab.engine.scheduler import Request, Scheduler, SchedulerConfig

TRACES = Path(__file__).parent / "data" / "vllm-0.32-scheduler-traces.jsonl.gz"
ALL_TRACES = 500
QUICK_TRACES = 200


@cache
def trace_lines() -> list[str]:
    with gzip.open(TRACES, "rt") as lines:
        return list(lines)


def assert_replays(index: int) -> None:
    trace = json.loads(trace_lines()[index])
    events = replay_trace(trace)
    for position, (got, recorded) in enumerate(zip(events, trace["events"], strict=False)):
        assert got == recorded, f"trace {index}, event {position}, {trace['config']}"
    assert len(events) == len(trace["events"])


@pytest.mark.parametrize("index", range(QUICK_TRACES))
def test_equals_vllm(index):
    assert_replays(index)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(QUICK_TRACES, ALL_TRACES))
def test_equals_vllm_on_the_other_traces(index):
    assert_replays(index)


def test_quick_traces_cover_every_setting():
    traces = [json.loads(line) for line in trace_lines()]
    assert len(traces) == ALL_TRACES
    settings_of = [
        {(name, value) for trace in part for name, value in trace["config"].items()}
        for part in (traces, traces[:QUICK_TRACES])
    ]
    assert settings_of[0] == settings_of[1]
    preempting = [any(event[2] for event in trace["events"] if event[0] == "schedule") for trace in traces]
    assert sum(preempting[:QUICK_TRACES]) >= 25


def config(**changes) -> SchedulerConfig:
    small = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": 64,
        "async_scheduling": False,
    }
    return SchedulerConfig(**small | changes)


def chunks(batch):
    return [(request.id, start, tokens) for request, start, tokens in batch.chunks]


def ids(requests):
    return [request.id for request in requests]


def finish_all(scheduler: Scheduler) -> list[str]:
    """Steps with as many in flight as allowed until nothing is left. Returns ids in finishing order."""
    in_flight, finished = [], []
    while scheduler.has_unfinished or in_flight:
        if scheduler.has_unfinished:
            in_flight.append(scheduler.schedule())
        if len(in_flight) == scheduler.config.max_in_flight or not scheduler.has_unfinished:
            finished += ids(scheduler.update(in_flight.pop(0)))
    return finished


def test_a_prompt_is_computed_in_chunks_and_only_its_end_brings_a_token():
    scheduler = Scheduler(config(max_num_batched_tokens=8))
    scheduler.add(Request("a", 10, 2))
    first = scheduler.schedule()
    assert (chunks(first), ids(first.admitted), first.samples) == ([("a", 0, 8)], ["a"], [])
    scheduler.update(first)
    second = scheduler.schedule()
    assert (chunks(second), ids(second.samples)) == ([("a", 8, 2)], ["a"])
    assert scheduler.update(second) == []
    third = scheduler.schedule()
    assert chunks(third) == [("a", 10, 1)]
    (request,) = scheduler.update(third)
    assert (request.finished, request.output_tokens) == (True, 2)
    assert scheduler.free_blocks == 63
    assert scheduler.kv_usage == 0.0


def test_running_requests_come_before_waiting_ones():
    scheduler = Scheduler(config(max_num_batched_tokens=8))
    scheduler.add(Request("a", 4, 8))
    scheduler.update(scheduler.schedule())
    scheduler.add(Request("b", 20, 1))
    assert chunks(scheduler.schedule()) == [("a", 4, 1), ("b", 0, 7)]


def test_long_prompts_are_cut_only_in_company():
    scheduler = Scheduler(config(long_prefill_token_threshold=5))
    scheduler.add(Request("a", 20, 1))
    alone = scheduler.schedule()
    assert alone.tokens == 20
    scheduler.update(alone)
    scheduler.add(Request("b", 20, 1))
    scheduler.add(Request("c", 20, 1))
    assert chunks(scheduler.schedule()) == [("b", 0, 5), ("c", 0, 5)]


def test_a_head_that_does_not_fit_blocks_those_behind_it():
    scheduler = Scheduler(config(num_blocks=17))
    scheduler.add(Request("a", 30, 20))
    scheduler.update(scheduler.schedule())
    scheduler.add(Request("b", 40, 1))
    scheduler.add(Request("c", 4, 1))
    assert chunks(scheduler.schedule()) == [("a", 30, 1)]
    assert ids(scheduler.waiting) == ["b", "c"]


def test_the_watermark_holds_only_next_to_running_requests():
    scheduler = Scheduler(config(num_blocks=17, watermark=0.5))
    scheduler.add(Request("a", 36, 2))  # 9 of 16 blocks, the watermark is 8
    scheduler.update(scheduler.schedule())
    scheduler.add(Request("b", 4, 1))
    assert chunks(scheduler.schedule()) == [("a", 32, 4)]


def test_without_reservation_a_prompt_is_admitted_by_its_first_chunk():
    for reserve, admitted in ((True, 1), (False, 2)):
        scheduler = Scheduler(config(num_blocks=17, scheduler_reserve_full_isl=reserve))
        scheduler.add(Request("a", 24, 1))
        scheduler.add(Request("b", 44, 1))
        assert len(scheduler.schedule().admitted) == admitted


def test_the_last_running_request_is_preempted_and_computed_again():
    scheduler = Scheduler(config(num_blocks=17, enable_prefix_caching=False))
    a, b = Request("a", 16, 40), Request("b", 15, 40)
    scheduler.add(a)
    scheduler.add(b)
    while not (batch := scheduler.schedule()).preempted:
        scheduler.update(batch)
    assert ids(batch.preempted) == ["b"]
    assert ids(scheduler.waiting) == ["b"]
    assert (b.preemptions, b.computed, scheduler.preemptions) == (1, 0, 1)
    scheduler.update(batch)
    assert finish_all(scheduler) == ["a", "b"]
    assert (a.output_tokens, b.output_tokens) == (40, 40)


def test_the_output_ends_at_max_model_len():
    for async_scheduling in (False, True):
        scheduler = Scheduler(config(max_model_len=32, async_scheduling=async_scheduling))
        request = Request("a", 30, 100)
        scheduler.add(request)
        finish_all(scheduler)
        assert request.output_tokens == 2


def test_a_shared_prefix_is_computed_once():
    scheduler = Scheduler(config())
    for name in "abc":
        tokens = [1] * 9 + [ord(name)] * 3
        scheduler.add(Request(name, len(tokens), 1, token_hashes(tokens, block_size=4)))
    batch = scheduler.schedule()
    assert chunks(batch) == [("a", 0, 12), ("b", 8, 4), ("c", 8, 4)]
    assert [request.cached_tokens for request in batch.admitted] == [0, 8, 8]
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (36, 16)
    assert scheduler.free_blocks == 63 - 3 - 1 - 1


def test_the_last_token_of_a_known_prompt_is_computed_again():
    scheduler = Scheduler(config())
    for name in "ab":
        scheduler.add(Request(name, 8, 1, token_hashes([1] * 8, block_size=4)))
    assert chunks(scheduler.schedule()) == [("a", 0, 8), ("b", 4, 4)]


def test_an_answer_is_a_known_prefix_of_the_next_turn():
    scheduler = Scheduler(config())
    scheduler.add(Request("turn 1", 8, 9, token_hashes([1] * 8, 4, generated=5)))
    finish_all(scheduler)
    follow_up = Request("turn 2", 18, 1, token_hashes([1] * 8 + [5] * 9 + [2], 4))
    scheduler.add(follow_up)
    finish_all(scheduler)
    assert follow_up.cached_tokens == 16


def test_async_decodes_one_step_ahead_and_stops_in_time():
    scheduler = Scheduler(config(async_scheduling=True))
    scheduler.add(Request("a", 4, 2))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert (chunks(first), chunks(second)) == ([("a", 0, 4)], [("a", 4, 1)])
    scheduler.update(first)
    third = scheduler.schedule()
    assert third.chunks == []
    assert ids(scheduler.update(second)) == ["a"]
    assert scheduler.update(third) == []


def test_abort_of_a_waiting_request():
    scheduler = Scheduler(config())
    scheduler.add(Request("a", 8, 2))
    scheduler.add(Request("b", 8, 2))
    assert scheduler.abort("b")
    assert finish_all(scheduler) == ["a"]


def test_abort_with_a_step_in_flight_frees_the_blocks_and_drops_the_token():
    scheduler = Scheduler(config(async_scheduling=True))
    a, b = Request("a", 8, 20), Request("b", 8, 20)
    scheduler.add(a)
    scheduler.add(b)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.abort("a")
    assert (a.finished, ids(scheduler.running)) == (True, ["b"])
    assert scheduler.free_blocks == 63 - len(b.blocks)
    assert scheduler.update(first) == []
    assert (ids(first.samples), a.output_tokens, b.output_tokens) == (["b"], 0, 1)
    scheduler.update(second)
    assert finish_all(scheduler) == ["b"]


def test_abort_of_an_unknown_request_is_no_error():
    scheduler = Scheduler(config())
    assert not scheduler.abort("gone")
    scheduler.add(Request("a", 8, 1))
    finish_all(scheduler)
    assert not scheduler.abort("a")


def test_an_id_may_be_used_again_after_its_request_finished():
    scheduler = Scheduler(config())
    for _ in range(2):
        scheduler.add(Request("a", 8, 1))
        assert finish_all(scheduler) == ["a"]
    assert scheduler.prefix_hits == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold must be at least 0"),
        ({"watermark": 1.0}, "watermark must be in"),
        ({"max_num_batched_tokens": 3}, "must be at least max_num_seqs"),
        ({"num_blocks": 15}, "num_blocks must be at least 16"),
    ],
)
def test_settings_that_vllm_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("request_shape", "message"),
    [((64, 1), "below max_model_len=64"), ((60, 10), "must fit into the 15 usable KV blocks")],
)
def test_requests_that_can_never_run(request_shape, message):
    with pytest.raises(ValueError, match=message):
        Scheduler(config(num_blocks=16)).add(Request("a", *request_shape))


@pytest.mark.parametrize("request_shape", [(0, 1), (1, 0)])
def test_requests_without_tokens(request_shape):
    with pytest.raises(ValueError, match="must be at least 1"):
        Request("a", *request_shape)


def test_a_request_is_added_once():
    scheduler = Scheduler(config())
    request = Request("a", 8, 1)
    scheduler.add(request)
    with pytest.raises(ValueError, match="must differ"):
        scheduler.add(Request("a", 8, 1))
    finish_all(scheduler)
    with pytest.raises(ValueError, match="must be new"):
        scheduler.add(request)


def test_steps_return_in_order_and_not_too_many_are_in_flight():
    scheduler = Scheduler(config(async_scheduling=True))
    scheduler.add(Request("a", 8, 8))
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(RuntimeError, match="at most 2 steps"):
        scheduler.schedule()
    with pytest.raises(ValueError, match=r"oldest step in flight \(1\)"):
        scheduler.update(second)
    scheduler.update(first)
    with pytest.raises(ValueError, match="once, in order"):
        scheduler.update(first)


MAX_MODEL_LEN = 40

configs = st.builds(
    SchedulerConfig,
    num_blocks=st.integers(11, 30),
    block_size=st.just(4),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(5, 60),
    max_model_len=st.just(MAX_MODEL_LEN),
    enable_prefix_caching=st.booleans(),
    async_scheduling=st.booleans(),
    long_prefill_token_threshold=st.sampled_from([0, 3, 10]),
    scheduler_reserve_full_isl=st.booleans(),
    watermark=st.sampled_from([0.0, 0.1, 0.4]),
)


class AnyTraffic(RuleBasedStateMachine):
    """Requests come and go at any time, and steps are scheduled and updated in any allowed order."""

    @initialize(config=configs)
    def start(self, config):
        self.scheduler = Scheduler(config)
        self.config = config
        self.in_flight = []
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.first_admissions: list[str] = []
        self.tokens: Counter[str] = Counter()

    @rule(shared=st.integers(0, 20), own=st.integers(1, MAX_MODEL_LEN - 21), output=st.integers(1, 40))
    def add(self, shared, own, output):
        name = str(len(self.requests))
        tokens = [1] * shared + [100 + len(self.requests) % 3] * own  # some contents are equal
        hashes = token_hashes(tokens, self.config.block_size, generated=1)
        self.requests[name] = Request(name, len(tokens), output, hashes)
        self.scheduler.add(self.requests[name])

    @precondition(lambda self: len(self.in_flight) < self.config.max_in_flight)
    @rule()
    def schedule(self):
        batch = self.scheduler.schedule()
        self.in_flight.append(batch)
        assert batch.tokens <= self.config.max_num_batched_tokens
        assert all(tokens > 0 for _, _, tokens in batch.chunks)
        assert len(set(ids(request for request, _, _ in batch.chunks))) == len(batch.chunks)
        assert not (batch.preempted and batch.admitted)
        self.first_admissions += [request.id for request in batch.admitted if request.preemptions == 0]

    @precondition(lambda self: self.in_flight)
    @rule()
    def update(self):
        batch = self.in_flight.pop(0)
        finished = self.scheduler.update(batch)
        self.tokens.update(ids(batch.samples))
        for request in finished:
            assert request.finished
            assert request.id not in self.aborted
            assert self.tokens[request.id] == self.promised(request)

    @precondition(lambda self: self.scheduler.has_unfinished)
    @rule(data=st.data())
    def abort(self, data):
        unfinished = [name for name, request in self.requests.items() if not request.finished]
        name = data.draw(st.sampled_from(unfinished))
        assert self.scheduler.abort(name)
        self.aborted.add(name)

    @staticmethod
    def promised(request):
        return min(request.max_tokens, MAX_MODEL_LEN - request.prompt_tokens)

    @invariant()
    def queues_hold_the_unfinished_requests(self):
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        queued = ids(scheduler.running) + ids(scheduler.waiting)
        unfinished = [name for name, request in self.requests.items() if not request.finished]
        assert sorted(queued) == sorted(unfinished)
        assert scheduler.has_unfinished == bool(queued)
        assert len(scheduler.running) <= self.config.max_num_seqs
        never_run = [int(request.id) for request in scheduler.waiting if request.preemptions == 0]
        assert never_run == sorted(never_run)
        admitted = [int(name) for name in self.first_admissions]
        assert admitted == sorted(set(admitted))

    @invariant()
    def blocks_belong_to_running_requests(self):
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler.pool
        owners: Counter[int] = Counter()
        content: dict[int, object] = {}
        for request in self.scheduler.running:
            assert len(set(request.blocks)) == len(request.blocks)
            owners.update(request.blocks)
            for index, block in enumerate(request.blocks):
                if owners[block] > 1:  # shared: the content must be the same
                    assert content[block] == request.block_hashes(index)
                content[block] = request.block_hashes(index)
        assert 0 not in owners
        assert all(pool.references(block) == owners[block] for block in range(pool.num_blocks))
        assert self.scheduler.free_blocks + len(owners) == self.config.num_blocks - 1
        if not self.config.enable_prefix_caching:
            assert all(count == 1 for count in owners.values())

    @invariant()
    def progress_stays_within_the_sequence(self):
        for request in getattr(self, "requests", {}).values():
            assert request.output_tokens == self.tokens[request.id] <= self.promised(request)
            if not request.finished:
                assert 0 <= request.placeholders <= len(self.in_flight)
                assert request.computed <= request.num_tokens + request.placeholders
                held = len(request.blocks) * self.config.block_size
                assert request.computed <= held < request.computed + self.config.block_size

    def teardown(self):
        """Whatever happened, everything finishes with all its tokens, and all blocks come back."""
        if not hasattr(self, "scheduler"):
            return
        steps = 0
        while self.scheduler.has_unfinished or self.in_flight:
            if self.scheduler.has_unfinished and len(self.in_flight) < self.config.max_in_flight:
                self.schedule()
            if len(self.in_flight) == self.config.max_in_flight or not self.scheduler.has_unfinished:
                self.update()
            steps += 1
            assert steps < 20_000, "no progress"
        for name, request in self.requests.items():
            assert name in self.aborted or self.tokens[name] == self.promised(request)
        assert self.scheduler.free_blocks == self.config.num_blocks - 1


TestAnyTraffic = AnyTraffic.TestCase
TestAnyTraffic.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "tokens"),
    [
        (1, 2048, 2),
        (3, 2048, 4),
        (5, 2048, 8),
        (8, 2048, 16),
        (32, 9216, 64),
        (130, 8192, 256),
        (1024, 8192, 512),
        (16, 30, 24),
    ],
)
def test_graphs_are_captured_up_to_twice_the_sequences(
    max_num_seqs: int, max_num_batched_tokens: int, tokens: int
) -> None:
    """vLLM: min(2 x max_num_seqs, 512), no more than the token budget, on its grid of sizes."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    assert tokens == max(size for size in sizes if size <= min(2 * max_num_seqs, 512, max_num_batched_tokens))
    config = SchedulerConfig(
        num_blocks=1000,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=1024,
    )
    assert config.graph_tokens == tokens
