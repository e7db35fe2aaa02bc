"""The emulated tokenizer and model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulab.engine.blocks import token_hashes
from pytest_gpulab.serving.tokens import Content, decode, encode, word

VOCAB = 128_256
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=30)


@settings(max_examples=40, deadline=None)
@given(IDS)
def test_ids_survive_text(ids):
    assert encode(decode(ids), VOCAB) == ids


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_any_text_has_one_token_a_word(text):
    ids = encode(text, VOCAB)
    assert len(ids) == len(text.split())
    assert all(0 <= token < VOCAB for token in ids)


def test_words_are_those_of_a_spreadsheet():
    assert [word(token) for token in (0, 25, 26, 27, 701, 702)] == ["a", "z", "aa", "ab", "zz", "aaa"]


def test_answers_stay_what_they_are():
    content = Content([300, 301, 302])
    assert [content.answer(position) for position in range(4)] == [7101, 19275, 17286, 11302]
    assert content[1:5] == [301, 302, 7101, 19275]
    assert Content([300, 301, 302], seed=1)[3:5] != content[3:5]


@settings(max_examples=40, deadline=None)
@given(IDS.filter(bool), st.integers(0, 50))
def test_answers_depend_on_the_prompt_alone(prompt, position):
    assert Content(prompt).answer(position) == Content(tuple(prompt)).answer(position)


def test_a_follow_up_finds_the_first_answer_in_the_cache():
    first = Content(list(range(300, 310)))
    follow_up = Content(first[0:48])
    cached, asked = token_hashes(first, 16), token_hashes(follow_up, 16)
    assert [cached(block) for block in range(3)] == [asked(block) for block in range(3)]
    assert cached(3) != asked(3)
