"""``python -m pytest_gpulab.load.null_server``: answers completions with chunks at a fixed pace, nothing else.

The first chunk of an answer comes at once, then every stream gets one chunk a tick, as from an engine that decodes
all sequences in one step. A client that is measured against it measures itself. The first line on stdout is the URL.
``GET`` gives the chunks sent in each second so far, as a JSON list. Its stdin must be a pipe: it ends when whoever
holds the other end lets go, SIGKILL included.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections import Counter
from typing import cast

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_MAX_TOKENS = re.compile(rb'"max_tokens": ?(\d+)')
_COMMAS_PER_PROMPT = re.compile(rb'"prompt": ?\[([\d, ]*)\]')
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
_ID = b'{"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,"model":"null",'
_REST = b'"logprobs":null,"finish_reason":%s,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}'


def _frame(payload: bytes) -> bytes:
    """One event in one chunk of the transfer coding."""
    event = b"data: %s\n\n" % payload
    return b"%x\r\n%s\r\n" % (len(event), event)


_CHUNK = _frame(_ID + b'"choices":[{"index":0,"text":" null",' + _REST % b"null")
_LAST_CHUNK = _frame(_ID + b'"choices":[{"index":0,"text":" null",' + _REST % b'"length"')
_END = _frame(b"[DONE]") + b"0\r\n\r\n"


def _usage(prompt_tokens: int, tokens: int) -> bytes:
    counts = b'"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}}'
    return _frame(_ID + b'"choices":[],' + counts % (prompt_tokens, prompt_tokens + tokens, tokens))


class _Connection(asyncio.Protocol):
    """One connection: requests one after the other, each a stream of chunks."""

    def __init__(self, streams: set[_Connection], chunks: Counter[int]) -> None:
        self._streams, self._chunks = streams, chunks
        self._received = bytearray()
        self._left = self._tokens = self._prompt_tokens = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._streams.discard(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not end or (length is not None and len(body) < int(length[1])):
            return
        self._received = bytearray()
        tokens, prompt = _MAX_TOKENS.search(body), _COMMAS_PER_PROMPT.search(body)
        if tokens is None:
            counts = json.dumps([count for _, count in sorted(self._chunks.items())]).encode()
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(counts), counts))
            return
        self._left = self._tokens = int(tokens[1])
        self._prompt_tokens = prompt[1].count(b",") + 1 if prompt else 1
        self._transport.write(_HEAD)
        self._streams.add(self)
        self.tick()

    def tick(self) -> None:
        """Send the next chunk."""
        self._left -= 1
        self._chunks[int(time.monotonic())] += 1
        if self._left:
            self._transport.write(_CHUNK)
        else:
            self._streams.discard(self)
            self._transport.write(_LAST_CHUNK + _usage(self._prompt_tokens, self._tokens) + _END)


async def _serve(interval_s: float) -> None:
    streams: set[_Connection] = set()
    chunks: Counter[int] = Counter()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, os._exit, 0)
    server = await loop.create_server(lambda: _Connection(streams, chunks), "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    due = loop.time()
    while True:
        due = max(due + interval_s, loop.time())
        await asyncio.sleep(due - loop.time())
        for stream in tuple(streams):
            stream.tick()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(float(sys.argv[1])))
