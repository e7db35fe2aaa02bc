"""The official client on the emulated server."""

from __future__ import annotations

import asyncio

import openai
import pytest

from pytest_gpulab.serving.tokens import decode, encode
from tests.serving.client import LONGEST, MODEL, VOCAB, golden, serving

HELLO = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi you"}]}]
HELLO_IDS = encode("system be kind user hi you assistant", VOCAB)


def with_client(scenario, **options):
    async def run():
        async with (
            serving(**options) as (server, _),
            openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0) as client,
        ):
            await scenario(client)

    asyncio.run(run())


def test_models():
    async def scenario(client):
        models = [model async for model in client.models.list()]
        assert [(model.id, model.owned_by, model.max_model_len) for model in models] == [(MODEL, "vllm", LONGEST)]

    with_client(scenario, api_key="secret")


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("one two three", [encode("one two three", VOCAB)]),
        (["a b", "c"], [[0, 1], [2]]),
        ([500, 501, 502], [[500, 501, 502]]),
        ([[500, 501], [502]], [[500, 501], [502]]),
    ],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_completions(prompt, ids):
    async def scenario(client):
        answer = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=6, temperature=0.3, stop=["\n"], seed=3
        )
        assert [choice.index for choice in answer.choices] == list(range(len(ids)))
        assert [choice.text for choice in answer.choices] == [decode(golden(each, 6, seed=3)) for each in ids]
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 6 * len(ids)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.system_fingerprint == "gpulab-emulated"

    with_client(scenario)


def test_default_length_of_completions_is_16():
    async def scenario(client):
        answer = await client.completions.create(model=MODEL, prompt="a")
        assert answer.usage.completion_tokens == 16

    with_client(scenario)


def test_streamed_completions():
    async def scenario(client):
        stream = await client.completions.create(
            model=MODEL, prompt=["a b", "c"], max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices == []
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 18)
        for index, ids in enumerate(([0, 1], [2])):
            parts = [c for chunk in chunks for c in chunk.choices if c.index == index]
            assert "".join(part.text for part in parts) == decode(golden(ids, 9))
            assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]

    with_client(scenario)


def test_chat():
    async def scenario(client):
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=7)
        choice = answer.choices[0]
        assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
        assert choice.message.content == decode(golden(HELLO_IDS, 7))
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(HELLO_IDS), 7)

    with_client(scenario)


def test_chat_without_max_tokens_ends_by_itself():
    async def scenario(client):
        first = await client.chat.completions.create(model=MODEL, messages=HELLO)
        again = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=None)
        assert first.choices[0].finish_reason == "stop"
        assert 64 <= first.usage.completion_tokens < 256
        assert again.choices[0].message.content == first.choices[0].message.content
        longest = await client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"ignore_eos": True})
        assert longest.usage.total_tokens == LONGEST
        assert longest.choices[0].finish_reason == "length"

    with_client(scenario, speed=200.0)


def test_a_completion_with_null_max_tokens_ends_by_itself():
    async def scenario(client):
        answer = await client.completions.create(model=MODEL, prompt="a b", extra_body={"max_tokens": None})
        assert answer.choices[0].finish_reason == "stop"
        assert 64 <= answer.usage.completion_tokens < 256

    with_client(scenario, speed=200.0)


def test_streamed_chat_with_running_usage():
    async def scenario(client):
        options = {"include_usage": True, "continuous_usage_stats": True}
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=5, stream=True, stream_options=options
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[0].choices[0].delta.content == ""
        text = "".join(choice.delta.content for chunk in chunks for choice in chunk.choices)
        assert text == decode(golden(HELLO_IDS, 5))
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert (counts[0], counts[-1]) == (0, 5)
        assert counts == sorted(counts)
        assert chunks[-1].choices == []

    with_client(scenario)


def test_errors_are_the_clients_exceptions():
    async def scenario(client):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError, match="maximum context length") as refused:
            await client.completions.create(model=MODEL, prompt=[400] * LONGEST)
        assert (refused.value.param, refused.value.type) == ("input_tokens", "BadRequestError")
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await client.completions.create(model=MODEL, prompt="a", max_tokens="many")
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()

    with_client(scenario, api_key="secret")
