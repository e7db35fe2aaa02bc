"""What the serving tests share: a small server to talk to, and an SSE reader that shares no code with it."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import aiohttp

from pytest_gpulab.experiment import Profile
from pytest_gpulab.serving import serve
from pytest_gpulab.serving.tokens import Content

MODEL = "qwen2.5-0.5b"
VOCAB = 151_936
LONGEST = 2048
PROFILE = Profile(model=MODEL, accelerator="t4", engine_args={"max_model_len": LONGEST})
FAST = 20.0


@asynccontextmanager
async def serving(profile=PROFILE, *, speed=FAST, **options):
    """A server and an HTTP session: (server, session)."""
    async with serve(profile, speed=speed, **options) as server, aiohttp.ClientSession() as session:
        yield server, session


async def post(session, url, body, path="/v1/completions", **options):
    """(status, decoded body)."""
    async with session.post(url + path, json=body, **options) as response:
        return response.status, await response.json()


def events(raw: bytes) -> list[dict]:
    """The JSON events of a stream, whose format is checked to the byte."""
    assert raw.endswith(b"\n\n")
    parts = raw[:-2].split(b"\n\n")
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts), parts
    assert parts[-1] == b"data: [DONE]"
    return [json.loads(part[6:]) for part in parts[:-1]]


async def stream(session, url, body, path="/v1/completions", **options) -> list[dict]:
    async with session.post(url + path, json={**body, "stream": True}, **options) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        return events(await response.read())


def golden(prompt: list[int], tokens: int, seed: int = 0) -> list[int]:
    """The token ids that answer a prompt."""
    content = Content(prompt, seed)
    return [content.answer(position) for position in range(tokens)]


async def scrape(session, url) -> dict[tuple[str, frozenset], float]:
    """Samples by name and labels (without model and engine), read by prometheus_client's own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    async with session.get(url + "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(await response.text()))
    return {
        (sample.name, frozenset(item for item in sample.labels.items() if item[0] not in ("model_name", "engine"))): (
            sample.value
        )
        for family in families
        for sample in family.samples
    }


def value(samples, name, **labels) -> float:
    return samples[f"vllm:{name}", frozenset(labels.items())]
