"""An arm in words: what it asked of what, in the words of an experiment and without what nobody stated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pytest_gpulab.record import RunSummary


def in_words(run: RunSummary) -> str:
    """Such as ``Poisson(rate=24), Shape(prompt_tokens=512, output_tokens=128), duration_s=60; llama-3.1-8b on h200,
    max_num_seqs=16``."""
    profile = run.profile
    served = [f"{profile['model']} on {profile['accelerator']}"]
    served += [f"{name}={profile[name]}" for name in ("instance_type", "price_usd_per_hour") if name in profile]
    served += _stated(profile.get("engine_args", {}), _defaults()["engine_args"])
    if "fleet" in profile:
        served.append(f"Fleet({', '.join(_stated(profile['fleet'], _defaults()['fleet']))})")
    asked = _stated(run.workload, _defaults()["workload"])
    return f"{', '.join(asked)}; {', '.join(served)}"


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    from pytest_gpulab.experiment import EngineArgs, Workload
    from pytest_gpulab.fleet import Fleet

    workload = {name: field.default for name, field in Workload.model_fields.items() if not field.is_required()}
    return {
        "engine_args": EngineArgs().model_dump(mode="json"),
        "fleet": Fleet().model_dump(mode="json"),
        "workload": {**workload, "admission": workload["admission"].model_dump(mode="json", exclude_none=True)},
    }


def _stated(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """``name=value`` of what differs from its default; what is of a kind needs no name."""
    for name, value in values.items():
        if name in defaults and value == defaults[name]:
            continue
        if isinstance(value, Mapping) and "kind" not in value and isinstance(defaults.get(name), Mapping):
            yield f"{name}=({', '.join(_stated(value, defaults[name]))})"
        else:
            yield _value(value) if isinstance(value, Mapping) and "kind" in value else f"{name}={_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = dict(value)
        name = "".join(word.capitalize() for word in str(parts.pop("kind", "")).split("-"))
        return f"{name}({', '.join(f'{part}={_value(inner)}' for part, inner in parts.items())})"
    if isinstance(value, list) and len(value) > _MOST_ITEMS:
        return f"({len(value)} of them)"
    if isinstance(value, list):
        return f"({', '.join(map(_value, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)


_MOST_ITEMS = 8
"""A trace of thousands of requests is not for reading."""
