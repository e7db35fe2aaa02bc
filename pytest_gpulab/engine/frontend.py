"""The API server's event loop: one CPU that takes requests in and streams tokens out.

On fast GPUs with small models it is the bottleneck: clients wait while the engine's own queue is empty. It does
not serve first in, first out. What vLLM 0.25 does, and what is modelled here:

- The loop runs in turns. A turn handles what the engine has sent since the last one, then streams a chunk to
  each request that got tokens. So tokens of several steps leave in one chunk when the loop is late, which saves
  the cost of the chunks in between.
- Only steps of up to `SLICE` outputs are handled together. A larger one is cut into slices, the loop turns after
  each, and its steps leave one by one: beyond `SLICE` sequences a late loop stays late.
- A new request needs several turns until the engine has it. It waits for that many turns, not for all steps that
  wait to be streamed.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from pytest_gpulab.engine.calibration import FrontEndCost
from pytest_gpulab.engine.ramp import ramp_sum

SLICE: Final = 128
"""Outputs that are handled before the loop turns (VLLM_V1_OUTPUT_PROC_CHUNK_SIZE)."""

INTAKE_TURNS: Final = 20
"""Turns between a request's first byte and the engine: reading, validation in a worker thread, tasks, sending.
Measured on a saturated loop: 0.21 s at turns of 10 ms."""

EARLY_SHARE: Final = 0.6
"""Share of a request's work that is done in turns before the last: requests that come together pass these together,
so the first of them waits for all. Measured on bursts of 16 to 128 requests."""


class FrontEnd:
    """The caller reports work in order of time; all times are seconds.

    The chunks of one turn leave one by one; each counts as received at the mean of their times, plus latency.
    """

    __slots__ = (
        "_intake_free_at",
        "_latency",
        "_per_chunk",
        "_per_prompt_token",
        "_per_request",
        "_per_token",
        "_prompt_token_latency",
        "_streamed",
        "_turn_at",
        "_turn_s",
        "free_at",
        "inbox",
    )

    def __init__(self, cost: FrontEndCost) -> None:
        self._per_request = cost.per_request_s
        self._per_prompt_token = cost.per_prompt_token_s
        self._per_token = cost.per_output_token_s
        self._per_chunk = cost.per_chunk_s
        self._latency = cost.latency_s
        self._prompt_token_latency = cost.prompt_token_latency_s
        self.free_at = 0.0
        """When all that is known now has been streamed."""
        self._turn_at = 0.0  # when the last turn starts to stream, with that many chunks
        self._streamed = 0
        self._turn_s = 0.0  # how long a turn takes
        self._intake_free_at = 0.0
        self.inbox: deque[Any] = deque()
        """[when it reaches the engine, request], in order; a later request can still delay it. The caller pops."""

    def take_in(self, sent: float, prompt_tokens: int, request: int) -> None:
        """Put a request that the client sent at `sent` into the inbox. In order of `sent`.

        Those still on their way are late by its early turns.
        """
        work = self._per_request + self._per_prompt_token * prompt_tokens
        start = max(sent, self._intake_free_at)
        wait = max(0.0, min(self.free_at - start, INTAKE_TURNS * self._turn_s))
        latest = start + work + wait + self._prompt_token_latency * prompt_tokens
        if self.inbox:
            for other in reversed(self.inbox):
                if other[0] <= sent:
                    break
                other[0] += EARLY_SHARE * work
            latest = max(latest, self.inbox[-1][0])
        self.inbox.append([latest, request])
        if self._turn_at > sent:
            self._turn_at += work
        self.free_at = max(self.free_at, start) + work
        self._intake_free_at = start + work

    def stream(self, ready: float, tokens: int) -> float:
        """When the clients receive the tokens, one a request, of the step that returned at `ready`."""
        handling = self._per_token * tokens
        if ready <= self._turn_at and max(tokens, self._streamed) <= SLICE:
            more = max(0, tokens - self._streamed)  # the others' chunks carry one token more
            self._streamed += more
            self.free_at += handling + self._per_chunk * more
        else:
            self._turn_at = self.free_at if self.free_at > ready else ready
            self._streamed = tokens
            work = handling + self._per_chunk * tokens
            self._turn_s = work if tokens <= SLICE else work * SLICE / tokens
            self.free_at = self._turn_at + work
        return self.free_at - self._per_chunk * (self._streamed - 1) / 2 + self._latency

    def stream_steps(self, ready: float, first: float, slope: float, floor: float, steps: int, tokens: int) -> None:
        """Stream `steps` steps of as many tokens each: the first returns at `ready`, gap j behind it is
        max(floor, first + j * slope) with slope >= 0.
        """
        work = (self._per_token + self._per_chunk) * tokens
        for step in range(steps):
            gap = max(floor, first + step * slope)
            if self.free_at <= ready and work <= gap:
                # From here on each step is streamed before the next one returns: only the last one counts.
                rest = steps - 1 - step
                self.stream(ready + ramp_sum(rest, first + step * slope, slope, floor), tokens)
                return
            self.stream(ready, tokens)
            ready += gap

    def refuse(self, taken_in: float) -> float:
        """When the client learns that a request, taken in at `taken_in`, cannot be served."""
        return taken_in + self._latency
