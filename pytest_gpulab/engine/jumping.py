"""The fast driver: O(1) work per step, and one closed-form jump over steps in which nothing but decoding happens.

It keeps the sums that the costs need instead of the scheduler's requests: while KV blocks suffice, a request that
decodes gets one token in every step, so its last step is known when its first token is scheduled. The result
equals that of `stepping` (a test proves it); what it cannot do is refused with `NeedsStepping`.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush
from itertools import chain

import numpy as np

from pytest_gpulab.engine.client import Client
from pytest_gpulab.engine.cost import GRAPH_TOKENS
from pytest_gpulab.engine.frontend import FrontEnd, ramp_sum
from pytest_gpulab.engine.outcome import SAMPLE_EVERY_S, Outcome, totals
from pytest_gpulab.engine.plan import Plan
from pytest_gpulab.experiment import ClosedLoop, Direct


class NeedsStepping(Exception):
    """The run needs what only the exact scheduler does: preemption, prefix hits, aborts."""


def ramp_count(total: float, first: float, slope: float, floor: float) -> int:
    """The smallest count whose `ramp_sum` reaches total > 0."""
    below = 0
    if first < floor:
        below = math.ceil(total / floor)
        if slope > 0.0:
            below = min(below, math.ceil((floor - first) / slope))
    count = below
    rest = total - below * floor
    if rest > 0.0:
        half = first + slope * (below - 0.5)
        count += math.ceil(2 * rest / (half + math.sqrt(half * half + 2 * slope * rest)))
    while ramp_sum(count, first, slope, floor) < total:
        count += 1
    while count > 1 and ramp_sum(count - 1, first, slope, floor) >= total:
        count -= 1
    return count


def run_jumping(plan: Plan) -> Outcome:  # noqa: C901 - the hot loop: calls would cost more than the work
    """Simulate the plan. NeedsStepping when it cannot be done exactly here."""
    _require_plain(plan)
    config, gpu, cpu = plan.config, plan.variant.gpu, plan.variant.cpu
    step_s, per_token, per_decode = gpu.step_s, gpu.per_token_s, gpu.per_decode_s
    per_context, per_context_mixed = gpu.per_context_token_s, gpu.per_context_token_mixed_s
    per_attended = gpu.per_attended_token_s
    prepare_s, per_sequence, per_prefill = cpu.step_s, cpu.per_sequence_s, cpu.per_prefill_s
    launch_small, launch_large = cpu.launch_small_s, cpu.launch_large_s
    pipelined = config.async_scheduling
    max_seqs, max_tokens = config.max_num_seqs, config.max_num_batched_tokens

    prompts: list[int] = plan.schedule["prompt_tokens"].tolist()
    outputs: list[int] = plan.schedule["output_tokens"].tolist()
    count = len(prompts)
    due = plan.scheduled()
    client = None if _sends_all(plan) else Client(plan.workload, due)
    outcome = Outcome.empty(due, due if client is None else client.sent)
    first_token, last_token = outcome.first_token, outcome.last_token
    front_end = FrontEnd(plan.variant.front_end)
    blocks = _Blocks(plan, prompts, outputs)

    never = math.inf
    now = 0.0  # the CPU is free
    next_sample = 0.0
    sent = 0  # requests sent so far, when the client sends all
    wake = client.next_at if client else (due[0] if due else never)  # when the client does something
    arrival = never  # when the first of the inbox reaches the engine
    inbox = front_end.inbox
    waiting: deque[tuple[float, int]] = deque()  # (when added, request)
    queue_time = 0.0
    running = 0  # requests that hold a place, those included whose last step is in flight
    decodes = context = 0  # sequences that decode in the next step, and the tokens they will read
    ends: list[int] = []  # heap of last step * count + request
    rest = done = partial = 0  # a prompt of which only a part has been scheduled
    step = 0  # steps scheduled
    tokens = 0  # of the step that returned at `now`, with the requests whose first or last token it brought
    firsts: list[int] = []
    lasts: list[int] = []
    gpu_end = -never  # of the step in flight, with its tokens
    flight_tokens = 0
    flight_firsts: list[int] = []
    flight_lasts: list[int] = []
    none: list[int] = []
    generated = prompted = finished = 0
    steps = 1  # of the last jump; its first step returned at `returned`, the next ones after the gaps of `ramp_sum`
    returned = first = slope = floor = 0.0

    while True:
        while next_sample < now:
            since = next_sample - returned
            ahead = steps - 1 - (0 if steps == 1 or since < 0 else max(1, ramp_count(since, first, slope, floor)))
            outcome.samples.append(
                (
                    next_sample,
                    running,
                    len(waiting),
                    blocks.usage(ahead, ends, step, (lasts, flight_lasts), done if rest else 0),
                    prompted,
                    generated - ahead * tokens,
                    0,
                )
            )
            next_sample += SAMPLE_EVERY_S

        if wake <= now:
            if client is None:
                while wake <= now:
                    front_end.take_in(wake, prompts[sent], sent)
                    sent += 1
                    wake = due[sent] if sent < count else never
            else:
                for request in client.act(now):
                    front_end.take_in(client.sent[request], prompts[request], request)
                wake = client.next_at
            if inbox:
                arrival = inbox[0][0]

        if tokens:
            received = front_end.stream(now, tokens)
            generated += tokens
            tokens = 0
            for request in firsts:
                first_token[request] = received
                prompted += prompts[request]
            if lasts:
                running -= len(lasts)
                finished += len(lasts)
                for request in lasts:
                    last_token[request] = received
                if blocks.scarce:
                    blocks.release(lasts)
                if client:
                    for request in lasts:
                        client.answered(request, received)
                    wake = client.next_at
                lasts = none

        while arrival <= now:
            waiting.append((now, inbox.popleft()[1]))
            arrival = inbox[0][0] if inbox else never

        if rest or (waiting and running < max_seqs):  # a step with prefill
            budget = max_tokens - decodes
            new_firsts: list[int] = []
            prefill_tokens = 0
            attended = 0.0
            prefills = 0
            if rest:
                chunk = rest if rest < budget else budget
                attended = chunk * (done + chunk / 2)
                prefill_tokens = chunk
                budget -= chunk
                rest -= chunk
                done += chunk
                prefills += 1
                if not rest:
                    new_firsts.append(partial)
            while budget and waiting and running < max_seqs:
                added, request = waiting.popleft()
                queue_time += now - added
                running += 1
                prefills += 1
                if blocks.scarce:
                    blocks.reserve(request)
                chunk = prompts[request]
                if chunk > budget:
                    rest = chunk - budget
                    done = chunk = budget
                    partial = request
                else:
                    new_firsts.append(request)
                attended += chunk * (chunk / 2)
                prefill_tokens += chunk
                budget -= chunk
            prepared = now + prepare_s + per_sequence * decodes + per_prefill * prefills
            gpu_s = (
                max(step_s, per_token * (decodes + prefill_tokens))
                + per_decode * decodes
                + per_context_mixed * context
                + per_attended * attended
            )
            launched = prepared + (launch_large if decodes + prefill_tokens > GRAPH_TOKENS else launch_small)
            new_tokens = decodes + len(new_firsts)
            steps = 1
            step += 1
            context += decodes
            new_lasts: list[int] = []
            while ends and ends[0] < (step + 1) * count:
                request = heappop(ends) % count
                new_lasts.append(request)
                decodes -= 1
                context -= prompts[request] + outputs[request]
            for request in new_firsts:
                if outputs[request] == 1:
                    new_lasts.append(request)
                else:
                    decodes += 1
                    context += prompts[request] + 1
                    heappush(ends, (step + outputs[request] - 1) * count + request)
            start = prepared if prepared > gpu_end else gpu_end
            new_end = start + gpu_s
            if new_end < launched:
                new_end = launched
            if not pipelined:
                gpu_end = -never
                now = new_end
                tokens, firsts, lasts = new_tokens, new_firsts, new_lasts
                continue
            now = launched if launched > gpu_end else gpu_end
            gpu_end = new_end
            tokens, firsts, lasts = flight_tokens, flight_firsts, flight_lasts
            flight_tokens, flight_firsts, flight_lasts = new_tokens, new_firsts, new_lasts

        elif decodes:
            steps = ends[0] // count - step  # until one of the requests has its last token scheduled
            prepare = prepare_s + per_sequence * decodes
            gpu_s = max(step_s, per_token * decodes) + per_decode * decodes + per_context * context
            slope = per_context * decodes
            event = wake if wake < arrival else arrival
            plain = True  # the step in flight brings these sequences' tokens and nothing else
            if not pipelined:
                returned = now + (prepare + gpu_s)
                first, floor = prepare + gpu_s + slope, 0.0
            else:
                returned = now + prepare
                if returned < gpu_end:
                    returned = gpu_end
                first, floor = gpu_s, prepare
                plain = not (flight_firsts or flight_lasts) and flight_tokens > 0
            duration = 0.0  # from the return of the first step of the jump to that of the last
            if plain and steps > 1 and returned < event:
                last = first + slope * (steps - 2)
                if first >= floor:
                    duration = (steps - 1) * 0.5 * (first + last)
                elif last <= floor:
                    duration = (steps - 1) * floor
                else:
                    duration = ramp_sum(steps - 1, first, slope, floor)
                if returned + duration > event:
                    steps = 1 + ramp_count(event - returned, first, slope, floor)
                    duration = ramp_sum(steps - 1, first, slope, floor)
                front_end.stream_steps(returned, first, slope, floor, steps - 1, decodes)
                generated += (steps - 1) * decodes
            else:
                steps = 1
            now = returned + duration
            step += steps
            context += steps * decodes
            new_tokens = decodes
            new_lasts = none
            if ends[0] < (step + 1) * count:
                new_lasts = []
                while ends and ends[0] < (step + 1) * count:
                    request = heappop(ends) % count
                    new_lasts.append(request)
                    decodes -= 1
                    context -= prompts[request] + outputs[request]
            if pipelined:
                gpu_end = now + gpu_s + slope * (steps - 1)
                if plain:
                    tokens, firsts, lasts = new_tokens, none, none
                else:
                    tokens, firsts, lasts = flight_tokens, flight_firsts, flight_lasts
                flight_tokens, flight_firsts, flight_lasts = new_tokens, none, new_lasts
            else:
                tokens, firsts, lasts = new_tokens, none, new_lasts

        elif gpu_end > -never:  # nothing to schedule until the step in flight returns
            steps = 1
            now = max(now, gpu_end)
            gpu_end = -never
            tokens, firsts, lasts = flight_tokens, flight_firsts, flight_lasts
            flight_tokens, flight_firsts, flight_lasts = 0, none, none

        else:
            idle_until = arrival if inbox else wake
            if idle_until == never:
                break
            steps = 1
            now = max(now, idle_until)

    outcome.received = [
        tokens if at == at else 0 for tokens, at in zip(outputs, last_token, strict=True)
    ]  # all or nothing: NaN is not equal to itself
    outcome.ended = max((at for at in last_token if at == at), default=0.0)
    _require_no_give_up(plan, outcome, client)
    end = max(outcome.ended, plan.workload.duration_s or 0.0)
    while next_sample < end:
        outcome.samples.append((next_sample, 0, 0, 0.0, prompted, generated, 0))
        next_sample += SAMPLE_EVERY_S
    outcome.totals = totals(
        queue_time_s=queue_time,
        finished=finished,
        prompt_tokens=prompted,
        generation_tokens=generated,
        preemptions=0,
        prefix_queries=prompted if config.enable_prefix_caching else 0,
        prefix_hits=0,
    )
    return outcome


def _sends_all(plan: Plan) -> bool:
    """Whether each request is sent when it is due, whatever happened to others."""
    return plan.workload.admission == Direct() and not isinstance(plan.workload.arrivals, ClosedLoop)


def _require_plain(plan: Plan) -> None:
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


def _require_no_give_up(plan: Plan, outcome: Outcome, client: Client | None) -> None:
    """NeedsStepping when a client gave up: the server would have aborted its request."""
    timeout = plan.workload.timeout_s
    if timeout is None:
        return
    late = np.asarray(outcome.last_token) - np.asarray(outcome.sent) > timeout
    if late.any() or (client and client.given_up):
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

    def usage(self, ahead: int, ends: list[int], step: int, lasts: tuple[list[int], ...], part: int) -> float:
        """Share of the blocks in use `ahead` steps before `step`.

        Args:
            ends: last step * number of requests + request, of those that decode.
            lasts: requests whose last step is in flight.
            part: scheduled tokens of a prompt that is not complete.
        """
        size, lengths, count = self._size, self._lengths, len(self._lengths)
        used = -(-part // size)
        for end in ends:
            used += -(-(lengths[end % count] - (end // count - step) - ahead) // size)
        for request in chain.from_iterable(lasts):
            used += -(-(lengths[request] - ahead) // size)
        return used / self._usable
