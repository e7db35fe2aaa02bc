"""Shares and outcomes as lines of text, for processes and pods that send shards."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Workload
from pytest_gpulab.load.share import Outcome, Share


def share_to_line(share: Share) -> str:
    """A share as JSON. It holds the endpoint's API key, if any: keep it out of arguments and logs.

    Who sends reads no metrics, so the way to them stays behind.
    """
    plain = {
        **{name: getattr(share, name) for name in ("seed", "salt", "longest_answer_s", "index", "count")},
        "workload": share.workload.model_dump(mode="json"),
        "endpoint": {name: getattr(share.endpoint, name) for name in ("url", "model", "api_key")},
    }
    return json.dumps(plain)


def share_from_line(line: str, *, index: int | None = None) -> Share:
    """The share of a line; `index` replaces its own."""
    plain: dict[str, Any] = json.loads(line)
    endpoint = plain.pop("endpoint")
    plain["salt"] = tuple(plain["salt"])
    if index is not None:
        plain["index"] = index
    return Share(
        **{**plain, "workload": Workload.model_validate(plain["workload"]), "endpoint": Endpoint(**endpoint)}
    )


PART_CHARACTERS = 12_000
"""Container runtimes cut lines of a log after 16 KiB."""


def outcome_to_parts(outcome: Outcome) -> list[str]:
    """An outcome as base64 of a compressed npz, in parts: ``NUMBER/OF TEXT``, numbers from 0."""
    text = _outcome_to_text(outcome)
    parts = [text[start : start + PART_CHARACTERS] for start in range(0, len(text), PART_CHARACTERS)]
    return [f"{number}/{len(parts)} {part}" for number, part in enumerate(parts)]


def outcome_of_parts(parts: Iterable[str]) -> Outcome | None:
    """The outcome, whatever the order of its parts, some of which may come twice; None while one is missing.

    ValueError: they do not fit together.
    """
    found: dict[int, str] = {}
    count = 0
    for part in parts:
        place, _, text = part.partition(" ")
        number, _, of = place.partition("/")
        count = int(of)
        found[int(number)] = text
    if not count or len(found) < count:
        return None
    return _outcome_from_text("".join(found[number] for number in range(count)))


def _outcome_to_text(outcome: Outcome) -> str:
    plain = {
        "failures": outcome.failures,
        "counts": outcome.counts,
        "cpu_s": outcome.cpu_s,
        "ended_s": outcome.ended_s,
        "interrupted": outcome.interrupted,
    }
    file = io.BytesIO()
    np.savez_compressed(
        file,
        plain=np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8),
        requests=outcome.requests,
        send_lag_s=outcome.send_lag_s,
        loop_lag_s=outcome.loop_lag_s,
    )
    return base64.b64encode(file.getvalue()).decode()


def _outcome_from_text(text: str) -> Outcome:
    """The archive has a checksum of each of its members."""
    with np.load(io.BytesIO(base64.b64decode(text))) as file:
        plain = json.loads(file["plain"].tobytes())
        return Outcome(
            requests=file["requests"],
            send_lag_s=file["send_lag_s"],
            loop_lag_s=file["loop_lag_s"],
            failures=Counter(plain["failures"]),
            counts=Counter(plain["counts"]),
            cpu_s=plain["cpu_s"],
            ended_s=plain["ended_s"],
            interrupted=plain["interrupted"],
        )
