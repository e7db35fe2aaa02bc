"""Server-sent events, however the bytes are cut, against a reader of whole texts."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab.load.sse import EventStream

LINE_ENDS = ("\n", "\r\n", "\r")


def payloads_of(text: str) -> list[str]:
    """The payloads of a whole stream, by the words of the specification."""
    text = text.removeprefix("\ufeff")
    payloads, data = [], []
    lines = re.split("\r\n|\n|\r", text)
    for line in lines[:-1]:  # the last one has no end
        if line == "":
            if data:
                payloads.append("\n".join(data))
            data = []
        elif line == "data" or line.startswith("data:"):
            value = line[5:]
            data.append(value[1:] if value.startswith(" ") else value)
    return payloads


contents = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
lines = st.one_of(
    contents.map("data: {}".format),
    contents.map("data:{}".format),
    contents.map(": {}".format),
    st.sampled_from(["", "", "data", "event: message", "id: 1", "retry: 10", "nonsense", "database: 1"]),
)
streams = st.builds(
    lambda mark, parts: mark + "".join(line + end for line, end in parts),
    st.sampled_from(["", "", "\ufeff"]),
    st.lists(st.tuples(lines, st.sampled_from(LINE_ENDS)), max_size=20),
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(streams, st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cut_gives_the_same_events(text, places):
    stream = EventStream()
    got = [payload for piece in cut(text.encode(), places) for payload in stream.feed(piece)]
    assert [payload.decode() for payload in got] == payloads_of(text)


@given(st.lists(contents.filter(bool), min_size=1), st.sampled_from(LINE_ENDS))
def test_byte_by_byte(texts, end):
    stream = EventStream()
    data = "".join(f"data: {text}{end}{end}" for text in texts).encode()
    got = [payload for i in range(len(data)) for payload in stream.feed(data[i : i + 1])]
    assert [payload.decode() for payload in got] == texts


@pytest.mark.parametrize("tail", ["data: half", "data: whole line\n", "data: [DONE]\r"])
def test_an_event_without_its_end_is_none(tail):
    stream = EventStream()
    assert stream.feed(b"data: first\n\n" + tail.encode()) == [b"first"]


def test_a_code_point_in_two_reads():
    stream = EventStream()
    data = "data: \N{SNOWMAN}\n\n".encode()
    assert stream.feed(data[:7]) == []
    assert stream.feed(data[7:]) == ["\N{SNOWMAN}".encode()]
