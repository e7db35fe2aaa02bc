"""Replays a recorded trace of vLLM's scheduler, to compare this engine with it event by event."""

from __future__ import annotations

from collections import deque
from typing import Any

from pytest_gpulab.engine.blocks import token_hashes
from pytest_gpulab.engine.scheduler import Batch, Request, Scheduler, SchedulerConfig

_SAMPLED_TOKEN = 5  # every output token of the recorded runs


def replay_trace(trace: dict[str, Any]) -> list[list[Any]]:
    """Run a trace's `requests` under its `config` and return its `events`.

    Format: one line of tests/data/vllm-0.32-scheduler-traces.jsonl.gz, see the README there.
    """
    scheduler = Scheduler(SchedulerConfig(**trace["config"]))
    pending = deque(trace["requests"])
    in_flight: deque[Batch] = deque()
    unreported = False  # vLLM schedules once more to tell the workers which requests have finished
    prefix_seen = (0, 0)
    events: list[list[Any]] = []
    tick = 0
    while pending or scheduler.has_unfinished or unreported or in_flight:
        while pending and pending[0]["arrival_step"] <= tick:
            scheduler.add(_request(trace, pending.popleft()))
        tick += 1
        if scheduler.has_unfinished or unreported:
            unreported = False
            batch = scheduler.schedule()
            in_flight.append(batch)
            events.append(_schedule_event(batch))
            if len(in_flight) < scheduler.config.max_in_flight:
                continue
        if in_flight:
            unreported |= bool(scheduler.update(in_flight.popleft()))
            events.append(_update_event(scheduler, prefix_seen))
            prefix_seen = (scheduler.prefix_queries, scheduler.prefix_hits)
    return events


def _request(trace: dict[str, Any], recorded: dict[str, Any]) -> Request:
    tokens = trace["shared_prefix"][: recorded["shared"]] + [recorded["fill"]] * recorded["count"]
    hashes = token_hashes(tokens, trace["config"]["block_size"], generated=_SAMPLED_TOKEN)
    return Request(recorded["id"], len(tokens), recorded["max_tokens"], hashes)


def _schedule_event(batch: Batch) -> list[Any]:
    chunks = [[request.id, tokens] for request, _, tokens in batch.chunks]
    return ["schedule", chunks, sorted(request.id for request in batch.preempted)]


def _update_event(scheduler: Scheduler, prefix_seen: tuple[int, int]) -> list[Any]:
    return [
        "update",
        len(scheduler.running),
        len(scheduler.waiting),
        scheduler.free_blocks,
        scheduler.prefix_queries - prefix_seen[0],
        scheduler.prefix_hits - prefix_seen[1],
    ]
