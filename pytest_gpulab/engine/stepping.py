"""The driver that takes every step on the exact scheduler: slow, general, and the oracle of the fast one."""

from __future__ import annotations

from pytest_gpulab.engine.blocks import BlockHashes, unique_hashes
from pytest_gpulab.engine.client import Client
from pytest_gpulab.engine.core import EngineCore
from pytest_gpulab.engine.cost import StepCost
from pytest_gpulab.engine.frontend import FrontEnd
from pytest_gpulab.engine.outcome import SAMPLE_EVERY_S, Outcome, totals
from pytest_gpulab.engine.plan import Plan
from pytest_gpulab.engine.scheduler import Batch, Request
from pytest_gpulab.run import GIVEN_UP


def run_stepping(plan: Plan) -> Outcome:
    """Simulate every step of the plan."""
    return _Stepping(plan).run()


class _Stepping:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.client = Client(plan.workload, plan.scheduled())
        self.front_end = FrontEnd(plan.variant.front_end)
        self.core = EngineCore(plan.config, StepCost(plan.variant, plan.config.graph_tokens, plan.eager))
        self.outcome = Outcome.empty(self.client.scheduled, self.client.sent)
        self.prompts: list[int] = plan.schedule["prompt_tokens"].tolist()
        self.outputs: list[int] = plan.schedule["output_tokens"].tolist()
        self.inbox = self.front_end.inbox
        self.added: dict[int, float] = {}  # when the scheduler got a request that has not run yet
        self.queue_time: dict[int, float] = {}  # of unfinished requests
        self.queue_time_s = 0.0
        self.finished = self.prompt_tokens = self.generation_tokens = self.refused = self.aborted = 0

    def run(self) -> Outcome:
        core, client, inbox = self.core, self.client, self.inbox
        while True:
            self._sample_until(core.now)
            self._let_client_act(core.now)
            if not core.busy:
                if not inbox:
                    if client.next_at == float("inf"):
                        break
                    self._let_client_act(client.next_at)
                    continue
                self._sample_until(inbox[0][0])
                core.now = max(core.now, inbox[0][0])
                self._let_client_act(core.now)
            self._add_arrived()
            if not core.busy:  # refused, or given up before it came
                continue
            if not core.must_wait:
                self._count_queue_time(core.now, core.launch())
            if core.must_wait:
                self._sample_until(core.returns_at())
                self._let_client_act(core.returns_at())
                self._deliver(*core.collect())
        return self._close()

    def _let_client_act(self, until: float) -> None:
        """Take in what the client sends, and abort what it has given up."""
        for index in self.client.act(until):
            sent = self.client.sent[index]
            self.front_end.take_in(sent, self.prompts[index], index)

    def _add_arrived(self) -> None:
        """At the start of a step: aborts, then what has come from the front end."""
        core, inbox = self.core, self.inbox
        for index in self.client.given_up[self.aborted :]:
            core.scheduler.abort(str(index))
        self.aborted = len(self.client.given_up)
        while inbox and inbox[0][0] <= core.now:
            taken_in, index = inbox.popleft()
            if core.now < self.client.deadline(index):
                self._add(index, taken_in)

    def _add(self, index: int, taken_in: float) -> None:
        request = Request(str(index), self.prompts[index], self.outputs[index], self._hashes(index))
        try:
            self.core.scheduler.add(request)
        except ValueError:
            self.refused += 1
            self.client.answered(index, self.front_end.refuse(taken_in))
        else:
            self.added[index] = self.core.now

    def _hashes(self, index: int) -> BlockHashes:
        """Content of a request: the workload's shared prefix as far as the prompt goes, then unique."""
        shared = min(self.plan.workload.shared_prefix_tokens, self.prompts[index]) // self.plan.config.block_size
        unique = unique_hashes()
        return (lambda block: block if block < shared else unique(block)) if shared else unique

    def _count_queue_time(self, now: float, batch: Batch) -> None:
        for request in batch.admitted:
            index = int(request.id)
            if index in self.added:
                self.queue_time[index] = now - self.added.pop(index)

    def _deliver(self, samples: list[Request], finished: list[Request]) -> None:
        """A step has returned: stream its tokens, count them, answer those that are done."""
        if not samples:
            return
        received = self.front_end.stream(self.core.now, len(samples))
        self.generation_tokens += len(samples)
        outcome, client = self.outcome, self.client
        for request in samples:
            index = int(request.id)
            if request.output_tokens == 1:
                self.prompt_tokens += request.prompt_tokens
            if received <= client.deadline(index):
                if outcome.received[index] == 0:
                    outcome.first_token[index] = received
                outcome.received[index] += 1
        for request in finished:
            index = int(request.id)
            self.finished += 1
            self.queue_time_s += self.queue_time.pop(index)
            client.answered(index, received)
            if received <= client.deadline(index):
                outcome.last_token[index] = received
                outcome.ended = max(outcome.ended, received)

    def _sample_until(self, now: float) -> None:
        """The scrapes before `now`: nothing changes until then."""
        samples, scheduler = self.outcome.samples, self.core.scheduler
        while (at := len(samples) * SAMPLE_EVERY_S) < now:
            samples.append(
                (
                    at,
                    len(scheduler.running),
                    len(scheduler.waiting),
                    scheduler.kv_usage,
                    self.prompt_tokens,
                    self.generation_tokens,
                    scheduler.preemptions,
                )
            )

    def _close(self) -> Outcome:
        outcome, client, scheduler = self.outcome, self.client, self.core.scheduler
        if client.given_up:
            outcome.ended = max(outcome.ended, client.deadline(client.given_up[-1]))
        self._sample_until(max(outcome.ended, self.plan.workload.duration_s or 0.0))
        if self.refused:
            outcome.problems.append(f"{self.refused} requests were refused: they can never fit the KV cache")
        outcome.totals = totals(
            queue_time_s=self.queue_time_s,
            finished=self.finished,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
        )
        if client.given_up:
            outcome.totals[GIVEN_UP] = len(client.given_up)
        return outcome
