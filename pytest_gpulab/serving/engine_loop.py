"""The engine against the clock: the exact scheduler, stepped when the cost model says that a step ends.

Events are those of the virtual-time driver (`engine.stepping`), with requests that come from outside. Everything is
computed in model time and slept to, so a late wake-up delays nothing but itself: what the engine decides depends on
when requests arrived, not on when this process was scheduled.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field
from itertools import count

from pytest_gpulab.engine.blocks import token_hashes
from pytest_gpulab.engine.calibration import Variant
from pytest_gpulab.engine.core import EngineCore
from pytest_gpulab.engine.cost import StepCost
from pytest_gpulab.engine.frontend import FrontEnd
from pytest_gpulab.engine.scheduler import Request, SchedulerConfig
from pytest_gpulab.serving.clock import ModelClock
from pytest_gpulab.serving.metrics import Finished, Metrics, State
from pytest_gpulab.serving.protocol import Job


@dataclass(eq=False, slots=True)
class Answer:
    """A job in the engine. Times are model seconds, NaN for what has not happened."""

    number: int
    job: Job
    arrived: float
    delivered: int = 0
    """Tokens that the client may have."""
    failure: str | None = None
    """Why there will be no more tokens."""
    aborted: bool = False
    cached_tokens: int = 0
    queued: float = math.nan
    scheduled: float = math.nan
    first_token: float = math.nan
    last_token: float = math.nan
    _reader: asyncio.Future[None] | None = field(default=None, repr=False)

    @property
    def done(self) -> bool:
        """Whether all tokens are delivered."""
        return self.delivered >= self.job.max_tokens

    async def more(self, seen: int) -> int:
        """Wait until more than `seen` tokens are delivered, or none will be; how many there are.

        A slow reader finds several new ones, as in vLLM.
        """
        if self.delivered == seen and self.failure is None and not self.done:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self.delivered

    def wake(self) -> None:
        """Let the reader look again."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class EngineLoop:
    """Answers jobs while `run` runs."""

    def __init__(
        self, config: SchedulerConfig, variant: Variant, clock: ModelClock, metrics: Metrics, *, eager: bool = False
    ) -> None:
        self.clock = clock
        self.metrics = metrics
        self.dead = False
        """Whether `run` has ended: nothing is answered any more."""
        self.clients = 0
        """Requests over HTTP that are not answered completely."""
        self.lag_s = 0.0
        """By how many model seconds tokens were delivered late, at worst: the emulation could not keep up."""
        self._core = EngineCore(config, StepCost(variant, config.graph_tokens, eager))
        self._front_end = FrontEnd(variant.front_end)
        self._latency = variant.front_end.latency_s
        self._numbers = count()
        self._answers: dict[int, Answer] = {}
        self._arrivals: deque[int] = deque()
        self._aborts: list[int] = []
        self._wake = asyncio.Event()

    def submit(self, job: Job, arrived: float) -> Answer:
        """Start to answer a job that arrived at model time `arrived`, not before an earlier one did."""
        number = next(self._numbers)
        if self._arrivals:
            arrived = max(arrived, self._answers[self._arrivals[-1]].arrived)
        answer = Answer(number, job, arrived)
        if self.dead:
            answer.failure = "the engine has stopped"
        else:
            self._answers[number] = answer
            self._arrivals.append(number)
            self._wake.set()
        return answer

    def abort(self, answer: Answer) -> None:
        """The client is gone: drop the job before the next step. Nothing happens when it is done."""
        if not answer.done and not answer.aborted:
            answer.aborted = True
            self._aborts.append(answer.number)

    def state(self) -> State:
        """The scheduler now."""
        scheduler = self._core.scheduler
        return State(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=scheduler.kv_usage,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            lag_s=self.lag_s,
        )

    async def run(self) -> None:
        """Step for ever. However it ends, readers learn that."""
        try:
            while True:
                await self._turn()
        finally:
            self.dead = True
            for answer in self._answers.values():
                answer.failure = "the engine has stopped"
                answer.wake()

    async def _turn(self) -> None:
        """One step, or the wait for a request."""
        core, inbox = self._core, self._front_end.inbox
        await self.clock.until(core.now)
        self._take_in(core.now)
        self._drop_aborted()
        if not core.busy:
            if not inbox:
                await self._next_arrival()
                return
            core.now = max(core.now, inbox[0][0])
            await self.clock.until(core.now)
            self._take_in(core.now)
        self._add_arrived()
        if not core.busy:  # refused or aborted before it came, or later than it seemed
            return
        if not core.must_wait:
            self._launch()
        if core.must_wait:
            returns_at = core.returns_at()
            await self.clock.until(returns_at)
            self._take_in(returns_at)
            samples, _ = core.collect()
            self._deliver(samples)

    async def _next_arrival(self) -> None:
        if not self._arrivals:
            self._wake.clear()
            await self._wake.wait()
        self._take_in(self._answers[self._arrivals[0]].arrived)

    def _take_in(self, until: float) -> None:
        """Hand what has arrived up to model time `until` to the front end."""
        arrivals, answers = self._arrivals, self._answers
        while arrivals and (answer := answers[arrivals[0]]).arrived <= until:
            self._front_end.take_in(answer.arrived, len(answer.job.content), arrivals.popleft())

    def _drop_aborted(self) -> None:
        """What the front end still holds is left out when it comes."""
        for number in self._aborts:
            if self._core.scheduler.abort(str(number)):
                del self._answers[number]
        self._aborts.clear()

    def _add_arrived(self) -> None:
        """Give the scheduler what has come from the front end."""
        core, inbox = self._core, self._front_end.inbox
        while inbox and inbox[0][0] <= core.now:
            number = inbox.popleft()[1]
            answer = self._answers[number]
            if answer.aborted:
                del self._answers[number]
            else:
                self._add(number, answer)

    def _add(self, number: int, answer: Answer) -> None:
        content = answer.job.content
        hashes = token_hashes(content, self._core.scheduler.config.block_size)
        try:
            self._core.scheduler.add(Request(str(number), len(content), answer.job.max_tokens, hashes))
        except ValueError as error:
            answer.failure = str(error)
            answer.wake()
            del self._answers[number]
        else:
            answer.queued = self._core.now

    def _launch(self) -> None:
        now = self._core.now
        for request in self._core.launch().admitted:
            answer = self._answers[int(request.id)]
            if request.preemptions == 0:
                answer.scheduled = now
                answer.cached_tokens = request.cached_tokens

    def _deliver(self, samples: list[Request]) -> None:
        """A step has returned: its tokens reach the clients when the front end has streamed them."""
        if not samples:
            return
        received = self._front_end.stream(self._core.now, len(samples))
        answers = [self._answers[int(request.id)] for request in samples]
        for request in samples:
            if request.finished:
                del self._answers[int(request.id)]
        real = self.clock.real(received)
        asyncio.get_running_loop().call_at(real, self._receive, answers, self._core.now, received)

    def _receive(self, answers: list[Answer], returned: float, received: float) -> None:
        """The clients get one token each of the step that returned at `returned`."""
        self.lag_s = max(self.lag_s, self.clock.now() - received)
        handled = received - self._latency
        prompt_tokens = tokens = 0
        for answer in answers:
            if answer.aborted:
                continue
            tokens += 1
            if answer.delivered == 0:
                prompt_tokens += len(answer.job.content)
            self._count(answer, returned, handled)
            answer.wake()
        self.metrics.step(prompt_tokens, tokens)

    def _count(self, answer: Answer, returned: float, handled: float) -> None:
        """One more token, and what the metrics say of it."""
        answer.delivered += 1
        prompt = len(answer.job.content)
        if answer.delivered == 1:
            answer.first_token = returned
            self.metrics.first_token(prompt, answer.cached_tokens, handled - answer.arrived)
        else:
            self.metrics.next_token(returned - answer.last_token)
        answer.last_token = returned
        if answer.done:
            self.metrics.finish(
                Finished(
                    reason=answer.job.finish_reason,
                    prompt_tokens=prompt,
                    cached_tokens=answer.cached_tokens,
                    output_tokens=answer.delivered,
                    asked_tokens=answer.job.asked_tokens,
                    arrived=answer.arrived,
                    queued=answer.queued,
                    scheduled=answer.scheduled,
                    first_token=answer.first_token,
                    last_token=answer.last_token,
                    handled=handled,
                )
            )
