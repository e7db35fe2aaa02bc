"""Many streams at once, clients that leave and clients that are slow: no token is wrong or lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager

import aiohttp
import pytest

from pytest_gpulab.engine.scheduler import Scheduler
from pytest_gpulab.serving.tokens import encode
from tests.serving.client import MODEL, PROFILE, VOCAB, events, golden, post, scrape, serving, stream, value

USAGE = {"stream_options": {"include_usage": True}}


@asynccontextmanager
async def server_process(*options):
    """`gpulab serve` in a process of its own; gives the URL."""
    command = [sys.executable, "-m", "pytest_gpulab", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        process.stdout.close()


def check_stream(chunks, prompt, tokens):
    """Every token is the right one, in order, and the counts say so."""
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert encode(text, VOCAB) == golden(prompt, tokens)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": len(prompt),
        "total_tokens": len(prompt) + tokens,
        "completion_tokens": tokens,
    }
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    return len(reasons)


@pytest.mark.slow
def test_500_streams():
    """All are sent at once, and nobody reads before all have been accepted."""
    streams, shortest = 500, 20

    async def check():
        options = ("--model", MODEL, "--accelerator", "h200")  # whose scheduler runs 1024 at once
        sent, accepted = asyncio.Barrier(streams), asyncio.Barrier(streams)
        connector = aiohttp.TCPConnector(limit=0)
        async with server_process(*options) as url, aiohttp.ClientSession(connector=connector) as session:

            async def delayed(body):
                await sent.wait()
                yield json.dumps(body).encode()

            async def one(number):
                prompt, tokens = [1000 + number, *range(300, 320 + number % 40)], shortest + number % 17
                body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "stream": True, **USAGE}
                headers = {"Content-Type": "application/json"}
                async with session.post(url + "/v1/completions", data=delayed(body), headers=headers) as response:
                    await accepted.wait()
                    check_stream(events(await response.read()), prompt, tokens)
                return len(prompt), tokens

            counts = await asyncio.gather(*map(one, range(streams)))
            samples = await scrape(session, url)
            assert value(samples, "request_success_total", finished_reason="length") == streams
            assert value(samples, "prompt_tokens_total") == sum(prompt for prompt, _ in counts)
            assert value(samples, "generation_tokens_total") == sum(tokens for _, tokens in counts)
            assert value(samples, "num_requests_running") == value(samples, "num_requests_waiting") == 0

    asyncio.run(check())


def test_preempted_requests_lose_nothing():
    """A KV cache that holds a fraction of the requests: they are preempted and computed again."""

    async def check():
        profile = PROFILE.with_engine_args(num_gpu_blocks_override=140, enable_prefix_caching=False)
        async with serving(profile, speed=100.0) as (server, session):

            async def one(number):
                prompt = [1000 + number] * 100
                check_stream(
                    await stream(session, server.url, {"prompt": prompt, "max_tokens": 200, **USAGE}), prompt, 200
                )

            await asyncio.gather(*map(one, range(30)))
            samples = await scrape(session, server.url)
            assert value(samples, "num_preemptions_total") > 0
            assert value(samples, "generation_tokens_total") == 30 * 200
            assert value(samples, "prompt_tokens_total") == 30 * 100

    asyncio.run(check())


def test_a_client_that_leaves_is_aborted():
    """Streaming or not, running or waiting: its place is free again, and vLLM's counters know nothing of an end."""

    async def check():
        profile = PROFILE.with_engine_args(max_num_seqs=2)
        async with serving(profile, speed=1.0) as (server, session):
            long = {"prompt": [400] * 10, "max_tokens": 2000, "ignore_eos": True}
            started = [asyncio.create_task(post(session, server.url, long)) for _ in range(3)]
            response = await session.post(server.url + "/v1/completions", json={**long, "stream": True})
            assert response.status == 200
            while server.engine.state().running + server.engine.state().waiting < 4:
                await asyncio.sleep(0.01)
            assert (server.engine.state().running, server.engine.state().waiting) == (2, 2)
            response.close()
            for task in started:
                task.cancel()
            while server.engine.state().running + server.engine.state().waiting:
                await asyncio.sleep(0.01)
            assert server.engine.state().kv_usage == 0.0
            short = {"prompt": [400] * 10, "max_tokens": 3, "return_token_ids": True}
            _, body = await post(session, server.url, short)
            assert body["choices"][0]["token_ids"] == golden([400] * 10, 3)
            samples = await scrape(session, server.url)
            assert value(samples, "request_success_total", finished_reason="abort") == 0
            assert value(samples, "request_success_total", finished_reason="length") == 1
            assert value(samples, "e2e_request_latency_seconds_count") == 1
            assert value(samples, "prompt_tokens_total") >= 10

    asyncio.run(check())


def test_slow_readers_and_writers():
    """A reader that stops reading and a body that comes byte by byte hold up nobody, and lose nothing."""

    async def check():
        async with serving(speed=200.0) as (server, session):
            host, port = server.url.removeprefix("http://").split(":")
            prompt = [700, 701]
            tokens = 2000
            body = (
                f'{{"prompt": {prompt}, "max_tokens": {tokens}, "stream": true, "return_token_ids": true}}'.encode()
            )
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close"
            reader, writer = await asyncio.open_connection(host, int(port), limit=2**12)
            writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode())
            for byte in body:
                writer.write(bytes([byte]))
                await writer.drain()
            others = [stream(session, server.url, {"prompt": [800 + n], "max_tokens": 50, **USAGE}) for n in range(5)]
            for number, chunks in enumerate(await asyncio.gather(*others)):
                check_stream(chunks, [800 + number], 50)
            raw = await reader.read(-1)
            writer.close()
            ids = [token for chunk in dechunked_events(raw) for token in chunk["choices"][0]["token_ids"]]
            assert ids == golden(prompt, tokens)

    asyncio.run(check())


def dechunked_events(raw):
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK") and b"Transfer-Encoding: chunked" in head
    data = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        data, rest = data + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return events(data)


def test_a_half_sent_request_is_forgotten():
    async def check():
        async with serving() as (server, session):
            host, port = server.url.removeprefix("http://").split(":")
            for data in (
                b"POST /v1/comp",
                b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{",
                b"\x00\xff\r\n",
            ):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(data)
                await writer.drain()
                writer.close()
            assert (await post(session, server.url, {"prompt": "a", "max_tokens": 1}))[0] == 200
            assert server.engine.state().running == 0

    asyncio.run(check())


def test_an_engine_that_dies_answers_500(monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    async def check():
        async with serving() as (server, session):  # whose end says what was wrong
            running = asyncio.create_task(post(session, server.url, {"prompt": "a", "max_tokens": 2000}))
            while not server.engine.state().running:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(Scheduler, "schedule", fail)
            status, body = await running
            assert (status, body["error"]["type"]) == (500, "InternalServerError")
            async with session.get(server.url + "/health") as response:
                assert response.status == 503

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(check())


def test_a_chat_stream_begins_with_the_engines_first_output(monkeypatch):
    """The chunk with the role comes then, and not before: without output the error is all there is."""

    def fail(*_):
        raise RuntimeError("out of memory")

    async def check():
        async with serving() as (server, session):
            monkeypatch.setattr(Scheduler, "schedule", fail)
            body = {"messages": [{"role": "user", "content": "a"}]}
            (only,) = await stream(session, server.url, body, "/v1/chat/completions")
            assert only["error"]["type"] == "InternalServerError"

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(check())


def test_the_process_ends_on_sigterm_with_open_streams():
    async def check():
        async with server_process("--model", MODEL, "--accelerator", "t4") as url, aiohttp.ClientSession() as session:
            body = {"prompt": "a", "max_tokens": 30_000, "stream": True}
            async with session.post(url + "/v1/completions", json=body) as response:
                assert (await response.content.readline()).startswith(b"data: ")

    asyncio.run(check())


@pytest.mark.skipif(os.name != "posix", reason="reads /proc or getrusage")
def test_an_idle_server_uses_no_cpu():
    import resource

    def cpu_s():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    async def check():
        async with serving() as (server, session):
            await post(session, server.url, {"prompt": "a", "max_tokens": 3})
            before = cpu_s()
            await asyncio.sleep(0.5)
            assert cpu_s() - before < 0.1

    asyncio.run(check())
