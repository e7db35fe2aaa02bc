"""A server of known truth: it answers as it is told, and writes down what it sent when, in a process of its own.

``python tests/load/golden.py '{...}'`` prints its URL. Options: ``delay_s`` before the first token, ``interval_s``
between two, ``plan``: how to answer the first, second, ... request (the last entry counts for all further ones), the
names of `ANSWERS`, ``pages``: how many pages of metrics come before they hang. ``GET /truth`` gives the records,
``GET /metrics`` counters of the same truth under vLLM's names, ``GET /v1/models`` the models ``golden`` and
``qwen2.5-0.5b``. Times are CLOCK_MONOTONIC, which all processes of a machine share. It shares no code with the
package.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import uvloop

STARTED = time.time()


class Golden:
    def __init__(self, delay_s=0.005, interval_s=0.001, plan=("plain",), metrics=None, pages=None):
        self.delay_s, self.interval_s, self.plan = delay_s, interval_s, plan
        self.extra_metrics = metrics or {}
        self.pages_left = math.inf if pages is None else pages
        self.records = []
        self.counters = dict.fromkeys(
            ("request_success_total", "prompt_tokens_total", "generation_tokens_total", "prefix_cache_hits_total"), 0
        )
        self.running = 0

    async def connection(self, reader, writer):
        try:
            while await self.one_request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def one_request(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        received = time.monotonic()
        method, path, _ = head.split(" ", 2)
        lengths = [line for line in head.split("\r\n") if line.lower().startswith("content-length:")]
        body = await reader.readexactly(int(lengths[0].split(":")[1])) if lengths else b""
        if path == "/metrics":
            self.pages_left -= 1
            await asyncio.sleep(0 if self.pages_left >= 0 else 3600)
        if method == "GET":
            models = '{"data": [{"id": "golden"}, {"id": "qwen2.5-0.5b"}]}'
            pages = {"/metrics": self.metrics, "/v1/models": lambda: models}
            text = pages.get(path, lambda: json.dumps(self.records))()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text.encode()))
            return True
        request = json.loads(body)
        index = len(self.records)
        record = {
            "received": received,
            "prompt": request["prompt"] if len(request["prompt"]) < 100 else len(request["prompt"]),
            "max_tokens": request["max_tokens"],
            "authorization": [line for line in head.split("\r\n") if line.lower().startswith("authorization")],
            "request": {name: value for name, value in request.items() if name != "prompt"},
            "first": None,
            "last": None,
            "tokens": 0,
        }
        self.records.append(record)
        self.running += 1
        try:
            answer = ANSWERS[self.plan[min(index, len(self.plan) - 1)]]
            return await answer(self, Out(writer, record, len(request["prompt"]), self.counters)) is not False
        finally:
            self.running -= 1

    def metrics(self):
        values = {**self.counters, **self.extra_metrics}
        lines = [f'vllm:{name}{{engine="0",model_name="golden"}} {value}' for name, value in values.items()]
        lines += [f"vllm:num_requests_running {self.running}", "vllm:num_requests_waiting 0"]
        return "\n".join([*lines, f"process_start_time_seconds {STARTED}", ""])


class Out:
    """What one answer writes; `record` keeps when."""

    def __init__(self, writer, record, prompt_tokens, counters):
        self.writer, self.record, self.prompt_tokens, self.counters = writer, record, prompt_tokens, counters
        self.max_tokens = record["max_tokens"]

    def head(self, status="200 OK", *lines):
        fields = ["Content-Type: text/event-stream", "Transfer-Encoding: chunked", *lines]
        self.writer.write("\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode())

    def raw(self, data):
        """Bytes as one piece of the transfer coding."""
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    def token(self, text=" a", tokens=1, **choice):
        """An event with `tokens` tokens."""
        now = time.monotonic()
        record = self.record
        record["first"] = record["first"] or now
        record["last"] = now
        record["tokens"] += tokens
        self.counters["generation_tokens_total"] += tokens
        self.raw(token_event(text, **choice))

    def usage(self, **wrong):
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.record["tokens"], **wrong}
        self.raw(event({"choices": [], "usage": counts}))

    def finish(self):
        self.counters["prompt_tokens_total"] += self.prompt_tokens
        self.counters["request_success_total"] += 1

    def done(self):
        self.raw(b"data: [DONE]\n\n")
        self.writer.write(b"0\r\n\r\n")


def event(body):
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


@functools.cache
def token_event(text, **choice):
    return event({"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": None, **choice}]})


async def tokens(golden, out, count=None, **token):
    """The paced tokens of an answer."""
    await asyncio.sleep(golden.delay_s)
    for _ in range(out.max_tokens if count is None else count):
        out.token(**token)
        await asyncio.sleep(golden.interval_s)


async def plain(golden, out, **token):
    out.head()
    await tokens(golden, out, **token)
    out.finish()
    out.usage()
    out.done()


async def empty_texts(golden, out):
    await plain(golden, out, text="")


async def pairs(golden, out):
    """Two tokens a chunk, which only the usage block tells."""
    out.head()
    await tokens(golden, out, out.max_tokens // 2, tokens=2)
    out.finish()
    out.usage()
    out.done()


async def miscounted(golden, out):
    out.head()
    await tokens(golden, out)
    out.finish()
    out.usage(prompt_tokens=out.prompt_tokens + 1)
    out.done()


async def short(golden, out):
    """One token less than asked for."""
    out.head()
    await tokens(golden, out, out.max_tokens - 1)
    out.finish()
    out.usage()
    out.done()


async def no_usage(golden, out):
    out.head()
    await tokens(golden, out)
    out.finish()
    out.done()


async def error_event(golden, out):
    out.head()
    await tokens(golden, out, 2)
    out.raw(event({"error": {"message": "EngineCore died", "code": 500}}))
    out.done()


async def error_and_cut(golden, out):
    """The server says what is wrong and closes the connection inside the body."""
    out.head()
    await tokens(golden, out, 2)
    out.raw(event({"error": {"message": "EngineCore died", "code": 500}}))
    return False


async def truncated(golden, out):
    """The body ends well, the stream of events does not."""
    out.head()
    await tokens(golden, out, 3)
    out.writer.write(b"0\r\n\r\n")


async def cut(golden, out):
    """The connection closes inside the body."""
    out.head()
    await tokens(golden, out, 3)
    return False


async def reset(golden, out):
    """A TCP reset inside the body."""
    out.head()
    await tokens(golden, out, 3)
    out.writer.transport.abort()
    return False


async def hang(golden, out):
    out.head()
    await tokens(golden, out, 1)
    await asyncio.sleep(3600)


async def no_answer(golden, out):
    await asyncio.sleep(3600)


async def comments(golden, out):
    """Lives, and never says a token."""
    out.head()
    while True:
        out.raw(b": ping\n\n")
        await out.writer.drain()
        await asyncio.sleep(0.02)


def refuse(status):
    async def answer(golden, out):
        body = b'{"error": {"message": "busy"}}'
        head = f"HTTP/1.1 {status}\r\nRetry-After: 1\r\nContent-Length: {len(body)}\r\n\r\n"
        out.writer.write(head.encode() + body)

    return answer


async def exit_now(golden, out):
    os.kill(os.getpid(), signal.SIGKILL)


ANSWERS = {
    answer.__name__: answer
    for answer in (
        *(plain, empty_texts, pairs, miscounted, short, no_usage, error_event, truncated, cut, reset, hang),
        *(error_and_cut, no_answer, comments, exit_now),
    )
} | {
    status.partition(" ")[0]: refuse(status)
    for status in (
        *("302 Found", "400 Bad Request", "401 Unauthorized", "404 Not Found", "408 Request Timeout"),
        *("429 Too Many Requests", "503 Service Unavailable"),
    )
}


async def serve(options):
    port = options.pop("port", 0)
    golden = Golden(**options)
    server = await asyncio.start_server(golden.connection, "127.0.0.1", port, limit=2**24, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


# --- the tests' side ----------------------------------------------------------------------------------


@contextmanager
def golden_server(**options):
    """The server's URL. It may end itself."""
    command = [sys.executable, __file__, json.dumps(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def truth(url):
    with urllib.request.urlopen(url + "/truth") as response:
        return json.load(response)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(json.loads(sys.argv[1])))
