"""What a streamed answer says: when its tokens came, how many there are, and whether it ended well.

A chunk carries a token when it has a choice with one: an empty text is a token too (random weights give many), a
delta that only names a role is none. How many tokens a chunk carries is in its token ids or log probabilities where
the server sends them, else it counts as one; the usage block, which may come alone or beside choices, has the last
word. Times are the client's, taken when bytes are read.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic_core import from_json

from pytest_gpulab.load.sse import EventStream

_DONE = b"[DONE]"


class Answer:
    """One answer as it streams in. Times are in the caller's clock; NaN: not yet."""

    __slots__ = ("_events", "_seen", "_usage", "done", "error", "first_token", "last_token")

    def __init__(self) -> None:
        self._events = EventStream()
        self._seen = 0
        self._usage: dict[str, Any] | None = None
        self.first_token = self.last_token = math.nan
        self.done = False
        """``data: [DONE]`` has come."""
        self.error: str | None = None
        """What the server reported in mid-stream, or what could not be read."""

    @property
    def tokens(self) -> int:
        """Tokens received: by the usage block of a whole answer, else those seen."""
        return self._seen if self.usage_tokens is None or not self.done else self.usage_tokens

    @property
    def tokens_seen(self) -> int:
        """Tokens that the chunks themselves carried; chunks of several tokens may say so or not."""
        return self._seen

    @property
    def usage_tokens(self) -> int | None:
        """Output tokens by the usage block."""
        return self._count("completion_tokens")

    @property
    def prompt_tokens(self) -> int | None:
        """Prompt tokens by the usage block."""
        return self._count("prompt_tokens")

    def _count(self, name: str) -> int | None:
        count = None if self._usage is None else self._usage.get(name)
        return count if isinstance(count, int) else None

    def feed(self, data: bytes, now: float) -> None:
        """Bytes of the body, read at `now`."""
        for payload in self._events.feed(data):
            if payload == _DONE:
                self.done = True
            elif self.error is None:
                self._chunk(payload, now)

    def _chunk(self, payload: bytes, now: float) -> None:
        try:
            chunk = from_json(payload)
        except ValueError as error:
            self.error = f"not JSON: {error}"
            return
        if not isinstance(chunk, dict):
            self.error = f"not an object: {payload[:80]!r}"
        elif "choices" not in chunk:
            if "error" in chunk or chunk.get("object") == "error":
                self.error = str(chunk.get("error") or chunk.get("message"))
        else:
            if chunk.get("usage"):
                self._usage = chunk["usage"]
            for choice in chunk["choices"] or ():
                self._choice(choice, now)

    def _choice(self, choice: dict[str, Any], now: float) -> None:
        tokens = _tokens(choice)
        if not tokens:
            return
        if not self._seen:
            self.first_token = now
        self.last_token = now
        self._seen += tokens


def _tokens(choice: dict[str, Any]) -> int:
    """Tokens that a choice of a chunk carries."""
    ids = choice.get("token_ids")
    if ids is not None:
        return len(ids)
    logprobs = choice.get("logprobs") or {}
    for name in ("tokens", "content"):
        if logprobs.get(name) is not None:
            return len(logprobs[name])
    delta = choice.get("delta")
    if delta is not None and "role" in delta and not any(delta.get(name) for name in _DELTA_TEXTS):
        return 0
    return 1


_DELTA_TEXTS = ("content", "reasoning", "reasoning_content", "tool_calls")
