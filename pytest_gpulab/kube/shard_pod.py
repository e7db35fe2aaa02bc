"""One pod of a load: what it says in its log, what it is told on its stdin, and how far its clock is off."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Self

import aiohttp

from pytest_gpulab.kube.client import Kube
from pytest_gpulab.kube.objects import Object, Ref
from pytest_gpulab.kube.wait import WaitFailed
from pytest_gpulab.load.headroom import BeyondHeadroom
from pytest_gpulab.load.pod import BEYOND_HEADROOM
from pytest_gpulab.load.words import Heard
from pytest_gpulab.render import NAMESPACE

SILENCE_S: Final = 30.0
"""Real seconds without a line from a pod, which says how far it is each second."""
_POLL_S: Final = 0.5
_QUESTIONS: Final = 8
_STDIN, _STDOUT = b"\0", b"\1"
"""Channels of an attached process."""
_PROTOCOLS: Final = ("v5.channel.k8s.io", "v4.channel.k8s.io")


class PodLost(WaitFailed):
    """A pod that sent a share has ended without its outcome, or does not answer."""


class ShardPod:
    """The pod of one index. `name` and `uid` are set when it runs."""

    def __init__(self, kube: Kube, index: int) -> None:
        self._kube = kube
        self.index = index
        self.name = self.uid = ""
        self.heard = Heard()
        self.offset_s = 0.0
        """Its clock ahead of this machine's, known to within `error_s`."""
        self.error_s = math.inf
        self._spoke = math.inf
        self._stdin: aiohttp.ClientWebSocketResponse | None = None

    def is_silent(self) -> bool:
        """Whether it has said nothing for too long, and has not said everything."""
        return self.heard.outcome is None and time.monotonic() - self._spoke > SILENCE_S

    # its log

    async def follow(self, session: aiohttp.ClientSession) -> None:
        """Hear its log to the outcome; from the start again when the connection breaks.

        Raises:
            PodLost: it ended without one.
            BeyondHeadroom: it cannot do its share.
        """
        self._spoke = time.monotonic()
        while self.heard.outcome is None:
            try:
                await self._hear(session, "log?follow=true")
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(_POLL_S)
                continue
            if self.heard.outcome is None:
                await self._look(session)

    async def _hear(self, session: aiohttp.ClientSession, what: str) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S)
        async with session.get(self._url(what), headers=self._kube.headers, timeout=timeout) as answer:
            if answer.status != 200:
                return
            rest = b""
            async for data in answer.content.iter_any():
                self._spoke = time.monotonic()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self.heard.line(line.decode(errors="replace"))

    async def _look(self, session: aiohttp.ClientSession) -> None:
        """Its log has ended: what has become of it. Nothing, if it still runs."""
        found = await asyncio.to_thread(self._kube.get, Ref("v1", "Pod", self.name, NAMESPACE))
        if found is not None and phase(found) == "Running":
            await asyncio.sleep(_POLL_S)
            return
        if found is not None:
            await self._hear(session, "log")
        if self.heard.outcome is not None:
            return
        if found is not None and terminated(found).get("exitCode") == BEYOND_HEADROOM:
            raise BeyondHeadroom(f"pod {self.name}: {' / '.join(self.heard.others)}")
        raise PodLost(f"pod {self.name} ended without its outcome")

    # its stdin

    @asynccontextmanager
    async def attached(self, session: aiohttp.ClientSession) -> AsyncIterator[Self]:
        """With a way to its stdin. WaitFailed: the API server refuses."""
        try:
            self._stdin = await session.ws_connect(
                self._url("attach?stdin=true&stdout=true&stderr=true"),
                headers=self._kube.headers,
                protocols=_PROTOCOLS,
                max_msg_size=0,
            )
        except aiohttp.ClientError as refused:
            raise WaitFailed(f"pod {self.name} must take words on its stdin: {refused}") from None
        try:
            yield self
        finally:
            await self._stdin.close()

    async def tell(self, line: str) -> None:
        """Write a line to its stdin. PodLost: it does not listen any more."""
        assert self._stdin is not None, "it must be attached"
        try:
            await self._stdin.send_bytes(_STDIN + f"{line}\n".encode())
        except (aiohttp.ClientError, ConnectionError) as broken:
            raise PodLost(f"pod {self.name} could not be told {line!r}: {broken}") from None

    async def compare_clocks(self) -> None:
        """Ask for the time some times: the fastest answer knows it best. PodLost: there is none."""
        for _ in range(_QUESTIONS):
            asked = time.time()
            await self.tell("clock")
            there = await self._told_time()
            answered = time.time()
            if (error_s := (answered - asked) / 2) < self.error_s:
                self.offset_s, self.error_s = there - (asked + answered) / 2, error_s

    async def _told_time(self) -> float:
        assert self._stdin is not None
        rest = b""
        try:
            async with asyncio.timeout(SILENCE_S):
                async for message in self._stdin:
                    if message.type is not aiohttp.WSMsgType.BINARY or message.data[:1] != _STDOUT:
                        continue
                    *lines, rest = (rest + message.data[1:]).split(b"\n")
                    for line in lines:
                        word, _, told = line.partition(b" ")
                        if word == b"clock":
                            return float(told)
        except TimeoutError:
            pass
        raise PodLost(f"pod {self.name} does not say what time it has")

    def _url(self, what: str) -> str:
        return f"{self._kube.url}/api/v1/namespaces/{NAMESPACE}/pods/{self.name}/{what}"


def most_apart_s(pods: Sequence[ShardPod]) -> float:
    """How far apart pods may start, in seconds, when each is told the same moment by its own clock.

    The worst is that the least known clocks are wrong into opposite directions. 0 for one pod.
    """
    return sum(sorted(pod.error_s for pod in pods)[-2:]) if len(pods) > 1 else 0.0


def phase(pod: Object) -> str:
    """``status.phase``."""
    return str((pod.get("status") or {}).get("phase") or "")


def terminated(pod: Object) -> dict[str, Any]:
    """How its container ended; empty while it has not."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return next((found for one in statuses if (found := (one.get("state") or {}).get("terminated"))), {})
