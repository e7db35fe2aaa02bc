"""Requests of the OpenAI routes as vLLM validates them, turned into jobs for the engine.

Fields that do not change when a token comes (temperature, penalties, stop, ...) are validated and then ignored: the
emulated model answers what it answers. What vLLM does and the emulation has no truth for is refused: more than one
answer a prompt (`n`), beam search, cutting the prompt (`truncate_prompt_tokens`), log probabilities, and echoing the
prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pytest_gpulab.serving.errors import ApiError, bad_request, invalid, no_room, too_long, unknown_model
from pytest_gpulab.serving.tokens import Content, encode

Token = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[Token], Field(fail_fast=True)]
Prompt = (
    TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] | str | Annotated[list[str], Field(fail_fast=True)]
)
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class _Body(BaseModel):
    """As in vLLM unknown fields are accepted and ignored."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Body):
    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


class _Request(_Body):
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int | None = 1
    use_beam_search: bool = False
    truncate_prompt_tokens: int | None = None
    ignore_eos: bool = False
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    request_id: str | None = None


class CompletionRequest(_Request):
    max_tokens: int | None = 16
    prompt: Prompt | None = None
    echo: bool | None = False
    logprobs: int | None = None


class Message(_Body):
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(_Request):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    echo: bool | None = False


class TokenizeRequest(_Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = False


@dataclass(frozen=True)
class Job:
    """One prompt to answer: what the engine and the answer's writer need."""

    content: Content
    max_tokens: int
    """Tokens of the answer, which always has as many."""
    finish_reason: Literal["length", "stop"]
    asked_tokens: int | None
    """The request's own max_tokens."""


@dataclass(frozen=True)
class Limits:
    """What the server serves: the model's name, its vocabulary, and tokens of prompt and output together."""

    model: str
    vocab_size: int
    max_model_len: int


Body = TypeVar("Body", bound=_Body)


def parse(kind: type[Body], content_type: str, data: bytes) -> Body:
    """The validated body; ApiError as FastAPI and vLLM report it."""
    if content_type != "application/json":
        raise invalid([{"loc": ("body",), "msg": "Unsupported Media Type: Only 'application/json' is allowed"}])
    if not data:
        raise invalid([{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}])
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _not_json(error) from None
    _refuse_stray_stream_options(values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise invalid([{**each, "loc": ("body", *each["loc"])} for each in found]) from None


def _not_json(error: Exception) -> ApiError:
    position, reason = getattr(error, "pos", 0), getattr(error, "msg", str(error))
    found = {"type": "json_invalid", "loc": ("body", position), "msg": "JSON decode error", "input": {}}
    return invalid([{**found, "ctx": {"error": reason}}])


def _refuse_stray_stream_options(values: Any) -> None:
    if isinstance(values, dict) and values.get("stream_options") and not values.get("stream"):
        raise invalid(
            [
                {
                    "type": "value_error",
                    "loc": ("stream_options",),
                    "msg": "Value error, Stream options can only be defined when `stream=True`.",
                }
            ]
        )


def require_model(asked: str | None, limits: Limits) -> None:
    """ApiError when the request names another model than the one served."""
    if asked and asked != limits.model:
        raise unknown_model(asked)


def completion_jobs(request: CompletionRequest, limits: Limits) -> list[Job]:
    """One job a prompt, in the request's order. Without max_tokens an answer has 16; with null it ends by itself."""
    require_model(request.model, limits)
    if request.logprobs is not None:
        raise bad_request("`logprobs` must not be given: the emulated model has none. Leave it out.", "logprobs")
    if request.echo:
        raise bad_request("`echo` must be false: the emulation does not repeat prompts. Leave it out.", "echo")
    max_tokens = request.max_tokens
    _check_sampling(request, max_tokens)
    prompts = _prompts(request.prompt, max_tokens or 0, limits)
    return [_job(request, prompt, max_tokens, limits) for prompt in prompts]


def chat_job(request: ChatRequest, limits: Limits) -> Job:
    """The job of a conversation."""
    require_model(request.model, limits)
    if request.logprobs or request.top_logprobs:
        raise bad_request("`logprobs` must be false: the emulated model has none. Leave it out.", "logprobs")
    if request.echo:
        raise bad_request("`echo` must be false: the emulation does not repeat prompts. Leave it out.", "echo")
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    _check_sampling(request, max_tokens)
    return _job(request, chat_tokens(request.messages, limits, max_tokens or 0), max_tokens, limits)


def chat_tokens(messages: Sequence[Message], limits: Limits, max_tokens: int = 0) -> list[int]:
    """The token ids of a conversation: role and content of each message, then the assistant's turn."""
    parts = [f"{message.role} {_text(message.content)}" for message in messages]
    return _encode(" ".join([*parts, "assistant"]), max_tokens, limits)


def _encode(text: str, max_tokens: int, limits: Limits) -> list[int]:
    """As in vLLM, a text that is too long to leave room for `max_tokens` is read just far enough to see that."""
    return encode(text, limits.vocab_size, max(0, limits.max_model_len - max_tokens) + 1)


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad_request(
                f"content parts must be of type 'text' with a text: got {part.get('type')!r}", "messages"
            )
    return "\n".join(part["text"] for part in content)


def _prompts(prompt: Prompt | None, max_tokens: int, limits: Limits) -> list[list[int]]:
    if prompt is None or prompt == "":
        raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if isinstance(prompt, str):
        return [_encode(prompt, max_tokens, limits)]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    if not prompt:
        raise bad_request("Please provide at least one prompt", "prompt")
    return [_encode(each, max_tokens, limits) if isinstance(each, str) else each for each in prompt]  # type: ignore[misc]


def _job(request: _Request, prompt: list[int], max_tokens: int | None, limits: Limits) -> Job:
    longest = limits.max_model_len
    if not prompt:
        raise bad_request("The decoder prompt cannot be empty")
    if len(prompt) + (max_tokens or 0) > longest:
        raise too_long(longest, len(prompt), max_tokens or 0)
    if len(prompt) >= longest:
        raise no_room(longest, len(prompt))
    if (largest := max(prompt)) >= limits.vocab_size:
        raise bad_request(f"Token id {largest} is out of vocabulary")
    content = Content(prompt, request.seed or 0)
    room = longest - len(prompt)
    if max_tokens is not None:
        return Job(content, max_tokens, "length", max_tokens)
    _require_no_more(request.min_tokens, room)
    natural = max(content.natural_length(), request.min_tokens)
    if request.ignore_eos or natural > room:
        return Job(content, room, "length", None)
    return Job(content, natural, "stop", None)


def _check_sampling(request: _Request, max_tokens: int | None) -> None:
    """vLLM's limits of the sampling parameters."""
    if request.n is not None and request.n < 1:
        raise bad_request(f"n must be at least 1, got {request.n}.", "n")
    if request.n is not None and request.n > 1:
        raise bad_request(f"n must be 1, got {request.n}: the emulated model has one answer. Send n requests.", "n")
    if request.use_beam_search:
        raise bad_request(
            "`use_beam_search` must be false: the emulated model has no beams. Leave it out.", "use_beam_search"
        )
    if request.truncate_prompt_tokens is not None:
        raise bad_request(
            "`truncate_prompt_tokens` must not be given: the emulation does not cut prompts. Send a shorter prompt.",
            "truncate_prompt_tokens",
        )
    if max_tokens is not None and max_tokens < 1:
        raise bad_request(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens")
    if request.min_tokens < 0:
        raise bad_request(f"min_tokens must be greater than or equal to 0, got {request.min_tokens}.", "min_tokens")
    if max_tokens is not None:
        _require_no_more(request.min_tokens, max_tokens)
    _check_ranges(request)


def _require_no_more(min_tokens: int, max_tokens: int) -> None:
    if min_tokens > max_tokens:
        raise bad_request(
            f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.", "min_tokens"
        )


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda got: got >= 0.0, "non-negative"),
    "top_p": (lambda got: 0.0 < got <= 1.0, "in (0, 1]"),
    "top_k": (lambda got: got >= -1, "0 (disable), or at least 1"),
    "min_p": (lambda got: 0.0 <= got <= 1.0, "in [0, 1]"),
    "presence_penalty": (lambda got: -2.0 <= got <= 2.0, "in [-2, 2]"),
    "frequency_penalty": (lambda got: -2.0 <= got <= 2.0, "in [-2, 2]"),
    "repetition_penalty": (lambda got: got > 0.0, "greater than zero"),
}


def _check_ranges(request: _Request) -> None:
    for name, (fits, rule) in _RANGES.items():
        got = getattr(request, name)
        if got is not None and not fits(got):
            raise bad_request(f"{name} must be {rule}, got {got}.", name)
