"""An Endpoint: where an OpenAI-compatible server answers, and where its metrics are."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPResponse
from typing import IO, Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener


@dataclass(frozen=True)
class Endpoint:
    """A server under load. ValueError: a URL that is none, or would show a password.

    Attributes:
        url: its base, without ``/v1`` and without a slash at the end.
        model: what clients call the model.
        api_key: bearer token of requests below /v1; None: sends none. Never shown.
        metrics_urls: pages in Prometheus' text format, one a server process; their counters and gauges are summed.
            Empty: the server shows none.
        metrics_headers: gives what is sent with a request for metrics; asked before each, because a token may be
            good for minutes only. Never shown.
        metrics_ca: PEM file of the authority that signed for them; None: those that this machine trusts.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    metrics_urls: tuple[str, ...] = ()
    metrics_headers: Callable[[], Mapping[str, str]] = field(default=dict, repr=False, compare=False)
    metrics_ca: str | None = None

    def __post_init__(self) -> None:
        if any("@" in url for url in (self.url, *self.metrics_urls)):
            raise ValueError(  # without the URL, which holds a password
                "the URLs of an endpoint must come without USER:PASSWORD@, because records show them: cut it off; a "
                "key goes into the environment, for the target endpoint as GPULAB_API_KEY"
            )
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, got {self.url!r}")
        if self.url.rstrip("/").endswith("/v1"):
            raise ValueError(f"url must come without /v1, got {self.url!r}: cut it off")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    @property
    def headers(self) -> dict[str, str]:
        """Headers of requests below /v1."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def ask(self, path: str, timeout_s: float) -> HTTPResponse:
        """The answer to a GET of `path`, with the key. OSError: none came, a refusal, or a redirect."""
        return fetch(f"{self.url}{path}", timeout_s, self.headers)


def fetch(url: str, timeout_s: float, headers: Mapping[str, str] | None = None) -> HTTPResponse:
    """The answer to a GET of `url`. OSError: none came, a refusal, or a redirect.

    It takes the way of the load: past any proxy of the environment, which urllib would use even for loopback.
    """
    opener = build_opener(ProxyHandler({}), _NoRedirects)
    answer: HTTPResponse = opener.open(Request(url, headers=dict(headers or {})), timeout=timeout_s)
    return answer


class _NoRedirects(HTTPRedirectHandler):
    """The key is for the host that was asked; urllib would take it along to any other."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message[Any, Any], newurl: str
    ) -> NoReturn:
        there = urlsplit(newurl)
        where = f"{there.scheme}://{there.netloc.rpartition('@')[2]}"
        raise HTTPError(req.full_url, code, f"it redirects to {where}: give the URL that answers", headers, fp)


def distrust(url: str, failure: OSError) -> str:
    """Why this machine does not trust the certificate of `url`, and what to do; empty if that is not what failed."""
    reason = getattr(failure, "reason", failure)
    if not isinstance(reason, ssl.SSLCertVerificationError):
        return ""
    return (
        f"the certificate of {url} must be for that host and of an authority that this machine trusts, but: "
        f"{reason.verify_message}. Let SSL_CERT_FILE name the PEM file of the authority that signed it (it is "
        f"{os.environ.get('SSL_CERT_FILE') or 'not set'}), or give the server another certificate"
    )
