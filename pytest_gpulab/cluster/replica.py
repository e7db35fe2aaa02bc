"""One model server of a fleet: vLLM's engine that is fed while time passes.

The same machine as `engine.jumping`, with two differences: requests are submitted as a router sends them, and time
passes in pieces (`advance`). A fleet of one that is warm gives what `engine.simulate` gives; a test proves it. It is
one long function because an hour of a fleet is hundreds of thousands of steps: calls would cost more than the work.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, Final

from pytest_gpulab.engine.cost import StepCost
from pytest_gpulab.engine.frontend import EARLY_SHARE, INTAKE_TURNS, SLICE
from pytest_gpulab.engine.jumping import NeedsStepping, require_plain
from pytest_gpulab.engine.plan import Plan
from pytest_gpulab.engine.ramp import ramp_count, ramp_sum

NEVER: Final = math.inf
_NONE: Final[list[int]] = []
"""No requests. Nobody appends to it."""

Sample = tuple[int, int, float, int, int]
"""Running, waiting, KV cache in tokens (a block is half full on average), prompt and generated tokens so far."""


class Ledger:
    """The requests of a run, and what its replicas write down: seconds from the run's start, NaN for never."""

    def __init__(self, plan: Plan) -> None:
        self.prompts: list[int] = plan.schedule["prompt_tokens"].tolist()
        self.outputs: list[int] = plan.schedule["output_tokens"].tolist()
        self.longest = int((plan.schedule["prompt_tokens"] + plan.schedule["output_tokens"]).max(initial=1)) - 1
        """Tokens that hold KV at the end of the longest request."""
        self.first_token = [math.nan] * len(self.prompts)
        self.last_token = [math.nan] * len(self.prompts)


class Replica:
    """A server that is up from `start` on. Requests are indices into the plan's schedule; times are run seconds.

    NeedsStepping for settings that only the step-exact scheduler follows, and when KV blocks may run short.
    """

    def __init__(
        self, plan: Plan, ledger: Ledger, start: float, sample_every: float = 1.0, *, report: bool = False
    ) -> None:
        _require_plain(plan)
        self._plan = plan
        self._ledger = ledger
        self._prompts, self._outputs = ledger.prompts, ledger.outputs
        self._count = len(self._prompts)
        self._report = report
        self.completed: list[tuple[float, int]] = []
        """(when the client has the last token, request), in order of the engine, for callers that asked for a
        `report`: time then never passes far beyond an answer. The caller clears it."""
        self.samples: list[Sample] = []
        """One a `sample_every`, the first at the first whole multiple at or after the start."""
        self.first_sample = math.ceil(start / sample_every)
        self._sample_every = sample_every
        self._size = plan.config.block_size
        self._usable = plan.config.num_blocks - 1
        self._scarce = -(-ledger.longest // self._size) * min(plan.config.max_num_seqs, self._count) > self._usable
        self._held = 0
        self._submitted: list[int] = []
        self._due: list[float] = []  # when submitted requests reach the server, with the requests
        self._due_requests: list[int] = []
        self._inbox: deque[Any] = deque()
        self._waiting: deque[tuple[float, int]] = deque()
        self._ends: list[int] = []
        self.queue_time = 0.0
        self._cost = StepCost(plan.variant, plan.config.graph_tokens, plan.eager)
        # The front end: free, turn, streamed, turn length, intake free.
        gpu, cpu = plan.variant.gpu, plan.variant.cpu
        most = range(plan.config.max_num_seqs + 1)
        self._decode_s = [max(gpu.step_s, gpu.per_token_s * n) + gpu.per_decode_s * n for n in most]
        self._prepare_s = [cpu.step_s + cpu.per_sequence_s * n for n in most]
        self._front: tuple[float, float, int, float, float] = (start, start - 1.0, 0, 0.0, start)
        # The scheduler: now, next sample, step, running, decodes, context, rest, done, partial, prompted, generated.
        self._core = (start, self.first_sample * sample_every, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        # Steps on their way: (tokens, firsts, lasts) that returned at now; the one in flight, and its end.
        self._returned: tuple[int, list[int], list[int]] | None = None
        self._flight: tuple[int, list[int], list[int]] | None = None
        self._flight_end = -NEVER

    @property
    def running(self) -> int:
        """``num_requests_running`` where time stands."""
        return self._core[3]

    @property
    def waiting(self) -> int:
        """``num_requests_waiting``."""
        return len(self._waiting)

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt and generated tokens so far."""
        return self._core[9], self._core[10]

    def submit(self, at: float, request: int) -> None:
        """A client sends a request at `at`, in order of time and not before the last `advance`."""
        self._due.append(at)
        self._due_requests.append(request)
        self._submitted.append(request)

    def submit_all(self, times: Sequence[float], requests: Sequence[int]) -> None:
        """The same for many."""
        self._due.extend(times)
        self._due_requests.extend(requests)
        self._submitted.extend(requests)

    @property
    def busy(self) -> bool:
        """Whether a request is not finished."""
        return bool(self._core[3] or self._waiting or self._inbox or self._due)

    @property
    def earliest_answer(self) -> float:
        """No request that has been submitted can be finished before; more requests only slow those down."""
        now, step, decodes, context = self._core[0], self._core[2], self._core[4], self._core[5]
        if (self._returned and self._returned[2]) or (self._flight and self._flight[2]):
            return now
        if not self._ends or self._waiting or self._inbox or self._due or self._core[6]:
            working = self._returned or self._flight or self._ends or self._waiting
            coming = self._inbox[0][0] if self._inbox else self._due[0] if self._due else NEVER
            return now if working else max(now, coming)
        steps = self._ends[0] // self._count - step
        return now + max(0, steps - 1) * self._cost.decode(decodes, context)

    def kill(self, at: float) -> list[int]:
        """The server ends; returns the requests whose answers never come."""
        self.advance(at)
        last_token = self._ledger.last_token
        lost = [request for request in self._submitted if not last_token[request] <= at]
        for request in lost:
            last_token[request] = math.nan
        self.completed = [entry for entry in self.completed if entry[0] <= at]
        self._submitted.clear()
        return lost

    def advance(self, until: float) -> None:  # noqa: C901 - see the module's first lines
        """Let time pass: all that happens up to `until` (finite) has happened."""
        plan, ends, waiting, inbox, due = self._plan, self._ends, self._waiting, self._inbox, self._due
        config, gpu, cpu, fe = plan.config, plan.variant.gpu, plan.variant.cpu, plan.variant.front_end
        prompts, outputs, count, scarce = self._prompts, self._outputs, self._count, self._scarce
        first_token, last_token = self._ledger.first_token, self._ledger.last_token
        completed, samples, every = self.completed, self.samples, self._sample_every
        report, added_up = self._report, 0.0
        pipelined, max_seqs, max_tokens = config.async_scheduling, config.max_num_seqs, config.max_num_batched_tokens
        step_s, per_token, per_decode = gpu.step_s, gpu.per_token_s, gpu.per_decode_s
        decode_s, prepare_of = self._decode_s, self._prepare_s
        per_context, per_mixed, per_attended = (
            gpu.per_context_token_s,
            gpu.per_context_token_mixed_s,
            gpu.per_attended_token_s,
        )
        per_prefill = cpu.per_prefill_s
        launch_small, launch_large, graph_tokens = cpu.launch_small_s, cpu.launch_large_s, config.graph_tokens
        request_s, prompt_s, token_s, chunk_s = (
            fe.per_request_s,
            fe.per_prompt_token_s,
            fe.per_output_token_s,
            fe.per_chunk_s,
        )
        latency_s, prompt_latency_s = fe.latency_s, fe.prompt_token_latency_s
        stream_s, half_block = token_s + chunk_s, (self._size - 1) / 2
        free_at, turn_at, streamed, turn_s, intake_free = self._front
        now, next_sample, step, running, decodes, context, rest, done, partial, prompted, generated = self._core
        returned, flight, flight_end = self._returned, self._flight, self._flight_end
        due_requests, taken, submitted = self._due_requests, 0, len(due)
        wake = due[0] if due else NEVER
        arrival = inbox[0][0] if inbox else NEVER

        while now <= until:
            while wake <= now:  # requests reach the front end (FrontEnd.take_in)
                sent, request = wake, due_requests[taken]
                taken += 1
                wake = due[taken] if taken < submitted else NEVER
                work = request_s + prompt_s * prompts[request]
                start = sent if sent > intake_free else intake_free
                intake_free = start + work
                latest = intake_free + prompt_latency_s * prompts[request]
                if free_at > start:
                    latest += min(free_at - start, INTAKE_TURNS * turn_s)
                    free_at += work
                else:
                    free_at = intake_free
                if turn_at > sent:
                    turn_at += work
                if inbox:
                    for other in reversed(inbox):
                        if other[0] <= sent:
                            break
                        other[0] += EARLY_SHARE * work
                    if inbox[-1][0] > latest:
                        latest = inbox[-1][0]
                inbox.append([latest, request])
                arrival = inbox[0][0]

            if returned is not None:  # a step's tokens leave (FrontEnd.stream)
                tokens, firsts, lasts = returned
                returned = None
                if now <= turn_at and tokens <= SLICE and streamed <= SLICE:
                    more = tokens - streamed if tokens > streamed else 0
                    streamed += more
                    free_at += token_s * tokens + chunk_s * more
                else:
                    turn_at = free_at if free_at > now else now
                    streamed = tokens
                    turn_s = stream_s * tokens
                    free_at = turn_at + turn_s
                    if tokens > SLICE:
                        turn_s *= SLICE / tokens
                generated += tokens
                if firsts or lasts:
                    received = free_at - chunk_s * (streamed - 1) / 2 + latency_s
                    for request in firsts:
                        first_token[request] = received
                        prompted += prompts[request]
                    for request in lasts:
                        last_token[request] = received
                        running -= 1
                        if report:
                            completed.append((received, request))
                        if scarce:
                            self._held -= -(-(prompts[request] + outputs[request] - 1) // self._size)

            while arrival <= now:
                waiting.append((now, inbox.popleft()[1]))
                arrival = inbox[0][0] if inbox else NEVER

            if rest or (waiting and running < max_seqs):  # schedule a step with prefill
                budget = max_tokens - decodes
                firsts = []
                prefills = prefill_tokens = 0
                attended = 0.0
                if rest:
                    chunk = rest if rest < budget else budget
                    attended = chunk * (done + chunk / 2)
                    prefills, prefill_tokens = 1, chunk
                    budget -= chunk
                    rest -= chunk
                    done += chunk
                    if not rest:
                        firsts.append(partial)
                while budget and waiting and running < max_seqs:
                    added, request = waiting.popleft()
                    added_up += now - added
                    running += 1
                    if scarce:
                        self._held += -(-(prompts[request] + outputs[request] - 1) // self._size)
                        if self._held > self._usable:
                            raise NeedsStepping(
                                "a fleet cannot simulate preemption, and what runs may need more KV blocks than "
                                "there are; lower max_num_seqs, the rate or the lengths"
                            )
                    chunk = prompts[request]
                    if chunk > budget:
                        rest = chunk - budget
                        done = chunk = budget
                        partial = request
                    else:
                        firsts.append(request)
                    attended += chunk * (chunk / 2)
                    prefills += 1
                    prefill_tokens += chunk
                    budget -= chunk
                all_tokens = decodes + prefill_tokens
                gpu_s = per_token * all_tokens
                if gpu_s < step_s:
                    gpu_s = step_s
                gpu_s += per_decode * decodes + per_mixed * context + per_attended * attended
                prepared = now + (prepare_of[decodes] + per_prefill * prefills)
                launched = prepared + (launch_large if all_tokens > graph_tokens else launch_small)
                tokens = decodes + len(firsts)
                step += 1
                context += decodes
                lasts = _NONE
                while ends and ends[0] < (step + 1) * count:
                    request = heappop(ends) % count
                    lasts = [*lasts, request]
                    decodes -= 1
                    context -= prompts[request] + outputs[request]
                for request in firsts:
                    if outputs[request] > 1:
                        decodes += 1
                        context += prompts[request] + 1
                        heappush(ends, (step + outputs[request] - 1) * count + request)
                    else:
                        lasts = [*lasts, request]
                end = (prepared if prepared > flight_end else flight_end) + gpu_s
                if end < launched:
                    end = launched
                if pipelined:
                    until_now = launched if launched > flight_end else flight_end
                    returned, flight, flight_end = flight, (tokens, firsts, lasts), end
                else:
                    until_now = end
                    returned = (tokens, firsts, lasts)

            elif decodes:  # schedule decode steps until a request's last one, or until something comes
                steps = ends[0] // count - step
                gpu_s = decode_s[decodes] + per_context * context
                growth = per_context * decodes
                prepare = prepare_of[decodes]
                if pipelined:
                    first_return = now + prepare
                    if first_return < flight_end:
                        first_return = flight_end
                    gap, floor = gpu_s, prepare
                    first = flight
                else:
                    first_return = now + (prepare + gpu_s)
                    gap, floor = prepare + gpu_s + growth, 0.0
                    first = (decodes, _NONE, _NONE)
                event = wake if wake < arrival else arrival
                if until < event:
                    event = until
                duration = 0.0
                if (
                    steps == 1
                    or first is None
                    or first_return >= event
                    or (first[2] and (waiting or report))  # a place becomes free
                ):
                    steps = 1
                    returned = first
                else:
                    while next_sample < first_return:
                        samples.append(
                            (
                                running,
                                len(waiting),
                                context + half_block * decodes + (done if rest else 0),
                                prompted,
                                generated,
                            )
                        )
                        next_sample += every
                    more_steps = steps - 1
                    if gap >= floor:
                        duration = more_steps * (gap + growth * (more_steps - 1) * 0.5)
                        if first_return + duration > event:
                            half = gap - growth * 0.5
                            total = event - first_return
                            root = math.sqrt(half * half + 2.0 * growth * total)
                            more_steps = math.ceil(2.0 * total / (half + root))
                            duration = more_steps * (gap + growth * (more_steps - 1) * 0.5)
                        before_last = gap + growth * (more_steps - 1)
                    else:
                        duration = ramp_sum(more_steps, gap, growth, floor)
                        if first_return + duration > event:
                            more_steps = ramp_count(event - first_return, gap, growth, floor)
                            duration = ramp_sum(more_steps, gap, growth, floor)
                        before_last = max(floor, gap + growth * (more_steps - 1))
                    steps = more_steps + 1
                    # The first step returns (FrontEnd.stream).
                    tokens, firsts, lasts = first
                    if first_return <= turn_at and tokens <= SLICE and streamed <= SLICE:
                        more = tokens - streamed if tokens > streamed else 0
                        streamed += more
                        free_at += token_s * tokens + chunk_s * more
                    else:
                        turn_at = free_at if free_at > first_return else first_return
                        streamed = tokens
                        turn_s = stream_s * tokens
                        free_at = turn_at + turn_s
                        if tokens > SLICE:
                            turn_s *= SLICE / tokens
                    if firsts or lasts:
                        received = free_at - chunk_s * (streamed - 1) / 2 + latency_s
                        for request in firsts:
                            first_token[request] = received
                            prompted += prompts[request]
                        for request in lasts:
                            last_token[request] = received
                            running -= 1
                            if scarce:
                                self._held -= -(-(prompts[request] + outputs[request] - 1) // self._size)
                    # So do all but the last (FrontEnd.stream_steps); while the front end keeps up, the newest counts.
                    ready, streams, work = first_return, more_steps - 1, stream_s * decodes
                    while streams:
                        ahead = gap + growth * (more_steps - 1 - streams)
                        if ahead < floor:
                            ahead = floor
                        ready += ahead
                        if free_at <= ready and work <= ahead and decodes <= SLICE:
                            turn_at = first_return + duration - before_last
                            streamed, turn_s, free_at = decodes, work, turn_at + work
                            break
                        if ready <= turn_at and decodes <= SLICE and streamed <= SLICE:
                            more = decodes - streamed if decodes > streamed else 0
                            streamed += more
                            free_at += token_s * decodes + chunk_s * more
                        else:
                            turn_at = free_at if free_at > ready else ready
                            streamed = decodes
                            turn_s = work if decodes <= SLICE else work * SLICE / decodes
                            free_at = turn_at + work
                        streams -= 1
                    generated += first[0] + (more_steps - 1) * decodes
                    returned = (decodes, _NONE, _NONE)
                until_now = first_return + duration
                while next_sample < until_now:
                    held = context + half_block * decodes + (done if rest else 0)
                    held += decodes * steps * (next_sample - now) / (until_now - now)
                    samples.append((running, len(waiting), held, prompted, generated))
                    next_sample += every
                step += steps
                context += steps * decodes
                tokens = decodes
                lasts = _NONE
                limit = (step + 1) * count
                while ends and ends[0] < limit:
                    request = heappop(ends) % count
                    lasts = [*lasts, request]
                    decodes -= 1
                    context -= prompts[request] + outputs[request]
                if pipelined:
                    flight, flight_end = (tokens, _NONE, lasts), until_now + gpu_s + growth * (steps - 1)
                else:
                    returned = (tokens, _NONE, lasts)
                now = until_now
                continue

            elif flight is not None:  # nothing to schedule until the step in flight returns
                until_now = flight_end if flight_end > now else now
                returned, flight, flight_end = flight, None, -NEVER

            else:
                until_now = arrival if inbox else wake
                if until_now > until:
                    break
                if until_now < now:
                    until_now = now

            while next_sample < until_now:
                samples.append(
                    (
                        running,
                        len(waiting),
                        context + half_block * decodes + (done if rest else 0),
                        prompted,
                        generated,
                    )
                )
                next_sample += every
            now = until_now

        if now <= until and flight is None and returned is None and not decodes:
            # Idle: stay where the last step ended, and fill in the scrapes.
            while next_sample <= until:
                samples.append((running, len(waiting), 0.0, prompted, generated))
                next_sample += every
        del due[:taken], due_requests[:taken]
        self.queue_time += added_up
        self._front = (free_at, turn_at, streamed, turn_s, intake_free)
        self._core = (now, next_sample, step, running, decodes, context, rest, done, partial, prompted, generated)
        self._returned, self._flight, self._flight_end = returned, flight, flight_end


def _require_plain(plan: Plan) -> None:
    """NeedsStepping for settings that running sums cannot follow."""
    try:
        require_plain(plan)
    except NeedsStepping as refusal:
        raise NeedsStepping(f"a fleet cannot simulate {refusal}; leave that setting at its default") from None
