"""`simulate`: a profile under a workload in virtual time."""

from __future__ import annotations

from pytest_gpulab.arrivals import schedule
from pytest_gpulab.definition import digest
from pytest_gpulab.engine.calibration import Calibration, Variant, costs_text, find_variant
from pytest_gpulab.engine.defaults import scheduler_config
from pytest_gpulab.engine.jumping import NeedsStepping, run_jumping
from pytest_gpulab.engine.outcome import Outcome
from pytest_gpulab.engine.plan import Plan
from pytest_gpulab.engine.stepping import run_stepping
from pytest_gpulab.experiment import Profile, Workload, require_servable
from pytest_gpulab.run import Provenance, Run, end_of_run, offered_problems


def simulate(profile: Profile, workload: Workload, *, calibration: str | None = None, seed: int = 0) -> Run:
    """One run of `workload` on `profile`, simulated.

    Args:
        calibration: the name of the step costs, such as ``h200-llama-3.1-8b``; None: the profile's own.
        seed: of arrivals and shapes. The same definitions and seed give the same run.

    Raises:
        ValueError: the profile has a fleet, the calibration does not fit the profile, or a request of the workload
            is longer than ``max_model_len``.
        EngineRefused: no engine starts with the profile's arguments.
    """
    if profile.fleet is not None:
        raise ValueError(
            "engine.simulate has one server that is always there, got a profile with a fleet; call "
            "pytest_gpulab.cluster.fleet.simulate_fleet, or leave the fleet out"
        )
    require_servable(workload, profile)
    source, variant = find_variant(profile, calibration)
    plan = make_plan(profile, workload, source, variant, seed)
    outcome = run_plan(plan)
    requests = outcome.request_table(plan.schedule)
    return Run(
        requests=requests,
        server=outcome.server_table(),
        totals=outcome.totals,
        duration_s=end_of_run(requests, outcome.ended, workload.duration_s),
        provenance=Provenance(
            target="sim",
            basis="simulated",
            seed=seed,
            definition_hash=definition_hash(profile, workload),
            server=costs_text(profile, source),
            relative_error=variant.relative_error,
        ),
        problems=(*offered_problems(requests), *outcome.problems),
    )


def run_plan(plan: Plan) -> Outcome:
    """Simulate with the fastest driver that is exact for the plan."""
    try:
        return run_jumping(plan)
    except NeedsStepping:
        return run_stepping(plan)


def make_plan(profile: Profile, workload: Workload, calibration: Calibration, variant: Variant, seed: int) -> Plan:
    """What a driver needs: the schedule, the scheduler's settings and the costs."""
    return Plan(
        workload=workload,
        schedule=schedule(workload, seed),
        config=scheduler_config(profile, calibration.reserved_bytes),
        variant=variant,
        eager=profile.engine_args.enforce_eager,
    )


def definition_hash(profile: Profile, workload: Workload) -> str:
    """What a Run's provenance says of its two definitions."""
    return digest(profile.definition_hash + workload.definition_hash)
