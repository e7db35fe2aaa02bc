"""An Endpoint keeps its secrets: the key goes to its own host only, and no password is in what is shown of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import pytest

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Profile
from pytest_gpulab.kube import serving
from pytest_gpulab.load import pod
from pytest_gpulab.load.metrics import Scraper
from pytest_gpulab.targets.endpoint import EndpointTarget

SERVED = Profile(model="llama-3.1-8b", accelerator="h200")


@contextmanager
def server(redirects_to: str = "") -> Iterator[tuple[str, list[str | None]]]:
    """Its URL, and with which Authorization it was asked; it lists the model, or redirects."""
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_response(302 if redirects_to else 200)
            self.send_header("Location", f"{redirects_to}{self.path}?state=secret")
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": SERVED.model}]}).encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def ask_from_session(url: str) -> str:
    target = EndpointTarget(url, SERVED, "", Path("unused"), lambda line: None)
    return target._refusal(SERVED) or f"answers: {target.server(SERVED)}"


def ask_on_cluster(url: str) -> str:
    return "answers" if serving._answers(Endpoint(url, SERVED.model, api_key="s3cret")) else ""


def ask_from_pod(url: str) -> str:
    return pod._unreachable(Endpoint(url, SERVED.model, api_key="s3cret")) or "answers"


@pytest.mark.parametrize("ask", [ask_from_session, ask_on_cluster, ask_from_pod])
def test_a_proxy_is_passed_by_as_the_load_does(ask: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod, "_ANSWER_S", 0.0)
    monkeypatch.delenv("no_proxy", raising=False)
    with server() as (proxy, asked_proxy), server() as (url, _):
        monkeypatch.setenv("http_proxy", proxy)
        assert ask(url).startswith("answers")
    assert not asked_proxy


@pytest.mark.parametrize("ask", [ask_from_session, ask_on_cluster, ask_from_pod])
def test_a_redirect_does_not_take_the_key_along(ask: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPULAB_API_KEY", "s3cret")
    monkeypatch.setattr(pod, "_ANSWER_S", 0.0)
    with server() as (other, asked_there), server(other.replace("127.0.0.1", "u:pass@localhost")) as (url, asked):
        assert ask(other).startswith("answers") and set(asked_there) <= {"Bearer s3cret", None}
        asked_there.clear()
        said = ask(url)
    assert "Bearer s3cret" in asked and asked_there == []
    if said:
        assert f"it redirects to {other.replace('127.0.0.1', 'localhost')}: give the URL that answers" in said
        assert "secret" not in said and "pass" not in said


def test_a_redirect_of_the_metrics_is_not_followed() -> None:
    async def scrape(url: str) -> bool:
        endpoint = Endpoint(
            url, "m", metrics_urls=(f"{url}/metrics",), metrics_headers=lambda: {"Authorization": "Bearer s3cret"}
        )
        async with aiohttp.ClientSession() as session:
            return await Scraper(endpoint, session).read_all()

    with server() as (other, asked_there), server(other) as (url, asked):
        assert not asyncio.run(scrape(url))
    assert asked == ["Bearer s3cret"] and asked_there == []


@pytest.mark.parametrize("url", ["http://user:s3cret@host", "user:s3cret@host", "http://user:s3/cret@host/v1"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    for urls in ({"url": url}, {"url": "http://host", "metrics_urls": (url,)}):
        with pytest.raises(ValueError, match=r"without USER:PASSWORD@, .* GPULAB_API_KEY") as refused:
            Endpoint(model="m", **urls)  # type: ignore[arg-type]
        assert "s3" not in str(refused.value) and "user" not in str(refused.value)
