"""The Lab: runs what measurements ask for, once each, and remembers it."""

from __future__ import annotations

import hashlib

from pytest_gpulab.arrivals import schedule
from pytest_gpulab.experiment import Admission, Profile, Workload, require_servable
from pytest_gpulab.gates import current_ledger
from pytest_gpulab.measurement import Measurement
from pytest_gpulab.run import Run
from pytest_gpulab.targets import Target


class Lab:
    """A target with the seeds and repeats of this session.

    Invariant: repeat i of any measurement runs under seed ``first_seed + i``, so repeat i of two measurements is
    a pair with the same arrivals and prompts.
    """

    def __init__(self, target: Target, *, first_seed: int = 0, max_repeats: int = 24) -> None:
        self.target = target
        self.first_seed = first_seed
        self.max_repeats = min(max_repeats, target.max_repeats)
        self._runs: dict[tuple[str, str], Run] = {}

    def measure(
        self,
        workload: Workload,
        profile: Profile,
        *,
        admission: Admission | None = None,
        label: str | None = None,
    ) -> Measurement:
        """What `workload` does on `profile`; nothing runs until a figure is asked for.

        `admission` replaces the workload's own policy. `label` names the arm in reports. Within one test, equal
        definitions are one arm: the first label stays.
        """
        if admission is not None:
            workload = workload.model_copy(update={"admission": admission})
        require_servable(workload, profile)
        measurement = Measurement(self, workload, profile, label)
        ledger = current_ledger()
        if ledger is None:
            return measurement
        known = next(
            (known for known in ledger.measurements if known.lab is self and known.id == measurement.id),
            None,
        )
        if known is None:
            ledger.measurements.append(measurement)
        return known or measurement

    def run(self, measurement: Measurement, repeat: int) -> Run:
        """Repeat `repeat` of `measurement`: the remembered Run, or a new one."""
        seed = self.first_seed + repeat
        key = (measurement.id, self._repeat_key(measurement.workload, seed))
        if key not in self._runs:
            self._runs[key] = self.target.run(measurement.workload, measurement.profile, seed)
        return self._runs[key]

    def _repeat_key(self, workload: Workload, seed: int) -> str:
        if not self.target.repeatable:
            return str(seed)
        return hashlib.sha256(schedule(workload, seed).tobytes()).hexdigest()
