"""The emulated tokenizer and the emulated model: words for token ids, and the tokens that answer a prompt.

No vocabulary of a real model is involved. One token is one short word of the letters a to z, one word of a prompt
is one token. What answers a prompt is a pure function of the prompt's token ids and the request's seed, so a client
can check every token it receives.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import overload

from pytest_gpulab.arrivals import FIRST_PROMPT_ID, PROMPT_ID_COUNT

_LETTERS = 26
_MASK = (1 << 64) - 1
_SHORTEST_ANSWER, _ANSWER_SPREAD = 64, 192
"""An answer without max_tokens has at least the first, and less than their sum."""


def word(token: int) -> str:
    """The word of a token id >= 0: a, b, ..., z, aa, ab, ..."""
    letters = ""
    token += 1
    while token:
        token, letter = divmod(token - 1, _LETTERS)
        letters = chr(ord("a") + letter) + letters
    return letters


def token_of(text: str, vocab_size: int) -> int:
    """The token id of a word. Words that no id below `vocab_size` has share ids, chosen by their checksum."""
    token = 0
    if len(text) <= 5 and text.isascii() and text.isalpha() and text.islower():
        for letter in text:
            token = token * _LETTERS + ord(letter) - ord("a") + 1
        if token <= vocab_size:
            return token - 1
    return FIRST_PROMPT_ID + zlib.crc32(text.encode("utf-8", "surrogatepass")) % PROMPT_ID_COUNT


def encode(text: str, vocab_size: int, most: int = -1) -> list[int]:
    """The token ids of a text, one a word: ``encode(decode(ids)) == ids``. At most the first `most` >= 0."""
    words = text.split(maxsplit=most)
    return [token_of(each, vocab_size) for each in (words if most < 0 else words[:most])]


def decode(tokens: Sequence[int]) -> str:
    """The text of token ids, each with a space before it: the texts of parts can be joined."""
    return "".join(f" {word(token)}" for token in tokens)


class Content(Sequence[int]):
    """A prompt and the endless answer to it, as one sequence of token ids. Length and iteration are the prompt's."""

    __slots__ = ("_key", "prompt")

    def __init__(self, prompt: Sequence[int], seed: int = 0) -> None:
        self.prompt = prompt
        digest = blake2b(array("q", prompt).tobytes(), digest_size=8, salt=(seed & _MASK).to_bytes(8, "little"))
        self._key = int.from_bytes(digest.digest(), "little")

    def __len__(self) -> int:
        return len(self.prompt)

    def __iter__(self) -> Iterator[int]:
        return iter(self.prompt)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        """Tokens by position; positions behind the prompt are answer. A slice has a start, a stop and no step."""
        if isinstance(index, int):
            return self[index : index + 1][0]
        known = len(self.prompt)
        answer = range(max(index.start, known) - known, max(index.stop, known) - known)
        return [*self.prompt[index], *map(self.answer, answer)]

    def answer(self, position: int) -> int:
        """Token `position` of the answer, 0 for the first."""
        return FIRST_PROMPT_ID + _mix(self._key + position) % PROMPT_ID_COUNT

    def natural_length(self) -> int:
        """Tokens of the answer when the request does not say how many."""
        return _SHORTEST_ANSWER + _mix(~self._key & _MASK) % _ANSWER_SPREAD


def _mix(number: int) -> int:
    """A 64-bit number that looks random (splitmix64)."""
    number = (number * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)
