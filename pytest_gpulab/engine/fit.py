"""Fits a calibration's coefficients to measured runs, by simulating them.

What a run takes is a chain of sums and maxima of the costs, so its figures are piecewise linear in the
coefficients. `fit_variant` therefore repeats: simulate all runs, take the slopes of every figure, solve the linear
least-squares problem in relative errors for coefficients >= 0, until the error no longer falls. Nothing here knows
what a coefficient means; the model is the one of `simulate`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.arrivals import schedule
from pytest_gpulab.engine.calibration import Calibration, CpuCost, FrontEndCost, GpuCost, Variant, variant_name
from pytest_gpulab.engine.defaults import scheduler_config
from pytest_gpulab.engine.measured import MeasuredRun, table_figures
from pytest_gpulab.engine.plan import Plan
from pytest_gpulab.engine.simulation import run_plan

Vector = NDArray[np.float64]

TERMS = tuple(
    (part, name)
    for part, cost in (("gpu", GpuCost), ("cpu", CpuCost), ("front_end", FrontEndCost))
    for name in cost.model_fields
)
"""The coefficients, in the order of a vector."""

START: Mapping[str, float] = {
    "gpu.step_s": 5e-3,
    "gpu.per_token_s": 2e-5,
    "gpu.per_decode_s": 1e-5,
    "gpu.per_context_token_s": 2e-8,
    "gpu.per_context_token_mixed_s": 3e-8,
    "gpu.per_attended_token_s": 5e-10,
    "cpu.step_s": 2e-3,
    "cpu.per_sequence_s": 1e-5,
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
"""Where a first fit starts: round numbers of the right order. They also give each term its scale."""

PRIOR_WEIGHT = 0.02
"""A coefficient that moves by all of its starting value costs as much as this relative error of one run. It keeps
terms that the runs do not determine where they start, and nothing else."""

OUTLIER = 0.1
"""Relative errors beyond this count linearly, not squared (Huber)."""

_MAX_ROUNDS = 20


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
        return cls(run, Plan(run.workload, schedule(run.workload, 0), config, variant_of(start()), eager))

    @property
    def measured(self) -> Vector:
        """The run's figures, in their own order."""
        return np.array(list(self.run.figures.values()))

    def predict(self, variant: Variant) -> Vector:
        """The same figures, simulated."""
        outcome = run_plan(replace(self.plan, variant=variant))
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


def start() -> Vector:
    """START as a vector."""
    return np.array([START[f"{part}.{name}"] for part, name in TERMS])


def vector_of(variant: Variant) -> Vector:
    """The coefficients of a variant."""
    return np.array([getattr(getattr(variant, part), name) for part, name in TERMS])


def variant_of(vector: Vector) -> Variant:
    """A variant with these coefficients and nothing known about its errors."""
    costs: dict[str, dict[str, float]] = {"gpu": {}, "cpu": {}, "front_end": {}}
    for (part, name), value in zip(TERMS, vector, strict=True):
        costs[part][name] = float(value)
    return Variant.model_validate({**costs, "relative_error": 0.0, "runs": 0})


def fit_vector(cases: Sequence[Case], prior: Vector, fixed: Iterable[str] = ()) -> Vector:
    """The coefficients that predict the cases best, starting from `prior`; those in `fixed` stay there."""
    free = np.array([f"{part}.{name}" not in set(fixed) for part, name in TERMS])
    vector, scale = prior.copy(), np.maximum(prior, start() * 0.01)
    best = _loss(cases, vector, prior, scale)
    for _ in range(_MAX_ROUNDS):
        target = _solve(cases, vector, prior, scale, free)
        for share in (1.0, 0.5, 0.2, 0.05):
            tried = vector + share * (target - vector)
            loss = _loss(cases, tried, prior, scale)
            if loss < best:
                break
        else:
            return vector
        vector, gain, best = tried, best - loss, loss
        if gain < 1e-3 * best:
            return vector
    return vector


def _weights(errors: Vector) -> Vector:
    """Of one run's figures: together they weigh 1, outliers less."""
    return np.sqrt(np.minimum(1.0, OUTLIER / np.maximum(np.abs(errors), 1e-12)) / len(errors))


def _loss(cases: Sequence[Case], vector: Vector, prior: Vector, scale: Vector) -> float:
    """Half the sum of squared relative errors (Huber beyond OUTLIER), and the prior's pull."""
    variant = variant_of(vector)
    total = float(np.sum((PRIOR_WEIGHT * (vector - prior) / scale) ** 2)) / 2
    for case in cases:
        error = np.abs(case.errors(variant))
        huber = np.where(error <= OUTLIER, error**2 / 2, OUTLIER * (error - OUTLIER / 2))
        total += float(huber.mean())
    return total


def _solve(cases: Sequence[Case], vector: Vector, prior: Vector, scale: Vector, free: NDArray[np.bool_]) -> Vector:
    """The best coefficients >= 0 if the figures were linear around `vector`."""
    nnls = _nnls()
    base = [case.errors(variant_of(vector)) for case in cases]
    columns = []
    for index in np.flatnonzero(free):
        nudged = vector.copy()
        step = 0.02 * max(vector[index], scale[index])
        nudged[index] += step
        variant = variant_of(nudged)
        slopes = [(case.errors(variant) - error) / step for case, error in zip(cases, base, strict=True)]
        columns.append(np.concatenate(slopes) * scale[index])
    weight = np.concatenate([_weights(error) for error in base])
    slope = np.stack(columns, axis=1) * weight[:, None]
    at, home = vector[free] / scale[free], prior[free] / scale[free]
    right = slope @ at - np.concatenate(base) * weight
    pull = PRIOR_WEIGHT * np.eye(len(at))
    solution, _ = nnls(np.vstack([slope, pull]), np.concatenate([right, PRIOR_WEIGHT * home]))
    result = vector.copy()
    result[free] = solution * scale[free]
    return result


def _nnls() -> Callable[..., tuple[Vector, float]]:
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise ImportError(
            "fitting a calibration needs scipy, which is not installed; pip install 'pytest-gpulab[fit]'"
        ) from error
    return nnls  # type: ignore[no-any-return]
