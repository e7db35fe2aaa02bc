"""What counts as a token, when it came, and whether an answer is whole."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab.load.answer import Answer


def chunk(*choices: dict, **fields: object) -> bytes:
    return b"data: " + json.dumps({"choices": list(choices), **fields}, ensure_ascii=False).encode() + b"\n\n"


def text(value: str = " a", **fields: object) -> dict:
    return {"index": 0, "text": value, "finish_reason": None, **fields}


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
DONE = b"data: [DONE]\n\n"


def read(*timed: tuple[float, bytes]) -> Answer:
    answer = Answer()
    for now, data in timed:
        answer.feed(data, now)
    return answer


def test_usage_alone_is_no_token_and_no_timestamp():
    answer = read((1.0, chunk(text())), (2.0, chunk(text())), (3.0, chunk(text())), (9.0, chunk(usage=USAGE) + DONE))
    assert (answer.first_token, answer.last_token) == (1.0, 3.0)
    assert (answer.tokens, answer.prompt_tokens, answer.usage_tokens) == (3, 7, 3)
    assert answer.done
    assert answer.error is None


def test_a_usage_block_may_come_without_a_list_of_choices():
    usage = b"data: " + json.dumps({"choices": None, "usage": USAGE}).encode() + b"\n\n"
    answer = read((1.0, chunk(text())), (9.0, usage + DONE))
    assert (answer.last_token, answer.tokens, answer.prompt_tokens, answer.error) == (1.0, 3, 7, None)


def test_usage_beside_choices():
    answer = read((1.0, chunk(text())), (2.0, chunk(text(finish_reason="length"), usage=USAGE)), (3.0, DONE))
    assert answer.last_token == 2.0
    assert answer.tokens == 3  # two chunks, of which one had two tokens
    assert answer.tokens_seen == 2


@pytest.mark.parametrize("value", ["", " ", "\N{REPLACEMENT CHARACTER}"])
def test_an_empty_text_is_a_token(value):
    answer = read((1.0, chunk(text(value))), (2.0, chunk(text(" b"))))
    assert (answer.first_token, answer.tokens_seen) == (1.0, 2)


def test_a_role_is_no_token():
    role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    word = {"index": 0, "delta": {"content": "hi"}, "finish_reason": None}
    empty = {"index": 0, "delta": {"content": ""}, "finish_reason": None}
    both = {"index": 0, "delta": {"role": "assistant", "content": "hi"}, "finish_reason": None}
    assert math.isnan(read((1.0, chunk(role))).first_token)
    answer = read((1.0, chunk(role)), (2.0, chunk(word)), (3.0, chunk(empty)))
    assert (answer.first_token, answer.last_token, answer.tokens_seen) == (2.0, 3.0, 2)
    assert read((1.0, chunk(both))).tokens_seen == 1


def test_token_ids_and_logprobs_say_how_many():
    ids = read((1.0, chunk(text(token_ids=[5, 6, 7]))), (2.0, chunk(text(token_ids=[]))))
    assert (ids.tokens_seen, ids.last_token) == (3, 1.0)
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1, -1]}
    assert read((1.0, chunk(text(logprobs=logprobs)))).tokens_seen == 2
    chat = {"index": 0, "delta": {"content": "ab"}, "logprobs": {"content": [{"token": "a"}, {"token": "b"}]}}
    assert read((1.0, chunk(chat))).tokens_seen == 2


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n',
        b'data: {"object": "error", "message": "EngineCore died"}\n\n',
    ],
)
def test_an_error_in_mid_stream(event):
    answer = read((1.0, chunk(text())), (2.0, event), (3.0, chunk(text()) + DONE))
    assert "EngineCore died" in (answer.error or "")
    assert answer.tokens_seen == 1


@pytest.mark.parametrize("event", [b"data: {broken\n\n", b"data: 5\n\n", b'data: "text"\n\n'])
def test_what_is_no_chunk_is_an_error(event):
    assert read((1.0, event)).error


def test_counts_of_a_stream_that_broke_off_are_those_seen():
    early = {**USAGE, "completion_tokens": 1}
    answer = read((1.0, chunk(text(), usage=early)), (2.0, chunk(text())))
    assert answer.tokens == 2


@given(st.lists(st.text(max_size=8), min_size=1, max_size=20), st.data())
def test_any_cut_gives_the_same_tokens(texts, data):
    stream = b": comment\n\n".join(chunk(text(value)) for value in texts) + chunk(usage=USAGE) + DONE
    places = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    edges = [0, *places, len(stream)]
    answer = read(*((float(end), stream[start:end]) for start, end in itertools.pairwise(edges)))
    assert answer.tokens_seen == len(texts)
    assert answer.done
    ends = [0]
    for value in texts:  # where in the stream each token's event ends
        ends.append(stream.index(b"\n\n", stream.index(chunk(text(value)), ends[-1])) + 2)
    assert answer.first_token == min(edge for edge in edges if edge >= ends[1])
    assert answer.last_token == min(edge for edge in edges if edge >= ends[-1])
