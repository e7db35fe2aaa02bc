"""The load balancer: what it lets through, whom it asks, and what it says when nobody answers."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import openai
import pytest

from pytest_gpulab.serving import serve, serve_edge
from pytest_gpulab.serving.edge import under
from tests.serving.client import FAST, MODEL, PROFILE, golden, post, stream

BODY = {"prompt": [400, 401], "max_tokens": 4, "return_token_ids": True}


async def completed(session, server):
    async with session.get(server.url + "/metrics") as response:
        text = await response.text()
    return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith("vllm:request_success_total"))


def v1(*urls):
    """Everything under /v1 goes to these endpoints."""
    return lambda path: urls if under("/v1", path) else None


def test_only_the_paths_with_a_rule_and_the_key_passes_through():
    async def check():
        async with (
            serve(PROFILE, speed=FAST, api_key="secret") as server,
            serve_edge(v1(server.url)) as edge,
            aiohttp.ClientSession() as session,
        ):
            for path in ("/", "/health", "/metrics", "/tokenize", "/v1beta", "/v2/models", "/V1/models"):
                async with session.get(edge.url + path, headers={"Authorization": "Bearer secret"}) as response:
                    assert response.status == 404, path
                    assert "x-gpulab-basis" not in response.headers
            for headers in ({}, {"Authorization": "Bearer no"}):
                async with session.get(edge.url + "/v1/models", headers=headers) as response:
                    assert (response.status, await response.json()) == (401, {"error": "Unauthorized"})
            async with session.get(edge.url + "/v1/models", headers={"Authorization": "Bearer secret"}) as response:
                assert response.status == 200
                assert response.headers["x-gpulab-basis"] == "emulated"
            async with openai.AsyncOpenAI(base_url=edge.url + "/v1", api_key="secret") as client:
                answer = await client.completions.create(model=MODEL, prompt="a", max_tokens=3)
                assert answer.usage.completion_tokens == 3
                with pytest.raises(openai.NotFoundError, match="does not exist"):
                    await client.completions.create(model="other", prompt="a")

    asyncio.run(check())


def test_round_robin_over_the_ready_endpoints():
    async def check():
        async with (
            serve(PROFILE, speed=FAST) as one,
            serve(PROFILE, speed=FAST) as two,
            aiohttp.ClientSession() as session,
        ):
            ready = []
            async with serve_edge(lambda path: ready) as edge:
                async with session.post(edge.url + "/v1/completions", json=BODY) as response:
                    assert response.status == 503
                ready.append(one.url)
                for _ in range(3):
                    status, body = await post(session, edge.url, BODY)
                    assert (status, body["choices"][0]["token_ids"]) == (200, golden([400, 401], 4))
                ready.append(two.url)
                await asyncio.gather(*(post(session, edge.url, BODY) for _ in range(10)))
            assert (await completed(session, one), await completed(session, two)) == (8, 5)

    asyncio.run(check())


def test_streams_pass_through_piece_by_piece():
    async def check():
        async with (
            serve(PROFILE, speed=1.0) as server,
            serve_edge(v1(server.url)) as edge,
            aiohttp.ClientSession() as session,
        ):
            chunks = await stream(session, edge.url, {**BODY, "max_tokens": 8})
            assert [token for c in chunks for token in c["choices"][0]["token_ids"]] == golden([400, 401], 8)
            async with session.post(
                edge.url + "/v1/completions", json={**BODY, "stream": True, "max_tokens": 2000}
            ) as response:
                await response.content.readline()
                assert server.engine.state().running == 1  # the first token came long before the last
            while server.engine.state().running:  # and leaving the edge aborts the request behind it
                await asyncio.sleep(0.01)
            assert not +edge.in_flight

    asyncio.run(check())


@contextlib.asynccontextmanager
async def raw_endpoint(answer: bytes, *, hold=False):
    """An endpoint that sends these bytes and closes, or keeps the connection open and says no more."""

    async def talk(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if hold:
            with contextlib.suppress(ConnectionError):
                await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("answer", "hold", "status"),
    [
        (b"", False, 502),
        (b"nonsense\r\n\r\n", False, 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", False, 502),
        (b"", True, 504),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", True, 504),
        (b"HTTP/1.1 418 I'm a teapot\r\nContent-Length: 2\r\nX-It: is\r\n\r\nhi", True, 418),
    ],
)
def test_broken_endpoints(answer, hold, status):
    async def check():
        async with (
            raw_endpoint(answer, hold=hold) as url,
            serve_edge(v1(url), idle_timeout_s=0.2) as edge,
            aiohttp.ClientSession() as session,
            session.get(edge.url + "/v1/models") as response,
        ):
            assert response.status == status
            if status == 418:
                assert (response.reason, response.headers["X-It"]) == ("I'm a teapot", "is")

    asyncio.run(check())


def test_an_endpoint_that_is_gone():
    async def check():
        async with serve(PROFILE) as server:
            gone = server.url
        async with serve_edge(v1(gone)) as edge, aiohttp.ClientSession() as session:
            assert (await session.get(edge.url + "/v1/models")).status == 502

    asyncio.run(check())


def test_an_answer_that_breaks_off_breaks_off():
    async def check():
        half = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
        async with (
            raw_endpoint(half) as url,
            serve_edge(v1(url)) as edge,
            aiohttp.ClientSession() as session,
            session.get(edge.url + "/v1/models") as response,
        ):
            assert response.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()

    asyncio.run(check())


def test_a_removed_endpoint_finishes_its_requests():
    async def check():
        async with (
            serve(PROFILE, speed=FAST) as old,
            serve(PROFILE, speed=FAST) as new,
            aiohttp.ClientSession() as session,
        ):
            ready = [old.url]
            async with serve_edge(lambda path: ready) as edge:
                started = asyncio.create_task(post(session, edge.url, {**BODY, "max_tokens": 500}))
                while not edge.in_flight[old.url]:
                    await asyncio.sleep(0)
                ready[:] = [new.url]
                drained = asyncio.create_task(edge.drain(old.url, 10.0))
                await post(session, edge.url, BODY)
                assert not drained.done()
                assert await drained == 0
                _, body = await started
                assert body["choices"][0]["token_ids"] == golden([400, 401], 500)
                assert (await completed(session, old), await completed(session, new)) == (1, 1)

    asyncio.run(check())


def test_a_drain_ends_at_its_deadline():
    async def check():
        async with (
            serve(PROFILE, speed=1.0) as server,
            serve_edge(v1(server.url)) as edge,
            aiohttp.ClientSession() as session,
        ):
            started = asyncio.create_task(post(session, edge.url, {**BODY, "max_tokens": 2000}))
            while not server.engine.state().running:
                await asyncio.sleep(0.01)
            assert await edge.drain(server.url, 0.05) == 1
            with pytest.raises(aiohttp.ClientError):
                await started

    asyncio.run(check())
