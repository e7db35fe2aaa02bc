"""Sending: executes a share of a schedule over HTTP, open loop, and writes down what happened when.

When which request is sent, dropped or given up is decided by the same state machine as in the simulator
(`pytest_gpulab.engine.client`), on the real clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import time
from collections import Counter
from functools import partial

import aiohttp
import numpy as np

from pytest_gpulab.arrivals import schedule
from pytest_gpulab.engine.client import Client
from pytest_gpulab.load.answer import Answer
from pytest_gpulab.load.bodies import encode_bodies
from pytest_gpulab.load.share import Outcome, Share
from pytest_gpulab.run import REQUEST_DTYPE

READ_BUFFER_BYTES = 1 << 20
"""aiohttp's own 64 KiB stalls streams of long prompts."""

KEEP_ALIVE_S = 3.0
"""Seconds an idle connection is used again: less than the 5 after which vLLM closes it, so that they cannot race."""

CONNECT_S = 30.0
"""Seconds a connection may take to be accepted."""

_SPIN_S = 0.0015
"""The event loop's timers have a resolution of 1 ms: for what is due sooner the loop goes round without sleep."""

_HEARTBEAT_S = 0.05

_PROBE_S = 0.25
"""How often a client that holds its queue asks whether a server is there."""

_PROBE_TIMEOUT_S = 5.0

_NOBODY_THERE = frozenset({"connect", "http_503"})
"""Failures of a request that no server has seen: nothing listens, or a load balancer has no target that is ready."""

_UNSENT, _IN_FLIGHT = "unsent", "in flight"


class Sending:
    """One share while it is sent. Bodies are encoded on creation; `run` sends them."""

    def __init__(self, share: Share) -> None:
        workload = share.workload
        everything = schedule(workload, share.seed)
        indices = range(len(everything))[share.rows()]
        self.schedule = everything[share.rows()]
        self.total = len(self.schedule)
        self._e2e_s: list[float] = []
        self._endpoint = share.endpoint
        self._url = f"{share.endpoint.url}/v1/completions"
        self._bodies = encode_bodies(
            workload, everything, indices, model=share.endpoint.model, seed=share.seed, salt=share.salt
        )
        limit_s = workload.timeout_s or share.longest_answer_s
        policy = workload.model_copy(update={"timeout_s": limit_s})
        self._client = Client(policy, self.schedule["scheduled"].tolist())
        self._rows = np.zeros(self.total, dtype=REQUEST_DTYPE)
        for name in ("sent", "first_token", "last_token"):
            self._rows[name] = math.nan
        self._rows["prompt_tokens"] = self.schedule["prompt_tokens"]
        self._failure = [_UNSENT] * self.total
        self._counts: Counter[str] = Counter()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._given_up = 0
        self._ended_s = 0.0
        self._loop_lag_s: list[float] = []
        self._timer: asyncio.Handle | None = None
        self._probing: asyncio.Task[None] | None = None

    @property
    def length_s(self) -> float:
        """Until the last arrival that is known."""
        return float(np.nanmax(self.schedule["scheduled"], initial=0.0))

    @property
    def p95_s(self) -> float | None:
        """Of the answers so far, seconds from scheduled to the last token; None without one."""
        return float(np.percentile(self._e2e_s, 95)) if self._e2e_s else None

    @property
    def in_flight(self) -> int:
        """Requests that are sent and not answered."""
        return len(self._tasks)

    @property
    def finished(self) -> int:
        """Answers so far, good and bad."""
        return sum(failure != _UNSENT for failure in self._failure) - self.in_flight

    async def run(self, start: float) -> Outcome:
        """Send everything; `start` is the run's start by ``time.perf_counter``. A cancelled run ends at once and
        gives what it has, with `interrupted` set."""
        self._start = start
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        cpu_s = time.process_time()
        gc.collect()
        gc.freeze()  # what exists now is never collected again: no pause of the collector looks at it
        interrupted = False
        try:
            async with _session(self._endpoint.headers) as self._session:
                heartbeat = asyncio.create_task(self._heartbeat())
                try:
                    self._act()
                    await self._over.wait()
                except asyncio.CancelledError:
                    interrupted = True
                finally:
                    heartbeat.cancel()
                    if self._probing is not None:
                        self._probing.cancel()
                    await self._stop()
        finally:
            gc.unfreeze()
        return self._outcome(time.process_time() - cpu_s, interrupted)

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _heartbeat(self) -> None:
        due = max(self._now(), 0.0)
        while True:
            due += _HEARTBEAT_S
            await asyncio.sleep(max(0.0, due - self._now()))
            late = self._now() - due
            self._loop_lag_s.append(late)
            due += max(0.0, late)

    def _act(self) -> None:
        """Do what is due, and come back when something else is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._over.is_set():
            return
        self._send(self._client.act(self._now()))
        for index in self._client.given_up[self._given_up :]:
            self._give_up(index)
        self._given_up = len(self._client.given_up)
        wait_s = self._client.next_at - self._now()
        if wait_s == math.inf:
            if not self._tasks:
                self._over.set()
        elif wait_s <= _SPIN_S:
            self._timer = self._loop.call_soon(self._act)
        else:
            self._timer = self._loop.call_later(wait_s - _SPIN_S, self._act)

    def _send(self, indices: list[int]) -> None:
        for index in indices:
            self._failure[index] = _IN_FLIGHT
            task = self._tasks[index] = asyncio.create_task(self._request(index))
            task.add_done_callback(partial(self._answered, index))

    async def _probe(self) -> None:
        """Ask until a server is there for those that are held."""
        url = f"{self._endpoint.url}/v1/models"
        timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
        while True:
            await asyncio.sleep(_PROBE_S)
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with self._session.get(url, timeout=timeout, allow_redirects=False) as response:
                    if f"http_{response.status}" not in _NOBODY_THERE:
                        break
        self._probing = None
        self._send(self._client.resume(self._now()))
        self._act()

    def _give_up(self, index: int) -> None:
        """The client no longer awaits this answer, even if it has just come."""
        self._failure[index] = "timeout"
        self._rows["ok"][index] = False
        self._rows["last_token"][index] = math.nan
        if index in self._tasks:
            self._tasks[index].cancel()

    async def _request(self, index: int) -> None:
        answer = Answer()
        self._rows["sent"][index] = self._now()
        body, self._bodies[index] = self._bodies[index], b""
        try:
            failure = await self._exchange(body, answer)
        except asyncio.CancelledError:
            failure = self._failure[index]
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            failure = "connect"
        except (aiohttp.ClientError, OSError):
            failure = "reset" if answer.error is None else "stream_error"  # the server had said why before
        except Exception as error:  # a bug of this client, which must not lose the request
            failure = f"client_error_{type(error).__name__}"
        if failure in _NOBODY_THERE:
            self._bodies[index] = body
        self._record(index, answer, failure)

    def _answered(self, index: int, _: asyncio.Task[None]) -> None:
        self._ended_s = self._now()
        del self._tasks[index]
        if self._failure[index] in _NOBODY_THERE:
            self._refused(index)
        else:
            self._client.answered(index, self._ended_s)
        self._act()

    def _refused(self, index: int) -> None:
        """No server has seen a request: the policy says whether it is lost or waits until one is there."""
        self._client.refused(index, self._ended_s)
        if not self._client.holds:
            return
        self._failure[index] = _UNSENT
        self._rows["sent"][index] = math.nan
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe())

    async def _exchange(self, body: bytes, answer: Answer) -> str:
        """Send a body and read the answer; how it failed, empty for not at all."""
        async with self._session.post(self._url, data=body, allow_redirects=False) as response:
            if response.status != 200:
                return f"http_{response.status}"
            async for data in response.content.iter_any():
                answer.feed(data, self._now())
        if answer.error is not None:
            return "stream_error"
        return "" if answer.done else "truncated"

    def _record(self, index: int, answer: Answer, failure: str) -> None:
        row = self._rows[index]
        if answer.done and answer.error is None:
            failure = "" if failure in ("reset", _IN_FLIGHT) else failure  # it came after the last token
            self._check_usage(answer, int(row["prompt_tokens"]))
            if not failure and answer.tokens != self.schedule["output_tokens"][index]:
                failure = "wrong_count"
        row["first_token"], row["output_tokens"] = answer.first_token, answer.tokens
        self._failure[index] = failure
        if not failure:
            row["ok"], row["last_token"] = True, answer.last_token
            self._e2e_s.append(answer.last_token - self._client.scheduled[index])

    def _check_usage(self, answer: Answer, prompt_tokens: int) -> None:
        self._counts["whole"] += 1
        if answer.usage_tokens is None:
            self._counts["usage_missing"] += 1
        elif answer.tokens_seen > answer.usage_tokens:
            self._counts["output_miscounted"] += 1
        if answer.prompt_tokens is not None and answer.prompt_tokens != prompt_tokens:
            self._counts["prompt_miscounted"] += 1

    async def _stop(self) -> None:
        """Drop what is in flight."""
        self._over.set()
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _outcome(self, cpu_s: float, interrupted: bool) -> Outcome:
        rows, sent = self._rows, np.array(self._client.sent)
        rows["scheduled"] = self._client.scheduled
        names = {_UNSENT: "interrupted" if interrupted else "dropped", _IN_FLIGHT: "interrupted"}
        failures = Counter(names.get(failure, failure) for failure in self._failure if failure)
        return Outcome(
            requests=rows,
            failures=failures,
            send_lag_s=(rows["sent"] - sent)[~np.isnan(rows["sent"])],
            loop_lag_s=np.array(self._loop_lag_s),
            cpu_s=cpu_s,
            ended_s=self._ended_s,
            counts=self._counts,
            interrupted=interrupted,
        )


def _session(headers: dict[str, str]) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={**headers, "Content-Type": "application/json", "Accept": "text/event-stream"},
        read_bufsize=READ_BUFFER_BYTES,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
    )
