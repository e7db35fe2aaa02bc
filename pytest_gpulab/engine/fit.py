"""Fits a calibration's coefficients to measured runs, by simulating them.

What a run takes is a chain of sums and maxima of the costs, so its figures are piecewise linear in the
coefficients. `fit_vector` therefore repeats: simulate all runs, take the slopes of every figure, solve the linear
least-squares problem in relative errors for coefficients >= 0, until the error no longer falls. Nothing here knows
what a coefficient means; the model is the one of `simulate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.accelerators import find_accelerator
from pytest_gpulab.arrivals import schedule
from pytest_gpulab.engine.calibration import Calibration, CpuCost, FrontEndCost, GpuCost, Variant, variant_name
from pytest_gpulab.engine.defaults import bytes_per_block, scheduler_config, weight_bytes
from pytest_gpulab.engine.measured import FIGURES, SERVED_FIGURES, MeasuredRun, table_figures
from pytest_gpulab.engine.plan import Plan
from pytest_gpulab.engine.simulation import run_plan
from pytest_gpulab.models import find_model

Vector = NDArray[np.float64]

TERMS = tuple(
    (part, name)
    for part, cost in (("gpu", GpuCost), ("cpu", CpuCost), ("front_end", FrontEndCost))
    for name in cost.model_fields
)
"""The coefficients, in the order of a vector; behind them it holds `Variant.traced_host`."""

START: Mapping[str, float] = {
    "cpu.step_s": 2e-3,
    "cpu.per_sequence_s": 2e-5,
    "cpu.per_prefill_s": 3e-4,
    "cpu.launch_small_s": 5e-3,
    "cpu.launch_large_s": 1.5e-2,
    "front_end.per_request_s": 1e-3,
    "front_end.per_prompt_token_s": 5e-7,
    "front_end.per_output_token_s": 2e-5,
    "front_end.per_chunk_s": 4e-5,
    "front_end.latency_s": 1e-3,
    "front_end.prompt_token_latency_s": 1e-6,
}
"""Where the terms of the host start: round numbers of the right order for vLLM's V1 engine."""

_PER_DECODE_S = 5e-6
_PER_DECODE_V0_S = 1e-4
"""The V0 engine (before 0.10) prepares each sequence while the GPU waits: the GPU terms carry the host's time."""

ATTAINED = 0.7
"""Share of the data sheet's figures that a good kernel attains."""

PRIOR_WEIGHT = 0.1
"""A coefficient that moves by all of its starting value costs as much as this relative error in all figures of one
run. So terms that the runs do not determine stay near where they start."""

OUTLIER = 0.1
"""Relative errors beyond this count linearly, not squared (Huber)."""

_HALF_CACHE = (0.5, "half the bytes")
_SLOW_CACHE = (4.0, "no FP8 hardware, the kernel converts the cache")
VARIANT_FACTORS: Mapping[tuple[str, str], Mapping[str, tuple[float, str]]] = {
    ("h200", "fp8-kv"): {
        "gpu.per_context_token_s": _HALF_CACHE,
        "gpu.per_context_token_mixed_s": _HALF_CACHE,
    },
    ("h200", "fp8-weights"): {
        "gpu.step_s": (0.5, "half the bytes"),
        "gpu.per_token_s": (0.5, "twice the operations per second"),
    },
    ("t4", "fp8-kv"): {
        "gpu.per_context_token_s": _SLOW_CACHE,
        "gpu.per_context_token_mixed_s": _SLOW_CACHE,
        "gpu.per_attended_token_s": _SLOW_CACHE,
    },
}
"""What a number format should change on an accelerator: a variant starts from the base's coefficients times these."""

_MAX_ROUNDS = 20
_RELATIVE_GAIN = 1e-3  # stop when a round improves less


_NUDGE = 0.02  # relative step of the slopes


def variant_of(vector: Vector) -> Variant:
    """A variant with these coefficients and nothing known about its errors."""
    costs: dict[str, dict[str, float]] = {"gpu": {}, "cpu": {}, "front_end": {}}
    for (part, name), value in zip(TERMS, vector[:-1], strict=True):
        costs[part][name] = float(value)
    return Variant.model_validate({**costs, "traced_host": vector[-1], "relative_error": math.inf, "runs": 0})


def _traced(variant: Variant) -> Variant:
    """The variant on a host that tracing slows down."""
    slower = {
        part: cost.model_copy(update={name: value * variant.traced_host for name, value in cost})
        for part, cost in (("cpu", variant.cpu), ("front_end", variant.front_end))
    }
    return variant.model_copy(update=slower)


_NOTHING = variant_of(np.zeros(len(TERMS) + 1))


@dataclass(frozen=True)
class Case:
    """A measured run, ready to be predicted as often as needed."""

    run: MeasuredRun
    plan: Plan

    @classmethod
    def of(cls, run: MeasuredRun) -> Case:
        """Raises what `simulate` raises for the run's profile and workload."""
        config = scheduler_config(run.profile)
        if run.kv_cache_tokens:
            config = replace(config, num_blocks=run.kv_cache_tokens // config.block_size + 1)
        eager = run.profile.engine_args.enforce_eager
        return cls(run, Plan(run.workload, schedule(run.workload, run.seed), config, _NOTHING, eager))

    @property
    def measured(self) -> Vector:
        """The run's figures, in their own order."""
        return np.array(list(self.run.figures.values()))

    def predict(self, variant: Variant) -> Vector:
        """The same figures, simulated."""
        outcome = run_plan(replace(self.plan, variant=_traced(variant) if self.run.traced else variant))
        table = outcome.request_table(self.plan.schedule)
        table["ok"] &= table["last_token"] <= self.run.until_s
        if not table["ok"].any():
            return np.full(len(self.run.figures), np.inf)
        figures = table_figures(table)
        return np.array([figures[name] for name in self.run.figures])

    def errors(self, variant: Variant) -> Vector:
        """Relative errors of the prediction, one a figure. Rates count as time per unit."""
        ratio = self.predict(variant) / self.measured
        rates = np.array([name.endswith("_per_s") for name in self.run.figures])
        return np.where(rates, 1 / ratio, ratio) - 1


def start(model_name: str, accelerator: str, engine: str = "") -> Vector:
    """Where a first fit starts: the data sheet for the GPU, START for the host; `engine` is vLLM's version."""
    model = find_model(model_name)
    bytes_per_s, operations_per_s = (ATTAINED * peak for peak in _sheet(accelerator))
    context_s = model.kv_bytes_per_token(2) / bytes_per_s
    values = {
        **START,
        "gpu.step_s": 2 * model.parameters / bytes_per_s,
        "gpu.per_token_s": 2 * model.parameters / operations_per_s,
        "gpu.per_decode_s": _PER_DECODE_V0_S if engine.startswith("0.9.") else _PER_DECODE_S,
        "gpu.per_context_token_s": context_s,
        "gpu.per_context_token_mixed_s": 1.5 * context_s,
        "gpu.per_attended_token_s": 4 * model.layers * model.hidden_size / operations_per_s,
    }
    return np.array([*(values[f"{part}.{name}"] for part, name in TERMS), 1.0])


_MEMORY_TERMS = ("gpu.step_s", "gpu.per_context_token_s", "gpu.per_context_token_mixed_s")
_COMPUTE_TERMS = ("gpu.per_token_s", "gpu.per_attended_token_s")


def start_like(known: Calibration, accelerator: str) -> Vector:
    """Where a first fit starts when the model is calibrated on another accelerator with the same kind of host.

    Reading takes longer as the memory is slower, computing as the operations are, and the host as long as there.
    """
    ratios = [there / here for there, here in zip(_sheet(known.accelerator), _sheet(accelerator), strict=True)]
    slower = dict.fromkeys(_MEMORY_TERMS, ratios[0]) | dict.fromkeys(_COMPUTE_TERMS, ratios[1])
    factors = [slower.get(f"{part}.{name}", 1.0) for part, name in TERMS]
    return vector_of(known.variants["base"].model_copy(update={"traced_host": 1.0})) * [*factors, 1.0]


def _sheet(name: str) -> tuple[float, float]:
    accelerator = find_accelerator(name)
    return accelerator.bytes_per_s, accelerator.operations_per_s


def vector_of(variant: Variant) -> Vector:
    """The coefficients of a variant, and how much longer tracing makes the host take."""
    return np.array([*(getattr(getattr(variant, part), name) for part, name in TERMS), variant.traced_host])


def fit_vector(cases: Sequence[Case], prior: Vector) -> Vector:
    """The coefficients that predict the cases best, starting from `prior` (each of them above 0).

    Without cases it is the prior: what an arm that nothing else was measured beside is predicted by.
    """
    if not cases:
        return prior
    vector = prior.copy()
    best = _loss(cases, vector, prior)
    for _ in range(_MAX_ROUNDS):
        target = _solve(cases, vector, prior)
        for share in (1.0, 0.5, 0.2, 0.05):
            tried = vector + share * (target - vector)
            loss = _loss(cases, tried, prior)
            if loss < best:
                break
        else:
            return vector
        vector, gain, best = tried, best - loss, loss
        if gain < _RELATIVE_GAIN * best:
            return vector
    return vector


def _weights(errors: Vector) -> Vector:
    """Of one run's figures: together they weigh 1, outliers less."""
    return np.sqrt(np.minimum(1.0, OUTLIER / np.maximum(np.abs(errors), 1e-12)) / len(errors))


def _loss(cases: Sequence[Case], vector: Vector, prior: Vector) -> float:
    """Half the sum of squared relative errors (Huber beyond OUTLIER), and the prior's pull."""
    variant = variant_of(vector)
    total = float(np.sum((PRIOR_WEIGHT * (vector - prior) / prior) ** 2)) / 2
    for case in cases:
        error = np.abs(case.errors(variant))
        huber = np.where(error <= OUTLIER, error**2 / 2, OUTLIER * (error - OUTLIER / 2))
        total += float(huber.mean())
    return total


def _solve(cases: Sequence[Case], vector: Vector, prior: Vector) -> Vector:
    """The best coefficients >= 0 if the figures were linear around `vector`."""
    slope, error = _linear(cases, vector, prior)
    right = slope @ (vector / prior) - error
    pull = PRIOR_WEIGHT * np.eye(len(prior))
    solution, _ = _nnls()(np.vstack([slope, pull]), np.concatenate([right, np.full(len(prior), PRIOR_WEIGHT)]))
    return solution * prior


def _linear(cases: Sequence[Case], vector: Vector, prior: Vector) -> tuple[Vector, Vector]:
    """Weighted relative errors at `vector`, shape (figures,), and their slopes per `prior`, (figures, terms)."""
    base = [case.errors(variant_of(vector)) for case in cases]
    columns = []
    for index in range(len(vector)):
        nudged = vector.copy()
        step = _NUDGE * max(vector[index], prior[index])
        nudged[index] += step
        variant = variant_of(nudged)
        slopes = [(case.errors(variant) - error) / step for case, error in zip(cases, base, strict=True)]
        columns.append(np.concatenate(slopes) * prior[index])
    weight = np.concatenate([_weights(error) for error in base])
    return np.stack(columns, axis=1) * weight[:, None], np.concatenate(base) * weight


def _nnls() -> Callable[..., tuple[Vector, float]]:
    try:
        from scipy.optimize import nnls
    except ModuleNotFoundError as error:
        raise ImportError(
            "fitting a calibration needs scipy, which is not installed; pip install 'pytest-gpulab[fit]'"
        ) from error
    return nnls  # type: ignore[no-any-return]


# --- how good it is -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """One run as a fit without it predicts it: relative errors by figure."""

    run: MeasuredRun
    errors: Mapping[str, float]


def predict(cases: Iterable[Case], vector: Vector) -> list[Prediction]:
    """Errors of the cases under the coefficients."""
    variant = variant_of(vector)
    return [
        Prediction(case.run, dict(zip(case.run.figures, map(float, case.errors(variant)), strict=True)))
        for case in cases
    ]


def leave_one_out(cases: Sequence[Case], prior: Vector) -> list[Prediction]:
    """Each case predicted by a fit without it, nor any other of its arm, which starts from `prior` again."""
    arms: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        arms.setdefault(case.run.arm or str(index), []).append(index)
    rest = [[case for index, case in enumerate(cases) if index not in arm] for arm in arms.values()]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        vectors = list(pool.map(fit_vector, rest, [prior] * len(rest)))
    left_out = zip(arms.values(), vectors, strict=True)
    return [one for arm, vector in left_out for one in predict([cases[index] for index in arm], vector)]


def open_from_closed(cases: Sequence[Case], prior: Vector) -> list[Prediction]:
    """The open-loop cases, predicted by a fit of the closed-loop ones; empty unless there are both."""
    closed = [case for case in cases if not case.run.open_loop]
    opened = [case for case in cases if case.run.open_loop]
    return predict(opened, fit_vector(closed, prior)) if closed and opened else []


def absolute_errors(predictions: Iterable[Prediction], figures: Iterable[str] = SERVED_FIGURES) -> Vector:
    """All absolute relative errors of these figures."""
    wanted = set(figures)
    return np.array([abs(e) for one in predictions for name, e in one.errors.items() if name in wanted])


# --- a calibration ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitReport:
    """A calibration and how each run was predicted without it, by variant."""

    calibration: Calibration
    left_out: Mapping[str, Sequence[Prediction]]
    opened: Mapping[str, Sequence[Prediction]]


def fit_calibration(
    runs: Sequence[MeasuredRun], *, source: str, like: Calibration | None = None, check: bool = True
) -> FitReport:
    """Fit all number formats that the runs of one model on one accelerator have.

    Args:
        runs: of one model and accelerator, with base runs among them.
        source: what was measured, by whom, when.
        like: the same model's on another accelerator, to start from; None: start from the data sheet.
        check: also find the errors, which takes as many fits as there are runs.
    """
    by_variant: dict[str, list[Case]] = {}
    for run in runs:
        if run.profile.engine_args.num_gpu_blocks_override is None:  # short of blocks: kept to check the engine with
            by_variant.setdefault(variant_name(run.profile), []).append(Case.of(run))
    if "base" not in by_variant:
        raise ValueError(f"a calibration needs runs of the base format, got only {', '.join(by_variant)}")
    profile = by_variant["base"][0].run.profile
    if like is not None and like.model != profile.model:
        raise ValueError(f"the calibration to start from must be of {profile.model}, {like.name} is of {like.model}")
    sheet = start_like(like, profile.accelerator) if like else start(profile.model, profile.accelerator, runs[0].vllm)
    base = fit_vector(by_variant["base"], sheet)
    variants, left_out, opened = {}, {}, {}
    for name in ["base", *sorted(by_variant.keys() - {"base"})]:
        cases = by_variant[name]
        factors = _format_factors(profile.accelerator, name, like)
        prior = sheet if name == "base" else _from_base(base, factors, sheet)
        vector = base if name == "base" else fit_vector(cases, prior)
        left_out[name] = leave_one_out(cases, prior) if check else []
        opened[name] = open_from_closed(cases, prior) if check else []
        variants[name] = variant_of(vector).model_copy(
            update={
                "runs": len(cases),
                "assumed": _assumed(cases, vector, prior, None if name == "base" else factors, like),
                **_error_fields(left_out[name], opened[name]),
            }
        )
    calibration = Calibration(
        name=f"{profile.accelerator}-{profile.model}",
        model=profile.model,
        accelerator=profile.accelerator,
        vllm=runs[0].vllm,
        source=source,
        like=like.name if like else "",
        reserved_bytes=_reserved_bytes(by_variant["base"]),
        variants=variants,
    )
    return FitReport(calibration, left_out, opened)


def _format_factors(accelerator: str, name: str, like: Calibration | None) -> Mapping[str, tuple[float, str]]:
    """What a number format should change, with the reason: on the GPU what it does in `like`, if that has it."""
    if like is None or name not in like.variants:
        return VARIANT_FACTORS.get((accelerator, name), {})
    base, variant, reason = like.variants["base"].gpu, like.variants[name].gpu, f"as in {like.name}"
    terms = [term for part, term in TERMS if part == "gpu" and getattr(base, term) > 0]
    return {f"gpu.{term}": (getattr(variant, term) / getattr(base, term), reason) for term in terms}


def _from_base(base: Vector, factors: Mapping[str, tuple[float, str]], sheet: Vector) -> Vector:
    """Where a variant starts: the base's coefficients times what the format should change."""
    scaled = base * [*(factors.get(f"{part}.{term}", (1.0, ""))[0] for part, term in TERMS), 1.0]
    return np.maximum(scaled, 0.01 * sheet)


def _assumed(
    cases: Sequence[Case],
    vector: Vector,
    prior: Vector,
    factors: Mapping[str, tuple[float, str]] | None,
    like: Calibration | None,
) -> dict[str, str]:
    """The coefficients whose slopes weigh less than the prior: the runs hardly see them. `factors`: of a variant."""
    slope, _ = _linear(cases, vector, prior)
    assumed = {}
    for (part, term), seen in zip(TERMS, np.linalg.norm(slope[:, :-1], axis=0), strict=True):
        if seen >= PRIOR_WEIGHT:
            continue
        key = f"{part}.{term}"
        if factors is None and like is not None:
            assumed[key] = f"{like.name}, scaled by the data sheets"
        elif factors is None:
            assumed[key] = "the data sheet" if part == "gpu" else "a round number for vLLM's V1 engine"
        else:
            factor, reason = factors.get(key, (1.0, "the format does not change it"))
            assumed[key] = f"the base's, times {factor:g}: {reason}"
    return assumed


def _error_fields(left_out: Sequence[Prediction], opened: Sequence[Prediction]) -> dict[str, Any]:
    if not left_out:
        return {}
    by_figure = {name: errors for name in FIGURES if len(errors := absolute_errors(left_out, [name]))}
    medians = [float(np.median(absolute_errors(left_out, FIGURES)))]
    open_loop = {}
    if opened:
        errors = absolute_errors(opened)
        open_loop = {"p50": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9))}
        medians.append(open_loop["p50"])
    return {
        "relative_error": max(medians),
        "leave_one_out": {name: float(np.median(errors)) for name, errors in by_figure.items()},
        "open_loop": open_loop,
    }


def _reserved_bytes(cases: Sequence[Case]) -> int:
    """From the first run with vLLM's default token budget: what neither weights nor KV cache took; 0: unknown."""
    for case in cases:
        profile, args = case.run.profile, case.run.profile.engine_args
        if case.run.kv_cache_tokens and not (args.max_num_batched_tokens or args.num_gpu_blocks_override):
            memory = find_accelerator(profile.accelerator).memory_bytes
            blocks = case.run.kv_cache_tokens // args.block_size
            return (
                math.ceil(memory * args.gpu_memory_utilization)
                - weight_bytes(find_model(profile.model), args.quantization)
                - blocks * bytes_per_block(profile)
            )
    return 0
