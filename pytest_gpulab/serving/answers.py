"""Bodies of answers on the OpenAI routes, whole and in chunks, as vLLM writes them."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from pytest_gpulab.serving.protocol import Job
from pytest_gpulab.serving.tokens import decode

FINGERPRINT = "gpulab-emulated"
"""`system_fingerprint` of every answer: no model computed it."""

DONE = b"data: [DONE]\n\n"


def compact(body: object) -> str:
    """JSON without spaces, as vLLM sends it."""
    return json.dumps(body, separators=(",", ":"))


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {compact(body)}\n\n".encode()


def usage(jobs: Iterable[Job], output_tokens: int) -> dict[str, Any]:
    """Token counts over all prompts of a request."""
    prompt_tokens = sum(len(job.content) for job in jobs)
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "completion_tokens": output_tokens,
    }


class Writer(ABC):
    """Writes the bodies of one request. `with_ids`: token ids beside the text."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, request_id: str | None, *, with_ids: bool) -> None:
        self.with_ids = with_ids
        self._head = {
            "id": f"{self.prefix}{request_id or uuid.uuid4().hex}",
            "object": self.whole_object,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        answers = [job.content[len(job.content) : len(job.content) + job.max_tokens] for job in jobs]
        choices = [self._choice(i, job, ids) for i, (job, ids) in enumerate(zip(jobs, answers, strict=True))]
        counts = usage(jobs, sum(map(len, answers)))
        return {**self._head, "choices": choices, "system_fingerprint": FINGERPRINT, "usage": counts}

    def chunk(self, choices: list[dict[str, Any]], counts: dict[str, Any] | None = None) -> bytes:
        """A chunk as an event; `counts` is its usage block."""
        body = {**self._head, "object": self.chunk_object, "choices": choices, "system_fingerprint": FINGERPRINT}
        return event(body if counts is None else {**body, "usage": counts})

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices of a chunk that comes right before the first token's; empty for none."""
        return []

    @abstractmethod
    def part(self, index: int, job: Job, start: int, end: int) -> dict[str, Any]:
        """The choice that streams tokens `start` to `end` of an answer."""

    @abstractmethod
    def _choice(self, index: int, job: Job, ids: list[int]) -> dict[str, Any]: ...

    def _ids(self, job: Job, ids: list[int], *, prompt: bool = True) -> dict[str, Any]:
        shown = self.with_ids
        prompt_ids = list(job.content.prompt) if shown and prompt else None
        return {"prompt_token_ids": prompt_ids, "token_ids": ids if shown else None}


def _tokens(job: Job, start: int, end: int) -> list[int]:
    return [job.content.answer(position) for position in range(start, end)]


def _finish(job: Job, end: int) -> str | None:
    return job.finish_reason if end == job.max_tokens else None


class CompletionWriter(Writer):
    """/v1/completions."""

    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def part(self, index: int, job: Job, start: int, end: int) -> dict[str, Any]:
        ids = _tokens(job, start, end)
        return self._body(index, ids, _finish(job, end)) | self._ids(job, ids, prompt=start == 0)

    def _choice(self, index: int, job: Job, ids: list[int]) -> dict[str, Any]:
        return self._body(index, ids, job.finish_reason) | self._ids(job, ids)

    def _body(self, index: int, ids: list[int], finish: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": decode(ids),
            "logprobs": None,
            "finish_reason": finish,
            "stop_reason": None,
        }


class ChatWriter(Writer):
    """/v1/chat/completions."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def part(self, index: int, job: Job, start: int, end: int) -> dict[str, Any]:
        ids = _tokens(job, start, end)
        delta = {"content": decode(ids)}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": _finish(job, end)}
        return choice | self._ids(job, ids, prompt=start == 0) if self.with_ids else choice

    def _choice(self, index: int, job: Job, ids: list[int]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": decode(ids), "refusal": None, "tool_calls": []}
        choice = {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": job.finish_reason,
            "stop_reason": None,
        }
        return choice | self._ids(job, ids)
