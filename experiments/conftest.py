"""What the studies of this folder share: the reference profiles, and the rates that mean something on each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import pytest

from pytest_gpulab import Fleet, Profile, blocked

Value = TypeVar("Value")

PROFILES = {
    "t4": Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 9216}),
    "h100": Profile(model="llama-3.1-8b", accelerator="h100", engine_args={"max_model_len": 16384}),
    "h200": Profile(model="llama-3.1-8b", accelerator="h200", engine_args={"max_model_len": 16384}),
}


@pytest.fixture
def profile(reference: Callable[[Mapping[str, Profile]], Profile]) -> Profile:
    """The reference profile of the accelerator under test, with vLLM's own defaults."""
    return reference(PROFILES)


@pytest.fixture
def lasting(campaign: str) -> Callable[..., float]:
    """``lasting(300, rate, floor=150)``: seconds for which a study offers load at `rate` requests/s.

    That is the first number, unless a quick campaign measures: then only as long as `floor` requests take.
    """

    def seconds(duration_s: float, rate: float, *, floor: int) -> float:
        return min(duration_s, floor / rate) if campaign == "quick" else duration_s

    return seconds


STAGES = {"t4": "g4dn", "h100": "p5en", "h200": "p5en"}


@pytest.fixture
def deployed(reference) -> Callable[..., Fleet]:
    """``deployed(**fields)``: a Fleet with the cold start of the machine under test; from zero nodes unless told."""
    return lambda **fields: Fleet(**{"stages": reference(STAGES), **fields})


@pytest.fixture
def reference(accelerator: str) -> Callable[[Mapping[str, Value]], Value]:
    """Picks the value stated for the accelerator under test; blocked where none is."""

    def pick(by_accelerator: Mapping[str, Value]) -> Value:
        if accelerator not in by_accelerator:
            blocked(f"this study states no reference for {accelerator}, only for {', '.join(by_accelerator)}")
        return by_accelerator[accelerator]

    return pick
