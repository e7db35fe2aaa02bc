"""What AWS refuses, in words that say what to do. Only AWS's code and message are kept: no request, no header."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_EXPIRED = {
    *("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"),
    *("InvalidClientTokenId", "UnrecognizedClientException", "AuthFailure"),
}
_DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "Client.UnauthorizedOperation"}
_SKEWED = ("Signature expired", "Signature not yet current")
"""In the message of a request that was signed at another time than AWS's."""
_THROTTLED = {"Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException"}


class AwsError(OSError):
    """AWS refused, or what was made there failed."""


class CredentialsError(AwsError):
    """AWS does not know the caller, or not any more."""


class DeadlineError(AwsError):
    """What AWS was to finish did not finish in time."""


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn what boto3 raises within the context into an AwsError that begins with `doing`, such as 'creating X'."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, TokenRetrievalError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as refusal:
        raise _refused(doing, error_code(refusal), refusal.response["Error"].get("Message", "")) from None
    except (NoCredentialsError, TokenRetrievalError) as absent:
        raise CredentialsError(f"{doing}: {absent}. Sign in to AWS, then repeat the command.") from None
    except (BotoCoreError, ResponseParserError) as failure:
        raise AwsError(f"{doing}: {failure}") from None


def error_code(refusal: Exception) -> str:
    """AWS's code for a refusal, such as ``AccessDenied``; empty if it has none."""
    response: dict[str, dict[str, str]] = getattr(refusal, "response", {})
    return response.get("Error", {}).get("Code", "")


def _refused(doing: str, code: str, message: str) -> AwsError:
    said = f"{doing}: AWS said {code}: {message.rstrip('.')}."
    if any(words in message for words in _SKEWED):
        return AwsError(f"{said} This machine's clock must agree with AWS's within minutes: set it, then repeat.")
    if code in _EXPIRED:
        return CredentialsError(f"{said} The credentials are not valid any more: sign in, then repeat the command.")
    if code in _DENIED:
        return AwsError(f"{said} The caller's policy must allow it: docs/eks.md lists what the target needs.")
    if code in _THROTTLED:
        return AwsError(f"{said} It stayed so through every retry: wait some minutes, then repeat the command.")
    return AwsError(said)
