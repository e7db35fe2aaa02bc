"""Calibrations: what one step and one request cost on a model, accelerator and number format.

They are JSON files in `calibrations/` and in the user's catalog, written by ``gpulab fit`` from measured runs;
nothing in them is typed in by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import resources
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from pytest_gpulab.accelerators import accelerators, find_accelerator
from pytest_gpulab.catalog import own_facts
from pytest_gpulab.definition import digest
from pytest_gpulab.experiment import Profile
from pytest_gpulab.models import find_model, models

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Coefficients(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class GpuCost(_Coefficients):
    """Seconds the GPU needs for one step.

    A step has nd decoding sequences that read ctx tokens of context in all, and pt prefill tokens that attend to
    pa = sum over prefills of chunk * (start + chunk / 2) tokens. It takes

        max(step_s, per_token_s * (nd + pt)) + per_decode_s * nd + per_context * ctx + per_attended_token_s * pa

    The first term is a roofline: the linear layers read all weights once (`step_s`), or compute on every token,
    whichever is longer. `per_decode_s` is what each sampled sequence adds. `per_context` is
    `per_context_token_s` in steps that only decode; together with prefills the attention kernel reads the
    context less efficiently, `per_context_token_mixed_s`.
    """

    step_s: Amount
    per_token_s: Amount
    per_decode_s: Amount
    per_context_token_s: Amount
    per_context_token_mixed_s: Amount
    per_attended_token_s: Amount


class CpuCost(_Coefficients):
    """Seconds the engine's CPU needs to prepare and launch one step.

    Preparing is `step_s` + `per_sequence_s` per decoding sequence + `per_prefill_s` per prompt (unpacking and
    hashing it compete for the same interpreter), handling the results included. Launching is
    free for decode-only steps (CUDA graphs). A step with prefill launches its attention kernels one by one
    (`launch_small_s`), and every kernel where it is larger than any graph (`SchedulerConfig.graph_tokens`,
    `launch_large_s`).
    """

    step_s: Amount
    per_sequence_s: Amount
    per_prefill_s: Amount
    launch_small_s: Amount
    launch_large_s: Amount


class FrontEndCost(_Coefficients):
    """Seconds of the API server's single CPU: to take a request in, and to stream tokens out.

    `per_output_token_s` is spent on each token that comes from the engine, `per_chunk_s` on each chunk sent to a
    client (one token, more when the server is late). `latency_s` is added to every answer and
    `prompt_token_latency_s` to every token of a prompt; they occupy nobody (network, wake-ups, other threads).
    """

    per_request_s: Amount
    per_prompt_token_s: Amount
    per_output_token_s: Amount
    per_chunk_s: Amount
    latency_s: Amount
    prompt_token_latency_s: Amount


class Variant(_Coefficients):
    """The costs of one number format, with how well they predict runs that were left out of the fit."""

    gpu: GpuCost
    cpu: CpuCost
    front_end: FrontEndCost
    relative_error: Annotated[float, Field(ge=0)]
    """How far absolute figures may be off: the larger of the two medians below; infinite: that was never found."""
    runs: int
    """How many measured runs the fit used."""
    traced_host: float = 1.0
    """How many times longer the host took in runs that were measured with tracing: fitted along with the costs, which
    are those without."""
    leave_one_out: dict[str, float] = {}
    """Median absolute relative error by figure, each run predicted by a fit without it."""
    open_loop: dict[str, float] = {}
    """Median and 90th percentile (``p50``, ``p90``) of the absolute relative errors of open-loop runs predicted by a
    fit of the closed-loop runs alone; empty without such runs."""
    assumed: dict[str, str] = {}
    """Coefficients that the runs determine less than the starting value did, and where that came from."""


class Calibration(_Coefficients):
    """One model on one accelerator."""

    name: str
    model: str
    accelerator: str
    vllm: str
    source: str
    """What was measured, by whom, when."""
    like: str = ""
    """The calibration whose coefficients, scaled by the data sheets, the fit started from; empty: the data sheet."""
    reserved_bytes: int
    """Device memory that weights, activations and CUDA graphs take from the KV cache beside the weights'
    own bytes (measured KV cache size subtracted from what `gpu_memory_utilization` allows)."""
    variants: dict[str, Variant]


def variant_name(profile: Profile) -> str:
    """The number format of `profile`: ``base``, ``fp8-kv``, ``fp8-weights``, or what else it asks for."""
    args = profile.engine_args
    parts = []
    if args.kv_cache_dtype != "auto":
        parts.append("fp8-kv")
    if args.quantization is not None:
        parts.append("fp8-weights" if args.quantization == "fp8" else args.quantization)
    return "+".join(parts) or "base"


def own_calibrations() -> Mapping[str, Calibration]:
    """Those in the user's catalog, by name. ValueError for a wrong file there.

    They take the place of shipped ones: whoever has measured a newer vLLM, or one more number format, knows better.
    """
    return own_facts("calibrations", Calibration)


def read_catalog() -> None:
    """ValueError for a wrong file in the user's catalog, and for a folder that is none."""
    models(), accelerators(), own_calibrations()


def calibration_names() -> list[str]:
    """The calibrations that exist, sorted: shipped, and in the user's catalog."""
    return sorted({*_shipped_names(), *own_calibrations()})


def load_calibration(name: str) -> Calibration:
    """The calibration called `name`; ValueError lists those that exist."""
    own = own_calibrations()
    if name in own:
        return own[name]
    if name not in _shipped_names():
        raise ValueError(
            f"no calibration {name!r}; there are: {', '.join(calibration_names())}; measure on the target vllm, fit "
            "with `gpulab fit`, and add the file with --gpulab-catalog"
        )
    return _shipped(name)


@cache
def _shipped_names() -> frozenset[str]:
    files = resources.files("pytest_gpulab.engine.calibrations").iterdir()
    return frozenset(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


@cache
def _shipped(name: str) -> Calibration:
    text = (resources.files("pytest_gpulab.engine.calibrations") / f"{name}.json").read_text()
    return Calibration.model_validate_json(text)


def costs_text(profile: Profile, calibration: Calibration) -> str:
    """What a Run says of its costs: ``t4-qwen2.5-0.5b base``.

    With the user's own calibration it says ``t4-qwen2.5-0.5b (own, 0b1f9e6a4c2d) base``. The digest is over the
    calibration, the model and the accelerator: runs are told apart when any of them was changed.
    """
    own = ""
    if calibration.name in own_calibrations():
        facts = (asdict(find_model(profile.model)), asdict(find_accelerator(profile.accelerator)))
        text = json.dumps((calibration.model_dump(mode="json"), *facts), sort_keys=True)
        own = f" (own, {digest(text)[:12]})"
    return f"{calibration.name}{own} {variant_name(profile)}"


def find_variant(profile: Profile, name: str | None = None) -> tuple[Calibration, Variant]:
    """The calibration and variant that serve `profile`; `name` None means the profile's own.

    ValueError when the calibration is missing, is of another model or accelerator, or lacks the number format.
    """
    calibration = load_calibration(name or f"{profile.accelerator}-{profile.model}")
    asked = (profile.accelerator, profile.model)
    if asked != (calibration.accelerator, calibration.model):
        raise ValueError(
            f"calibration {calibration.name!r} is of {calibration.model} on {calibration.accelerator}, the profile "
            f"is {profile.model} on {profile.accelerator}; there are: {', '.join(calibration_names())}"
        )
    variant = variant_name(profile)
    if variant not in calibration.variants:
        raise ValueError(
            f"calibration {calibration.name!r} has no number format {variant!r}, only "
            f"{', '.join(sorted(calibration.variants))}; measure all of them on the target vllm, fit them with "
            "`gpulab fit`, and add the file with --gpulab-catalog: it takes the place of this one"
        )
    return calibration, calibration.variants[variant]
