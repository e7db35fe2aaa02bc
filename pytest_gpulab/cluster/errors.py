"""What a Kubernetes API server refuses, with its own codes, reasons and messages.

ApiError
+-- BadRequest 400     +-- Conflict 409           +-- Invalid 422
+-- Unauthorized 401   +-- AlreadyExists 409      +-- TooManyRequests 429
+-- Forbidden 403      +-- Expired 410
+-- NotFound 404       +-- TooLarge 413           +-- ServiceUnavailable 503
+-- NotAllowed 405     +-- Unsupported 415
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from pytest_gpulab.cluster.resources import Resource


class ApiError(Exception):
    """A refusal that can be sent as a `Status` object."""

    code: ClassVar[int] = 500
    reason: ClassVar[str] = "InternalError"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def status(self) -> dict[str, Any]:
        """The body of the answer."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        }


class BadRequest(ApiError):
    """The request itself makes no sense."""

    code, reason = 400, "BadRequest"


class Unauthorized(ApiError):
    """No valid bearer token."""

    code, reason = 401, "Unauthorized"


class Forbidden(ApiError):
    """The object's state does not allow it."""

    code, reason = 403, "Forbidden"


class NotFound(ApiError):
    """No such object or path."""

    code, reason = 404, "NotFound"


class NotAllowed(ApiError):
    """The path exists, the verb does not."""

    code, reason = 405, "MethodNotAllowed"


class Conflict(ApiError):
    """The object moved on, or a field belongs to someone else."""

    code, reason = 409, "Conflict"


class AlreadyExists(ApiError):
    """The name is taken."""

    code, reason = 409, "AlreadyExists"


class Expired(ApiError):
    """The watch starts before the oldest event kept."""

    code, reason = 410, "Expired"


class TooLarge(ApiError):
    """The body is bigger than the server reads."""

    code, reason = 413, "RequestEntityTooLarge"


class Unsupported(ApiError):
    """The body's media type is not one the server reads."""

    code, reason = 415, "UnsupportedMediaType"


class Invalid(ApiError):
    """The object is well-formed and wrong."""

    code, reason = 422, "Invalid"


class TooManyRequests(ApiError):
    """Try again later: a disruption budget is spent."""

    code, reason = 429, "TooManyRequests"


class ServiceUnavailable(ApiError):
    """What is behind the API does not answer."""

    code, reason = 503, "ServiceUnavailable"


def about(resource: Resource, name: str) -> dict[str, str]:
    """The `details` that name an object."""
    details = {"name": name, "kind": resource.plural}
    return {**details, "group": resource.group} if resource.group else details


def not_found(resource: Resource, name: str) -> NotFound:
    """`pods "web" not found`"""
    return NotFound(f'{resource.qualified} "{name}" not found', **about(resource, name))


def already_exists(resource: Resource, name: str) -> AlreadyExists:
    """`pods "web" already exists`"""
    return AlreadyExists(f'{resource.qualified} "{name}" already exists', **about(resource, name))


def conflict(resource: Resource, name: str, why: str) -> Conflict:
    """`Operation cannot be fulfilled on pods "web": why`"""
    return Conflict(f'Operation cannot be fulfilled on {resource.qualified} "{name}": {why}', **about(resource, name))


def modified(resource: Resource, name: str) -> Conflict:
    """The optimistic lock's error."""
    why = "the object has been modified; please apply your changes to the latest version and try again"
    return conflict(resource, name, why)


class Cause(NamedTuple):
    """What is wrong with one field: its path and why, in the API server's words."""

    field: str
    why: str
    reason: str = "FieldValueInvalid"


def invalid(resource: Resource, name: str, *causes: Cause) -> Invalid:
    """`Deployment.apps "web" is invalid: spec.selector: why`"""
    kind = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    details = {**about(resource, name), "kind": resource.kind}
    told = ", ".join(f"{cause.field}: {cause.why}" for cause in causes)
    text = told if len(causes) == 1 else f"[{told}]"
    listed = [{"reason": cause.reason, "message": cause.why, "field": cause.field} for cause in causes]
    return Invalid(f'{kind} "{name}" is invalid: {text}', causes=listed, **details)
