"""The HTTP routes of vLLM's OpenAI server, on an engine loop."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from pytest_gpulab.serving.answers import DONE, ChatWriter, CompletionWriter, Writer, compact, event, usage
from pytest_gpulab.serving.engine_loop import Answer, EngineLoop
from pytest_gpulab.serving.errors import UNAUTHORIZED, ApiError, bad_request, of_status
from pytest_gpulab.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Job,
    Limits,
    StreamOptions,
    TokenizeRequest,
    chat_job,
    chat_tokens,
    completion_jobs,
    parse,
    require_model,
)
from pytest_gpulab.serving.tokens import encode, word

VERSION = "0.32.0+emulated"
LARGEST_BODY = 256 * 1024**2
"""Bytes. vLLM has no limit of its own and refuses the prompt as too long; this only protects the machine."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Service:
    """What the routes need. `api_keys`: one of them must come with requests below /v1; none: no check."""

    engine: EngineLoop
    limits: Limits
    api_keys: tuple[str, ...] = ()
    started: int = 0
    """Unix time."""


SERVICE = web.AppKey("SERVICE", Service)


def make_app(service: Service) -> web.Application:
    """The application; `service.engine` must run while it serves."""
    app = web.Application(middlewares=[_errors, _authentication], client_max_size=LARGEST_BODY)
    app[SERVICE] = service
    app.on_response_prepare.append(_mark_emulated)
    for path, handler in _GET.items():
        app.router.add_get(path, handler, allow_head=False)
    for path, handler in _POST.items():
        app.router.add_post(path, handler)
    return app


async def _mark_emulated(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["x-gpulab-basis"] = "emulated"
    response.headers["x-gpulab-speed"] = f"{request.app[SERVICE].engine.clock.speed:g}"


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure is vLLM's error body. The server never ends because of a request."""
    try:
        return await handler(request)
    except ApiError as error:
        return _json(error.body, status=error.status)
    except web.HTTPException as error:
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return _json(of_status(error.status).body, status=error.status, headers=allow)
    except ConnectionError:
        raise  # the client is gone
    except Exception as error:
        internal = ApiError(500, "InternalServerError", f"{type(error).__name__}: {error}")
        return _json(internal.body, status=500)


@web.middleware
async def _authentication(request: web.Request, handler: Handler) -> web.StreamResponse:
    """As vLLM: the key protects /v1 only."""
    keys = request.app[SERVICE].api_keys
    protected = bool(keys) and request.path.startswith("/v1") and request.method != "OPTIONS"
    if protected and not bearer_is_one_of(request, keys):
        return _json(UNAUTHORIZED, status=401)
    return await handler(request)


def bearer_is_one_of(request: web.Request, keys: Sequence[str]) -> bool:
    """Whether the request carries one of the keys, compared in constant time."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    got = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    matches = [hmac.compare_digest(got, hashlib.sha256(known.encode()).digest()) for known in keys]
    return scheme.lower() == "bearer" and any(matches)


def _json(body: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(text=compact(body), status=status, headers=headers, content_type="application/json")


async def _health(request: web.Request) -> web.Response:
    return web.Response(status=503 if request.app[SERVICE].engine.dead else 200)


async def _version(request: web.Request) -> web.Response:
    return _json({"version": VERSION})


async def _metrics(request: web.Request) -> web.Response:
    engine = request.app[SERVICE].engine
    text = engine.metrics.text(engine.state())
    return web.Response(body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def _models(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    card = {
        "id": service.limits.model,
        "object": "model",
        "created": service.started,
        "owned_by": "vllm",
        "root": service.limits.model,
        "parent": None,
        "max_model_len": service.limits.max_model_len,
        "permission": [],
    }
    return _json({"object": "list", "data": [card]})


async def _tokenize(request: web.Request) -> web.Response:
    limits = request.app[SERVICE].limits
    body = parse(TokenizeRequest, request.content_type, await request.read())
    require_model(body.model, limits)
    if body.messages is not None:
        tokens = chat_tokens(body.messages, limits)
    elif body.prompt is not None:
        tokens = encode(body.prompt, limits.vocab_size)
    else:
        raise bad_request("Either prompt or messages must be provided.", "prompt")
    words = [word(token) for token in tokens] if body.return_token_strs else None
    return _json({"count": len(tokens), "max_model_len": limits.max_model_len, "tokens": tokens, "token_strs": words})


async def _completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    data = await request.read()
    arrived = service.engine.clock.now()
    body = parse(CompletionRequest, request.content_type, data)
    jobs = completion_jobs(body, service.limits)
    writer = CompletionWriter(service.limits.model, body.request_id, with_ids=bool(body.return_token_ids))
    return await _answer(request, _Exchange(jobs, writer, arrived, bool(body.stream), body.stream_options))


async def _chat(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    data = await request.read()
    arrived = service.engine.clock.now()
    body = parse(ChatRequest, request.content_type, data)
    jobs = [chat_job(body, service.limits)]
    writer = ChatWriter(service.limits.model, body.request_id, with_ids=bool(body.return_token_ids))
    return await _answer(request, _Exchange(jobs, writer, arrived, bool(body.stream), body.stream_options))


@dataclass(frozen=True)
class _Exchange:
    """A validated request and how to answer it. `arrived` is in model seconds."""

    jobs: list[Job]
    writer: Writer
    arrived: float
    stream: bool
    options: StreamOptions | None

    @property
    def final_usage(self) -> bool:
        return self.options is not None and bool(self.options.include_usage)

    def running_usage(self, job: Job, output_tokens: int) -> dict[str, Any] | None:
        """The usage block of a chunk, where every chunk is to have one."""
        if self.final_usage and self.options is not None and self.options.continuous_usage_stats:
            return usage([job], output_tokens)
        return None


async def _answer(request: web.Request, exchange: _Exchange) -> web.StreamResponse:
    """Run the jobs; a client that leaves cancels this, and its jobs are aborted."""
    engine = request.app[SERVICE].engine
    answers = [engine.submit(job, exchange.arrived) for job in exchange.jobs]
    engine.clients += 1
    try:
        if exchange.stream:
            return await _stream(request, exchange, answers)
        return await _collect(exchange, answers)
    finally:
        engine.clients -= 1
        for answer in answers:
            engine.abort(answer)


async def _collect(exchange: _Exchange, answers: list[Answer]) -> web.Response:
    for answer in answers:
        while not answer.done:
            await answer.more(answer.delivered)
            if answer.failure is not None:
                raise _engine_error(answer)
    return _json(exchange.writer.whole(exchange.jobs))


def _engine_error(answer: Answer) -> ApiError:
    return ApiError(500, "InternalServerError", answer.failure or "")


async def _stream(request: web.Request, exchange: _Exchange, answers: list[Answer]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    if await _stream_all(response, exchange, answers):
        failed = [answer for answer in answers if answer.failure is not None]
        if failed:
            await response.write(event(_engine_error(failed[0]).body))
        elif exchange.final_usage:
            counts = usage(exchange.jobs, sum(answer.delivered for answer in answers))
            await response.write(exchange.writer.chunk([], counts))
        await response.write(DONE)
        await response.write_eof()
    return response


async def _stream_all(response: web.StreamResponse, exchange: _Exchange, answers: list[Answer]) -> bool:
    """Stream the answers side by side. False when the client has gone."""
    there = True
    try:
        async with asyncio.TaskGroup() as writers:
            for index, answer in enumerate(answers):
                writers.create_task(_stream_one(response, exchange, index, answer))
    except* ConnectionError:
        there = False
    return there


async def _stream_one(response: web.StreamResponse, exchange: _Exchange, index: int, answer: Answer) -> None:
    """A chunk for each time that there are new tokens; ends early when the engine fails.

    As in vLLM nothing comes before the engine's first output, so that the first chunk tells the time to first token.
    """
    writer, job = exchange.writer, answer.job
    seen = 0
    while seen < job.max_tokens:
        end = await answer.more(seen)
        if end == seen:
            return
        if not seen and (opening := writer.opening(index)):
            await response.write(writer.chunk(opening, exchange.running_usage(job, 0)))
        await response.write(writer.chunk([writer.part(index, job, seen, end)], exchange.running_usage(job, end)))
        seen = end


_GET: dict[str, Handler] = {
    "/health": _health,
    "/ping": _health,
    "/version": _version,
    "/metrics": _metrics,
    "/v1/models": _models,
}
_POST: dict[str, Handler] = {
    "/ping": _health,
    "/tokenize": _tokenize,
    "/v1/completions": _completions,
    "/v1/chat/completions": _chat,
}
