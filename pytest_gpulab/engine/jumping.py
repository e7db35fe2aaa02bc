"""The fast driver: O(1) work per step, and one closed-form jump over steps in which nothing but decoding happens.

It keeps the sums that the costs need instead of the scheduler's requests: while KV blocks suffice, a request that
decodes gets one token in every step, so its last step is known when its first token is scheduled. The result
equals that of `stepping` (a test proves it); what cannot be done this way is refused with `NeedsStepping`.

The module is written so that mypyc can compile it; it runs the same without.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.engine.client import Client
from pytest_gpulab.engine.cost import StepCost
from pytest_gpulab.engine.frontend import FrontEnd
from pytest_gpulab.engine.outcome import SAMPLE_EVERY_S, Outcome, totals
from pytest_gpulab.engine.plan import Plan
from pytest_gpulab.engine.ramp import ramp_count, ramp_sum
from pytest_gpulab.experiment import ClosedLoop, Direct

NEVER: Final = math.inf
NONE: Final[list[int]] = []
"""No requests. Nobody appends to it."""


class NeedsStepping(Exception):
    """The run needs what only the exact scheduler does: preemption, prefix hits, aborts."""


def run_jumping(plan: Plan) -> Outcome:
    """Simulate the plan. NeedsStepping when it cannot be done exactly here."""
    require_plain(plan)
    return _Jumping(plan).run()


class _Step:
    """A step that has been scheduled: one token each for `tokens` requests, the first or last one for some."""

    __slots__ = ("firsts", "lasts", "tokens")

    def __init__(self, tokens: int, firsts: list[int], lasts: list[int]) -> None:
        self.tokens = tokens
        self.firsts = firsts
        self.lasts = lasts


class _Jumping:
    """One run. Requests are their indices in the schedule; times are seconds."""

    def __init__(self, plan: Plan) -> None:
        config = plan.config
        self._plan = plan
        self._prompts: list[int] = plan.schedule["prompt_tokens"].tolist()
        self._outputs: list[int] = plan.schedule["output_tokens"].tolist()
        self._count: int = len(self._prompts)
        self._cost = StepCost(plan.variant, plan.config.graph_tokens, plan.eager)
        self._front_end = FrontEnd(plan.variant.front_end)
        self._blocks = _Blocks(plan, self._prompts, self._outputs)
        self._pipelined: bool = config.async_scheduling
        self._max_seqs: int = config.max_num_seqs
        self._max_tokens: int = config.max_num_batched_tokens

        # The client. Without one, every request is sent when it is due.
        due = plan.scheduled()
        self._due = due
        self._client = None if _sends_all(plan) else Client(plan.workload, due)
        self._sent = 0
        self._wake: float = self._client.next_at if self._client else (due[0] if due else NEVER)
        self._outcome = Outcome.empty(due, self._client.sent if self._client else due)
        self._first_token: list[float] = self._outcome.first_token
        self._last_token: list[float] = self._outcome.last_token

        # Between client and scheduler: [when the engine gets it, request], then (when it was added, request).
        self._inbox: deque[Any] = self._front_end.inbox
        self._arrival = NEVER  # of the head of the inbox
        self._waiting: deque[tuple[float, int]] = deque()

        # The scheduler's view after the last step scheduled.
        self._now = 0.0  # the CPU is free
        self._step = 0  # steps scheduled
        self._running = 0  # requests that hold a place, those included whose last step is in flight
        self._decodes = 0  # sequences in the next decode step
        self._context = 0  # tokens that it will read
        self._ends: list[int] = []  # heap of last step * count + request, of those that decode
        self._partial = 0  # the request of whose prompt only `_done` tokens are scheduled, and `_rest` not
        self._done = 0
        self._rest = 0

        # Steps on their way. With async scheduling one is in flight while the next is scheduled.
        self._flight: _Step | None = None
        self._flight_end = -NEVER
        self._returned: _Step | None = None  # at `_now`; its tokens are not delivered yet

        self._next_sample = 0.0
        self._queue_time = 0.0
        self._finished = 0
        self._prompted = 0
        self._generated = 0

    def run(self) -> Outcome:
        """Until nothing is left to do."""
        while True:
            if self._wake <= self._now:
                self._let_client_act()
            if self._returned is not None:
                self._deliver(self._returned, self._now)
                self._returned = None
                if self._wake <= self._now:
                    self._let_client_act()
            while self._arrival <= self._now:
                self._waiting.append((self._now, self._inbox.popleft()[1]))
                self._arrival = self._inbox[0][0] if self._inbox else NEVER
            if self._rest or (self._running < self._max_seqs and self._waiting):
                self._prefill()
            elif self._decodes:
                self._decode()
            elif self._flight is not None:
                self._await_flight()
            elif not self._sleep():
                return self._close()

    def _let_client_act(self) -> None:
        """Take in what clients send until now."""
        client, front_end, prompts = self._client, self._front_end, self._prompts
        if client is None:
            wake, request = self._wake, self._sent
            while wake <= self._now:
                front_end.take_in(wake, prompts[request], request)
                request += 1
                wake = self._due[request] if request < self._count else NEVER
            self._wake, self._sent = wake, request
        else:
            for request in client.act(self._now):
                front_end.take_in(client.sent[request], prompts[request], request)
            self._wake = client.next_at
        if self._inbox:
            self._arrival = self._inbox[0][0]

    def _deliver(self, step: _Step, at: float) -> None:
        """Stream the tokens of a step that has returned, and answer those that are done."""
        if not step.tokens:
            return
        received = self._front_end.stream(at, step.tokens)
        self._generated += step.tokens
        for request in step.firsts:
            self._first_token[request] = received
            self._prompted += self._prompts[request]
        if not step.lasts:
            return
        finished = len(step.lasts)
        self._running -= finished
        self._finished += finished
        for request in step.lasts:
            self._last_token[request] = received
        if self._blocks.scarce:
            self._blocks.release(step.lasts)
        client = self._client
        if client is not None:
            for request in step.lasts:
                client.answered(request, received)
            self._wake = client.next_at

    def _prefill(self) -> None:
        """Schedule a step with prefill: all decodes, the rest of a prompt, then new requests, while they fit."""
        decodes = self._decodes
        budget = self._max_tokens - decodes
        firsts: list[int] = []
        prefills = prefill_tokens = 0
        attended = 0.0
        if self._rest:
            chunk = min(self._rest, budget)
            attended = chunk * (self._done + chunk / 2)
            prefills, prefill_tokens = 1, chunk
            budget -= chunk
            self._rest -= chunk
            self._done += chunk
            if not self._rest:
                firsts.append(self._partial)
        while budget and self._waiting and self._running < self._max_seqs:
            added, request = self._waiting.popleft()
            self._queue_time += self._now - added
            self._running += 1
            if self._blocks.scarce:
                self._blocks.reserve(request)
            chunk = self._prompts[request]
            if chunk > budget:
                self._rest = chunk - budget
                self._done = chunk = budget
                self._partial = request
            else:
                firsts.append(request)
            attended += chunk * (chunk / 2)
            prefills += 1
            prefill_tokens += chunk
            budget -= chunk
        gpu_s = self._cost.gpu(decodes, self._context, prefills, prefill_tokens, attended)
        prepared = self._now + self._cost.prepare(decodes, prefills)
        launched = prepared + self._cost.launch(decodes, prefill_tokens)
        lasts = self._start_decoding(firsts, self._scheduled(1))
        step = _Step(decodes + len(firsts), firsts, lasts)
        self._launch(step, max(max(prepared, self._flight_end) + gpu_s, launched), launched)

    def _start_decoding(self, firsts: list[int], lasts: list[int]) -> list[int]:
        """The prompts of `firsts` are complete: from the next step on they decode, unless one token is all.

        Returns `lasts` and those.
        """
        for request in firsts:
            more = self._outputs[request] - 1
            if more:
                self._decodes += 1
                self._context += self._prompts[request] + 1
                heappush(self._ends, (self._step + more) * self._count + request)
            else:
                lasts = [*lasts, request]
        return lasts

    def _scheduled(self, steps: int) -> list[int]:
        """Count steps in which all decode. Returns the requests for which the last of them is their last."""
        self._step += steps
        self._context += steps * self._decodes
        ends, count = self._ends, self._count
        limit = (self._step + 1) * count
        if not ends or ends[0] >= limit:
            return NONE
        lasts: list[int] = []
        while ends and ends[0] < limit:
            request = heappop(ends) % count
            lasts.append(request)
            self._decodes -= 1
            self._context -= self._prompts[request] + self._outputs[request]
        return lasts

    def _launch(self, step: _Step, end: float, launched: float) -> None:
        """A step starts that will end at `end`; the CPU is busy with it until `launched`."""
        if self._pipelined:
            self._advance(max(launched, self._flight_end), step)
            self._returned, self._flight, self._flight_end = self._flight, step, end
        else:
            self._advance(end, step)
            self._returned = step

    def _await_flight(self) -> None:
        """Nothing can be scheduled until the step in flight returns."""
        self._advance(max(self._now, self._flight_end), None)
        self._returned, self._flight, self._flight_end = self._flight, None, -NEVER

    def _sleep(self) -> bool:
        """Nothing runs: go on to what comes next. False when nothing will ever come."""
        until = self._arrival if self._inbox else self._wake
        if until == NEVER:
            return False
        self._advance(max(self._now, until), None)
        return True

    def _decode(self) -> None:
        """Schedule decode steps: one, or all until a request has its last token scheduled or something arrives.

        The first of them lets an older step return at `first_return` (without async scheduling: it returns itself
        then), the next ones follow after gaps of max(floor, gap + j * growth).
        """
        decodes = self._decodes
        steps = self._ends[0] // self._count - self._step
        gpu_s = self._cost.decode(decodes, self._context)
        growth = self._cost.decode_growth(decodes)
        prepare = self._cost.prepare(decodes, 0)
        if self._pipelined:
            first_return = max(self._now + prepare, self._flight_end)
            gap, floor = gpu_s, prepare
            returns = self._flight
        else:
            first_return = self._now + (prepare + gpu_s)
            gap, floor = prepare + gpu_s + growth, 0.0
            returns = _Step(decodes, NONE, NONE)
        if (
            steps == 1
            or returns is None
            or (returns.lasts and self._waiting)  # a place becomes free
            or first_return >= min(self._wake, self._arrival)
        ):
            step = _Step(decodes, NONE, self._scheduled(1))
            self._launch(step, first_return + gpu_s if self._pipelined else first_return, first_return)
            return

        self._advance(first_return, None, 1)
        self._deliver(returns, first_return)
        event = min(self._wake, self._arrival)
        duration = 0.0  # from the first return to the last one
        if event <= first_return:  # the answer to what has just been delivered: nothing else for now
            steps = 1
        else:
            duration = ramp_sum(steps - 1, gap, growth, floor)
            if first_return + duration > event:
                steps = 1 + ramp_count(event - first_return, gap, growth, floor)
                duration = ramp_sum(steps - 1, gap, growth, floor)
            self._flight = None
            self._sample_decode(first_return, duration, gap, growth, floor)
            if steps > 2:  # the tokens of the last one are left to be delivered
                second = first_return + max(floor, gap)
                self._front_end.stream_steps(second, gap + growth, growth, floor, steps - 2, decodes)
                self._generated += (steps - 2) * decodes
        self._now = first_return + duration
        step = _Step(decodes, NONE, self._scheduled(steps))
        if self._pipelined:
            self._returned = _Step(decodes, NONE, NONE) if steps > 1 else None
            self._flight, self._flight_end = step, self._now + gpu_s + growth * (steps - 1)
        elif steps > 1:
            self._returned = step

    def _advance(self, until: float, newest: _Step | None, scheduled: int = 0) -> None:
        """Let time pass. `newest` and the step in flight hold their blocks; so do decodes `scheduled` steps on."""
        if self._next_sample < until:
            lasts = self._flight.lasts if self._flight is not None else NONE
            if newest is not None:
                lasts = lasts + newest.lasts
            while self._next_sample < until:
                self._sample(scheduled, lasts, self._generated)
        self._now = until

    def _sample_decode(self, first_return: float, duration: float, gap: float, growth: float, floor: float) -> None:
        """Scrapes between the returns of decode steps. At the first return the second step is scheduled."""
        while self._next_sample < first_return + duration:
            since = self._next_sample - first_return
            returned = max(0, ramp_count(since, gap, growth, floor) - 1)
            self._sample(2 + returned, NONE, self._generated + returned * self._decodes)

    def _sample(self, scheduled: int, lasts: list[int], generated: int) -> None:
        """A scrape `scheduled` decode steps on, while the last tokens of `lasts` are on their way."""
        part = self._done if self._rest else 0
        usage = self._blocks.usage(self._ends, self._step + scheduled, lasts, part)
        self._outcome.samples.append(
            (self._next_sample, self._running, len(self._waiting), usage, self._prompted, generated, 0)
        )
        self._next_sample += SAMPLE_EVERY_S

    def _close(self) -> Outcome:
        outcome, plan = self._outcome, self._plan
        last_token = np.array(self._last_token)
        never = np.isnan(last_token)
        _require_no_give_up(plan, last_token - np.array(outcome.sent), self._client)
        outcome.received = np.where(never, 0, self._outputs).tolist()
        outcome.ended = float(last_token[~never].max(initial=0.0))
        self._advance(max(self._now, outcome.ended, plan.workload.duration_s or 0.0), None)
        outcome.totals = totals(
            queue_time_s=self._queue_time,
            finished=self._finished,
            prompt_tokens=self._prompted,
            generation_tokens=self._generated,
            preemptions=0,
            prefix_queries=self._prompted if plan.config.enable_prefix_caching else 0,
            prefix_hits=0,
        )
        return outcome


def _sends_all(plan: Plan) -> bool:
    """Whether each request is sent when it is due, whatever happened to others."""
    return plan.workload.admission == Direct() and not isinstance(plan.workload.arrivals, ClosedLoop)


def require_plain(plan: Plan) -> None:
    """NeedsStepping for settings that the running sums cannot follow."""
    config = plan.config
    for unless, what in (
        (not (plan.workload.shared_prefix_tokens and config.enable_prefix_caching), "prefix cache hits"),
        (config.long_prefill_token_threshold == 0, "several prompts in parts at once"),
        (config.watermark == 0, "a watermark"),
        (not plan.eager, "launches in decode steps"),
        (plan.variant.gpu.per_context_token_s >= 0, "decode steps that get faster"),
    ):
        if not unless:
            raise NeedsStepping(what)


def _require_no_give_up(plan: Plan, service_s: NDArray[np.float64], client: Client | None) -> None:
    """NeedsStepping when a client gave up: the server would have aborted its request."""
    timeout = plan.workload.timeout_s
    if timeout is not None and ((service_s > timeout).any() or (client is not None and client.given_up)):
        raise NeedsStepping("aborts")


class _Blocks:
    """KV blocks by a bound: as long as all that run could hold their full length, none is ever preempted."""

    def __init__(self, plan: Plan, prompts: list[int], outputs: list[int]) -> None:
        self._size = plan.config.block_size
        self._usable = plan.config.num_blocks - 1
        self._held = 0
        self._lengths = [prompt + output - 1 for prompt, output in zip(prompts, outputs, strict=True)]
        longest = -(-max(self._lengths, default=0) // self._size)
        if longest > self._usable:
            raise NeedsStepping("a request that never fits")
        self.scarce = longest * min(plan.config.max_num_seqs, len(prompts)) > self._usable
        """Whether the bound can be exceeded at all: if not, nobody needs to count."""

    def reserve(self, request: int) -> None:
        """A request is admitted. NeedsStepping when blocks may run short."""
        self._held += -(-self._lengths[request] // self._size)
        if self._held > self._usable:
            raise NeedsStepping("fewer KV blocks than the running requests may need")

    def release(self, requests: list[int]) -> None:
        """Requests are finished."""
        self._held -= sum(-(-self._lengths[request] // self._size) for request in requests)

    def usage(self, ends: list[int], step: int, lasts: list[int], part: int) -> float:
        """Share of the blocks in use after `step` is scheduled.

        Args:
            ends: last step * number of requests + request, of those that decode.
            lasts: requests that have all their blocks.
            part: scheduled tokens of a prompt that is not complete.
        """
        size, lengths, count = self._size, self._lengths, len(self._lengths)
        used = -(-part // size)
        for end in ends:
            used += -(-(lengths[end % count] - (end // count - step)) // size)
        for request in lasts:
            used += -(-lengths[request] // size)
        return used / self._usable
