"""vLLM's engine core as a state machine: the scheduler, the steps in flight, and the time they take.

The clock is handed in: the caller moves `now` forward while the core is idle, everything else follows from the
costs.
"""

from __future__ import annotations

from collections import deque

from pytest_gpulab.engine.cost import StepCost, load_of
from pytest_gpulab.engine.scheduler import Batch, Request, Scheduler, SchedulerConfig


class EngineCore:
    """One engine process: a CPU that schedules, prepares and launches steps, and a GPU that runs them in order.

    With async scheduling a step is prepared while the one before runs, so two are in flight; the CPU waits for the
    older one when both are launched.
    """

    def __init__(self, config: SchedulerConfig, cost: StepCost) -> None:
        self.scheduler = Scheduler(config)
        self.now = 0.0
        """When the CPU is free, seconds; the caller may move it forward while the core is not `busy`."""
        self._cost = cost
        self._in_flight: deque[tuple[Batch, float]] = deque()
        self._gpu_free_at = 0.0

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished or a step has not returned."""
        return self.scheduler.has_unfinished or bool(self._in_flight)

    def launch(self) -> Batch:
        """Schedule a step now and start it. An empty step takes no time; its place in the pipeline counts."""
        batch = self.scheduler.schedule()
        if not batch.chunks:
            self._in_flight.append((batch, self.now))
            return batch
        load = load_of(batch)
        ready = self.now + self._cost.prepare(load.decodes, load.prefills)
        launched = ready + self._cost.launch(load.decodes, load.prefill_tokens)
        self._gpu_free_at = max(max(ready, self._gpu_free_at) + self._cost.gpu(*load), launched)
        self._in_flight.append((batch, self._gpu_free_at))
        self.now = launched
        return batch

    @property
    def must_wait(self) -> bool:
        """Whether the oldest step has to return before another can be launched."""
        in_flight = len(self._in_flight)
        return in_flight == self.scheduler.config.max_in_flight or (
            in_flight > 0 and not self.scheduler.has_unfinished
        )

    def returns_at(self) -> float:
        """When the CPU has the oldest step's results."""
        return max(self.now, self._in_flight[0][1])

    def collect(self) -> tuple[list[Request], list[Request]]:
        """Wait for the oldest step: the requests that got a token from it, and those of them that are finished."""
        self.now = self.returns_at()
        batch, _ = self._in_flight.popleft()
        return batch.samples, self.scheduler.update(batch)
