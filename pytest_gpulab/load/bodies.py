"""Request bodies, encoded before the clock starts."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable

from pytest_gpulab.arrivals import FIRST_PROMPT_ID, PROMPT_ID_COUNT, Schedule, prompt_ids
from pytest_gpulab.experiment import Workload

Salt = tuple[int, ...]

SALT_TOKENS = 2
_LEAST_SALTED = 8
"""Shorter prompts fill no KV block: nothing of them is cached, and they need their tokens to be unique."""


def new_salt() -> Salt:
    """Token ids that start all prompts of one run.

    The prefix cache of a server that has seen the same seed before is cold for them: it finds a block by its
    tokens and all tokens before it.
    """
    return tuple(FIRST_PROMPT_ID + secrets.randbelow(PROMPT_ID_COUNT) for _ in range(SALT_TOKENS))


def encode_bodies(
    workload: Workload, schedule: Schedule, indices: Iterable[int], *, model: str, seed: int, salt: Salt
) -> list[bytes]:
    """Bodies for /v1/completions of the requests `indices` of a schedule, in that order.

    Prompts are token ids and unique (but for the shared prefix); the answer has exactly the scheduled number of
    tokens.
    """
    fields = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "ignore_eos": True,
    }
    head = json.dumps(fields, separators=(",", ":"))[:-1].encode()
    prompts, outputs = schedule["prompt_tokens"], schedule["output_tokens"]
    bodies = []
    for index in indices:
        ids = prompt_ids(workload, seed, index, int(prompts[index]))
        if len(ids) >= _LEAST_SALTED:
            ids[: len(salt)] = salt
        listed = str(ids.tolist()).replace(" ", "").encode()
        tokens = int(outputs[index])
        bodies.append(b'%s,"max_tokens":%d,"min_tokens":%d,"prompt":%s}' % (head, tokens, tokens, listed))
    return bodies
