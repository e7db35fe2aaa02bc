"""How far off a pod's clock is, and how sure that is: against a pod of known clock and slow, lopsided ways."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from pytest_gpulab.kube import shard_pod
from pytest_gpulab.kube.shard_pod import PodLost, ShardPod, most_apart_s
from pytest_gpulab.kube.wait import WaitFailed

AHEAD_S = 3600.0


def asked(there_s: list[float], back_s: list[float], *, answers: bool = True) -> ShardPod:
    """A pod after its clock was compared; questions take `there_s` to it, answers `back_s`, in turn and again."""
    return asyncio.run(_asked(there_s, back_s, answers))


async def _asked(there_s: list[float], back_s: list[float], answers: bool) -> ShardPod:
    async def attach(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=("v5.channel.k8s.io",))
        await socket.prepare(request)
        for channel in (b"\0", b"\1", b"\3"):
            await socket.send_bytes(channel)
        number = 0
        async for message in socket:
            assert message.data == b"\0clock\n"
            await asyncio.sleep(there_s[number % len(there_s)])
            told = f"clock {time.time() + AHEAD_S!r}\n".encode()
            await asyncio.sleep(back_s[number % len(back_s)])
            number += 1
            if answers:
                await socket.send_bytes(b"\1progress")
                await socket.send_bytes(b"\1 {}\n" + told[:9])
                await socket.send_bytes(b"\1" + told[9:])
            else:
                await socket.close()
        return socket

    app = web.Application()
    app.router.add_get("/api/v1/namespaces/gpulab/pods/{name}/attach", attach)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    kube: Any = SimpleNamespace(url=f"http://127.0.0.1:{runner.addresses[0][1]}", headers={})
    pod = ShardPod(kube, 0)
    pod.name = "load-0"
    try:
        async with aiohttp.ClientSession() as session, pod.attached(session):
            await pod.compare_clocks()
    finally:
        await runner.cleanup()
    return pod


@pytest.mark.parametrize(("there_s", "back_s"), [([0.0], [0.04]), ([0.04], [0.0]), ([0.05, 0.0], [0.05, 0.01])])
def test_the_clock_is_right_within_the_bound(there_s: list[float], back_s: list[float]) -> None:
    pod = asked(there_s, back_s)
    assert abs(pod.offset_s - AHEAD_S) <= pod.error_s
    fastest = min(a + b for a, b in zip(there_s, back_s, strict=True))
    assert pod.error_s >= fastest / 2


def test_two_clocks_may_be_wrong_into_opposite_directions() -> None:
    early, late = asked([0.0], [0.04]), asked([0.04], [0.0])
    apart_s = abs(early.offset_s - late.offset_s)
    assert apart_s <= most_apart_s([early, late]) == early.error_s + late.error_s
    third = ShardPod(SimpleNamespace(), 0)  # type: ignore[arg-type]
    third.error_s = 0.001
    assert most_apart_s([early, third, late]) == most_apart_s([late, early])
    assert most_apart_s([early]) == 0.0


def test_a_pod_that_tells_no_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PodLost, match="load-0 does not say what time it has"):
        asked([0.0], [0.0], answers=False)
    monkeypatch.setattr(shard_pod, "SILENCE_S", 0.05)
    with pytest.raises(PodLost, match="does not say what time"):
        asked([0.5], [0.0])


def test_a_stdin_that_nobody_may_write_to_is_an_error() -> None:
    async def attach() -> None:
        pod = ShardPod(SimpleNamespace(url="http://127.0.0.1:1", headers={}), 0)  # type: ignore[arg-type]
        pod.name = "load-0"
        async with aiohttp.ClientSession() as session, pod.attached(session):
            raise AssertionError("nothing listens there")

    with pytest.raises(WaitFailed, match="load-0 must take words on its stdin"):
        asyncio.run(attach())
