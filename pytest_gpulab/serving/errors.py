"""The errors of vLLM's API server: which status, which type, which words."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

_MOST_ERRORS = 10
_LONGEST_INPUT = 200


class ApiError(Exception):
    """A request that is answered with an error body."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


UNAUTHORIZED = {"error": "Unauthorized"}
"""vLLM's whole body for a missing or wrong API key, status 401."""


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A request that is well formed and cannot be served."""
    return ApiError(400, "BadRequestError", message, param)


def unknown_model(name: str) -> ApiError:
    """The request names a model that is not served."""
    return ApiError(404, "NotFoundError", f"The model `{name}` does not exist.", "model")


def of_status(status: int) -> ApiError:
    """An unknown path, a wrong method and the like."""
    phrase = HTTPStatus(status).phrase
    return ApiError(status, phrase, phrase)


def invalid(errors: Sequence[dict[str, Any]]) -> ApiError:
    """A body that does not validate. `errors` are pydantic's: type, loc, msg, input."""
    count = len(errors)
    lines = [f"{count} validation error{'s' if count > 1 else ''}:"]
    lines += [f"  {_short(error)}" for error in errors[:_MOST_ERRORS]]
    if count > _MOST_ERRORS:
        lines.append(f"  ...and {count - _MOST_ERRORS} more errors")
    return ApiError(400, "Bad Request", "\n".join(lines), _path(errors[0]["loc"]))


def _short(error: dict[str, Any]) -> dict[str, Any]:
    """Without the link to pydantic's site, and with a bounded echo of the input."""
    short = {name: value for name, value in error.items() if name != "url"}
    short["loc"] = _path(error["loc"])
    got = short.get("input")
    if isinstance(got, list | dict):
        short["input"] = f"<{type(got).__name__} of {len(got)} items>"
    elif isinstance(got, str) and len(got) > _LONGEST_INPUT:
        short["input"] = got[:_LONGEST_INPUT] + "...[truncated]"
    return short


def _path(loc: Sequence[str | int]) -> str:
    """Field names and list indices with dots, without pydantic's names of union branches."""
    parts = [str(part) for part in loc]
    return ".".join(part for part in parts if not set(part) & set("[](){}") and part not in ("str", "int"))


def too_long(longest: int, prompt_tokens: int, output_tokens: int) -> ApiError:
    """Prompt and requested output exceed the context length `longest`, all in tokens."""
    return bad_request(
        f"This model's maximum context length is {longest} tokens. However, you requested {output_tokens} output "
        f"tokens and your prompt contains at least {prompt_tokens} input tokens, for a total of at least "
        f"{prompt_tokens + output_tokens} tokens. Please reduce the length of the input prompt or the number of "
        f"requested output tokens. (parameter=input_tokens, value={prompt_tokens})",
        "input_tokens",
    )


def no_room(longest: int, prompt_tokens: int) -> ApiError:
    """The prompt leaves no room for a single output token."""
    return bad_request(
        f"The decoder prompt (length {prompt_tokens}) plus the number of requested output tokens (at least 1) is "
        f"longer than the maximum model length of {longest}. Make sure that `max_model_len` is no smaller than the "
        "number of text tokens (prompt + requested output tokens)."
    )
