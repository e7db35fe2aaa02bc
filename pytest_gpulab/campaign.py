"""How long a campaign will take, said before it starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pytest_gpulab.experiment import ClosedLoop, Profile, Trace, Workload
from pytest_gpulab.lab import Repeat
from pytest_gpulab.measurement import Measurement
from pytest_gpulab.record import Decision, Evidence, Record
from pytest_gpulab.run_store import Question, RunStore
from pytest_gpulab.targets import Target

if TYPE_CHECKING:
    import pytest

SERVER_START_S = 95.0
"""From one server's stop to the next one's first answer: an 8B model on an H200, vLLM 0.25.1."""

FLEET_START_S = 432.0
"""From zero nodes to warm replicas: the middle of what `cluster.durations` has of g4dn.xlarge."""

FLEET_END_S = 60.0
"""From the last answer to zero nodes: drain and termination there."""

_SECONDS_PER_REQUEST = 5.0
"""Of a closed loop, whose length nobody knows before: one user's wait for one answer."""

_PLANNING_LIMIT_S = 120.0

_WRITERS = {
    "cacheprovider": "-ocache_dir={folder}/cache",
    "html": "--html=",
    "junitxml": "--junitxml=",
    "logging": "--log-file=",
    "tmpdir": "--basetemp={folder}/tmp",
}
"""What keeps plugins of a session that is only played through from writing where the real one does."""


def announcer(tell: Callable[[str], None]) -> Callable[[Sequence[Repeat]], None]:
    """A listener for the Lab that tells which runs come, and how long they will take."""

    def announce(pending: Sequence[Repeat]) -> None:
        if not pending:
            return
        arms = ", ".join(dict.fromkeys(arm.label for arm, _ in pending))
        tell(f"{len(pending)} runs of {arms}: about {time_text(estimate_s(arm for arm, _ in pending))}")

    return announce


def forecast(config: pytest.Config, store: RunStore, target: Target) -> str:
    """What the session that `config` describes will measure, in a line: the simulator plays it through first."""
    records = _played_through(config)
    if not records:
        return "no forecast: the simulator could not play the session through, or took too long"
    planned = list(chain.from_iterable(map(_questions, records)))
    missing = [question for question in planned if not store.servers(question)]
    served = [question for question in missing if target.server(question.profile)]
    measured = len(planned) - len(missing)
    blocked = len(missing) - len(served)
    others = f"; {blocked} more are of profiles that this target cannot serve" if blocked else ""
    unplayed = ", ".join(chain.from_iterable(map(_unplayed, records)))
    others += f"; not counted, because the simulator cannot play it through: {unplayed}" if unplayed else ""
    if not served:
        return (
            "nothing is known to be left to measure, if the simulator is right about what the gates need: "
            f"{measured} runs are already measured{others}"
        )
    return (
        f"the campaign is about {time_text(estimate_s(served))}, if the simulator is right about what its gates "
        f"need: {len(served)} runs, {measured} are already measured{others}"
    )


def _played_through(config: pytest.Config) -> list[Record]:
    """What the simulator makes of the session; empty if it could not."""
    with TemporaryDirectory(prefix="gpulab-plan-") as folder:
        options = ["--gpulab-target=plan", f"--gpulab-report-dir={folder}", "--gpulab-gate="]
        for plugin, option in _WRITERS.items():
            if config.pluginmanager.has_plugin(plugin):
                options.append(option.format(folder=folder))
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, *options]
        try:
            subprocess.run(
                command, cwd=config.invocation_params.dir, capture_output=True, timeout=_PLANNING_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return []
        return [Record.model_validate_json(path.read_bytes()) for path in Path(folder).glob("decision-record*.json")]


def _questions(record: Record) -> list[Question]:
    """Every run that decided something, once: of each item in two halves, as the Lab interleaves them."""
    asked: dict[Question, None] = {}
    parts: tuple[Decision | Evidence, ...] = (*record.decisions, *record.evidence)
    for part in parts:
        arms = [
            [
                Question(Workload.model_validate(run.workload), Profile.model_validate(run.profile), seed)
                for seed in run.seeds
            ]
            for run in part.runs
        ]
        halves = [*(arm[: len(arm) // 2] for arm in arms), *(arm[len(arm) // 2 :] for arm in reversed(arms))]
        asked.update(dict.fromkeys(chain.from_iterable(halves)))
    return list(asked)


def _unplayed(record: Record) -> list[str]:
    """Decisions, and tests outside one, with an item whose runs the simulator could not find out."""
    no_answer = (None, "blocked")
    decisions = [each.id for each in record.decisions if any(item.verdict in no_answer for item in each.items)]
    return decisions + [each.nodeid.rpartition("::")[2] for each in record.evidence if each.verdict in no_answer]


def estimate_s(arms: Iterable[Measurement | Question]) -> float:
    """Seconds for a run of each of `arms` in this order: arrivals, and a server start for every change of profile.

    A fleet is deployed anew for every run.
    """
    listed = list(arms)
    changes = (profile for profile, _ in groupby(listed, key=lambda arm: arm.profile))
    starts = sum(profile.fleet is None for profile in changes)
    fleets = (arm.profile.fleet for arm in listed if arm.profile.fleet is not None)
    deployments_s = sum(FLEET_END_S + (FLEET_START_S if fleet.warm else 0.0) for fleet in fleets)
    return sum(arrivals_s(arm.workload) for arm in listed) + starts * SERVER_START_S + deployments_s


def arrivals_s(workload: Workload) -> float:
    """Seconds from the first to the last arrival; the answers to the last ones come on top."""
    arrivals = workload.arrivals
    if isinstance(arrivals, Trace):
        return arrivals.rows[-1][0]
    if workload.duration_s is not None:
        return workload.duration_s
    assert workload.requests is not None
    if isinstance(arrivals, ClosedLoop):
        return _SECONDS_PER_REQUEST * workload.requests / arrivals.concurrency
    return workload.requests / arrivals.rate


def time_text(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    whole = round(seconds / 60)
    return f"{whole} min" if whole < 120 else f"{whole // 60} h {whole % 60} min"
