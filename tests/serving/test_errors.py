"""Requests that vLLM refuses get vLLM's answers, and the server lives on."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.serving.client import LONGEST, MODEL, golden, post, serving

JSON = {"Content-Type": "application/json"}
GOOD = {"prompt": [400, 401], "max_tokens": 2, "return_token_ids": True}

INVALID = [
    (b'{"prompt": "a', "json_invalid", "body.11"),
    (b"", "missing", "body"),
    (b"[1]", "model_type", "body"),
    (b'"text"', "model_type", "body"),
    (b"\xff\xfe\xfd", "json_invalid", "body.0"),
    (b"[" * 100_000, "json_invalid", "body.0"),
    (b'{"prompt": "a", "max_tokens": "many"}', "int_parsing", "body.max_tokens"),
    (b'{"prompt": "a", "max_tokens": 1.5}', "int_from_float", "body.max_tokens"),
    (b'{"prompt": "a", "stream": "perhaps"}', "bool_parsing", "body.stream"),
    (b'{"prompt": "a", "temperature": []}', "float_type", "body.temperature"),
    (b'{"prompt": [1, -1]}', "greater_than_equal", "body.prompt.1"),
    (b'{"prompt": {"a": 1}}', "list_type", "body.prompt"),
    (b'{"prompt": "a", "stream_options": {"include_usage": true}}', "value_error", "stream_options"),
]


@pytest.fixture(scope="module")
def refusals():
    """Answers to INVALID and to others, all from one server, and the answer to a good request after each."""

    async def collect():
        async with serving() as (server, session):

            async def send(data, path="/v1/completions", headers=JSON):
                async with session.post(server.url + path, data=data, headers=headers) as response:
                    answer = response.status, await response.json()
                status, good = await post(session, server.url, GOOD)
                assert (status, good["choices"][0]["token_ids"]) == (200, golden([400, 401], 2))
                return answer

            answers = {data: await send(data) for data, *_ in INVALID}
            for name, body, path in BAD:
                answers[name] = await send(json.dumps(body).encode(), path)
            answers["text/plain"] = await send(b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
            return answers

    return asyncio.run(collect())


def completion(**fields):
    return {"prompt": [400] * 8, **fields}, "/v1/completions"


def chat(**fields):
    return {"messages": [{"role": "user", "content": "a b c"}], **fields}, "/v1/chat/completions"


BAD = [
    ("unknown model", *completion(model="gpt-5")),
    ("unknown chat model", *chat(model="gpt-5")),
    ("too long", *completion(prompt=[400] * LONGEST, max_tokens=1)),
    ("too long by default", *completion(prompt=[400] * (LONGEST - 15))),
    ("too much output", *completion(max_tokens=LONGEST)),
    ("no room", *chat(messages=[{"role": "user", "content": "a " * (LONGEST - 2)}])),
    ("too long a text", *chat(messages=[{"role": "user", "content": "a " * 3 * LONGEST}])),
    ("empty", *completion(prompt="")),
    ("nothing", *completion(prompt=None)),
    ("no tokens", *completion(prompt=[[]])),
    ("no prompts", *completion(prompt=[])),
    ("unknown token", *completion(prompt=[10**12])),
    ("no output", *completion(max_tokens=0)),
    ("negative min", *completion(min_tokens=-1)),
    ("min above max", *completion(min_tokens=5, max_tokens=4)),
    ("min above the room", *completion(max_tokens=None, min_tokens=LONGEST - 7)),
    ("chat min above the room", *chat(min_tokens=LONGEST)),
    ("temperature", *completion(temperature=-0.5)),
    ("nan", *completion(temperature=float("nan"))),
    ("top_p", *chat(top_p=0)),
    ("n 0", *completion(n=0)),
    ("n 2", *completion(n=2)),
    ("beams", *completion(use_beam_search=True)),
    ("cut", *completion(truncate_prompt_tokens=4)),
    ("chat cut", *chat(truncate_prompt_tokens=-1)),
    ("logprobs", *completion(logprobs=1)),
    ("chat logprobs", *chat(logprobs=True)),
    ("echo", *completion(echo=True)),
    ("image", *chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])),
]


@pytest.mark.parametrize(("data", "kind", "param"), INVALID, ids=[str(data[:40]) for data, *_ in INVALID])
def test_invalid_bodies(refusals, data, kind, param):
    status, body = refusals[data]
    error = body["error"]
    assert (status, error["code"], error["type"], error["param"]) == (400, 400, "Bad Request", param)
    assert "validation error" in error["message"].splitlines()[0]
    assert f"'{kind}'" in error["message"]
    assert len(error["message"]) < 4000


@pytest.mark.parametrize(
    ("name", "status", "kind", "param", "says"),
    [
        ("unknown model", 404, "NotFoundError", "model", "The model `gpt-5` does not exist."),
        ("unknown chat model", 404, "NotFoundError", "model", "The model `gpt-5` does not exist."),
        ("too long", 400, "BadRequestError", "input_tokens", f"maximum context length is {LONGEST} tokens"),
        ("too long by default", 400, "BadRequestError", "input_tokens", "requested 16 output tokens"),
        ("too much output", 400, "BadRequestError", "input_tokens", f"requested {LONGEST} output tokens"),
        ("no room", 400, "BadRequestError", None, f"length {LONGEST}"),
        ("too long a text", 400, "BadRequestError", "input_tokens", "requested 0 output tokens"),
        ("empty", 400, "BadRequestError", "prompt", "must be provided and non-empty"),
        ("nothing", 400, "BadRequestError", "prompt", "must be provided and non-empty"),
        ("no tokens", 400, "BadRequestError", None, "cannot be empty"),
        ("no prompts", 400, "BadRequestError", "prompt", "at least one prompt"),
        ("unknown token", 400, "BadRequestError", None, "Token id 1000000000000 is out of vocabulary"),
        ("no output", 400, "BadRequestError", "max_tokens", "max_tokens must be at least 1, got 0."),
        ("negative min", 400, "BadRequestError", "min_tokens", "greater than or equal to 0, got -1."),
        ("min above max", 400, "BadRequestError", "min_tokens", "less than or equal to max_tokens=4, got 5."),
        (
            *("min above the room", 400, "BadRequestError", "min_tokens"),
            f"less than or equal to max_tokens={LONGEST - 8}, got {LONGEST - 7}.",
        ),
        ("chat min above the room", 400, "BadRequestError", "min_tokens", f"got {LONGEST}."),
        ("temperature", 400, "BadRequestError", "temperature", "non-negative, got -0.5."),
        ("nan", 400, "BadRequestError", "temperature", "got nan."),
        ("top_p", 400, "BadRequestError", "top_p", "in (0, 1], got 0.0."),
        ("n 0", 400, "BadRequestError", "n", "n must be at least 1, got 0."),
        ("n 2", 400, "BadRequestError", "n", "n must be 1, got 2"),
        ("beams", 400, "BadRequestError", "use_beam_search", "must be false"),
        ("cut", 400, "BadRequestError", "truncate_prompt_tokens", "does not cut prompts"),
        ("chat cut", 400, "BadRequestError", "truncate_prompt_tokens", "does not cut prompts"),
        ("logprobs", 400, "BadRequestError", "logprobs", "logprobs"),
        ("chat logprobs", 400, "BadRequestError", "logprobs", "logprobs"),
        ("echo", 400, "BadRequestError", "echo", "echo"),
        ("image", 400, "BadRequestError", "messages", "got 'image_url'"),
        ("text/plain", 400, "Bad Request", "body", "Only 'application/json' is allowed"),
    ],
)
def test_refused_requests(refusals, name, status, kind, param, says):
    got, body = refusals[name]
    assert got == status
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["type"], body["error"]["param"], body["error"]["code"]) == (kind, param, status)
    assert says in body["error"]["message"]


def test_paths_methods_and_plain_routes():
    async def check():
        async with serving() as (server, session):
            async with session.get(server.url + "/v2") as response:
                assert response.status == 404
                error = {"message": "Not Found", "type": "Not Found", "param": None, "code": 404}
                assert await response.json() == {"error": error}
            async with session.get(server.url + "/v1/completions") as response:
                assert (response.status, response.headers["Allow"]) == (405, "POST")
                assert (await response.json())["error"]["type"] == "Method Not Allowed"
            for path in ("/health", "/ping"):
                async with session.get(server.url + path) as response:
                    assert (response.status, await response.read()) == (200, b"")
                    assert response.headers["x-gpulab-basis"] == "emulated"
            async with session.get(server.url + "/version") as response:
                assert (await response.json())["version"].startswith("0.32")
            status, body = await post(
                session, server.url, {"prompt": "ab cd", "return_token_strs": True}, "/tokenize"
            )
            assert status == 200
            assert body == {"count": 2, "max_model_len": LONGEST, "tokens": [27, 81], "token_strs": ["ab", "cd"]}

    asyncio.run(check())


def test_the_key_protects_v1_only():
    async def check():
        async with serving(api_key="secret") as (server, session):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
                for path in ("/v1/models", "/v1/nothing"):
                    async with session.get(server.url + path, headers=headers) as response:
                        assert (response.status, await response.json()) == (401, {"error": "Unauthorized"})
            async with session.get(server.url + "/v1/models", headers={"Authorization": "Bearer secret"}) as response:
                assert response.status == 200
            for path in ("/health", "/metrics", "/version"):
                async with session.get(server.url + path) as response:
                    assert response.status == 200

    asyncio.run(check())


def test_huge_bodies():
    """vLLM has no limit of bytes: it refuses the prompt as too long."""

    async def check():
        async with serving() as (server, session):
            huge = json.dumps({"model": MODEL, "prompt": "a " * 10_000_000}).encode()
            async with session.post(server.url + "/v1/completions", data=huge, headers=JSON) as response:
                assert response.status == 400
                assert (await response.json())["error"]["param"] == "input_tokens"
            mixed = json.dumps({"prompt": [1.5] * 300_000}).encode()
            async with session.post(server.url + "/v1/completions", data=mixed, headers=JSON) as response:
                assert response.status == 400
                assert len(await response.read()) < 5000
            assert (await post(session, server.url, GOOD))[0] == 200

    asyncio.run(check())
