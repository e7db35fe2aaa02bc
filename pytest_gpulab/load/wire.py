"""Shares and outcomes as single lines of text, for processes and pods that send shards."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from typing import Any

import numpy as np

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Workload
from pytest_gpulab.load.share import Outcome, Share


def share_to_line(share: Share) -> str:
    """A share as JSON. It holds the endpoint's API key: keep it out of arguments and logs.

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


def outcome_to_line(outcome: Outcome) -> str:
    """An outcome as base64 of a compressed npz."""
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


def outcome_from_line(line: str) -> Outcome:
    """The outcome of a line."""
    with np.load(io.BytesIO(base64.b64decode(line))) as file:
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
