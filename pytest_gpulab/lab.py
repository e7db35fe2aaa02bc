"""The Lab: runs what measurements ask for, once each, and remembers it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Real

from pytest_gpulab.arrivals import schedule
from pytest_gpulab.experiment import Admission, BoundedQueue, Direct, Profile, Workload, require_servable
from pytest_gpulab.gates import TargetRefused, current_ledger
from pytest_gpulab.measurement import Measurement
from pytest_gpulab.rule import LOOKS
from pytest_gpulab.run import Run
from pytest_gpulab.run_store import Question, RunStore
from pytest_gpulab.targets import Target

Repeat = tuple[Measurement, int]
"""One run to make: an arm and which repeat of it."""


class Lab:
    """A target with the seeds and repeats of this session.

    Invariant: repeat i of any measurement runs under seed ``first_seed + i``, so repeat i of two measurements is
    a pair with the same arrivals and prompts.
    """

    def __init__(
        self,
        target: Target,
        *,
        first_seed: int = 0,
        max_repeats: int = 24,
        store: RunStore | None = None,
        announce: Callable[[Sequence[Repeat]], None] | None = None,
    ) -> None:
        """`store` keeps runs beyond this session; `announce` hears which runs will be made now, in order."""
        self.target = target
        self.first_seed = first_seed
        self.max_repeats = min(max_repeats, target.max_repeats)
        self._store = store
        self._announce = announce
        self._runs: dict[tuple[str, str], Run] = {}
        self._served: Profile | None = None

    def measure(
        self,
        workload: Workload,
        profile: Profile,
        *,
        admission: Admission | None = None,
        label: str | float | None = None,
    ) -> Measurement:
        """What `workload` does on `profile`; nothing runs until a figure is asked for.

        `admission` replaces the workload's own policy. `label`, text or a number, names the arm in reports. Within
        one test, equal definitions are one arm: the first label stays.

        Raises:
            TypeError: something is not what it is called here.
            ValueError: the workload and the profile do not go together.
        """
        _require_kinds(workload, profile, admission, label)
        if admission is not None:
            workload = workload.model_copy(update={"admission": admission})
        require_servable(workload, profile)
        measurement = Measurement(self, workload, profile, None if label is None else str(label))
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

    def pull(self, measurements: Sequence[Measurement], repeats: int) -> None:
        """Make what a look of the rule at `repeats` needs of all `measurements` that are compared, interleaved.

        Where runs are measured, the first look brings the test's other arms along: a gate on one arm alone must not
        measure it at another time of the day than the arm that the next gate compares it with. TargetRefused when
        one of `measurements` cannot be served; another arm that cannot waits for its own gate.
        """
        arms = dict.fromkeys(measurements)
        ledger = current_ledger()
        if self.target.basis == "measured" and repeats == LOOKS[0].repeats and ledger is not None:
            arms.update(dict.fromkeys(known for known in ledger.measurements if known.lab is self))
        start = max((look.repeats for look in LOOKS if look.repeats < repeats), default=0)
        planned = interleaved(list(arms), range(start, repeats), self._served)
        if self._announce is not None:
            self._announce([run for run in planned if not self._knows(*run) and self.target.server(run[0].profile)])
        for arm, repeat in planned:
            try:
                arm.run(repeat)
            except TargetRefused as refusal:
                if arm in measurements:
                    raise self._explained(refusal, arm, [run for run in planned if run[0] in measurements]) from None

    def _explained(self, refusal: TargetRefused, arm: Measurement, runs: Sequence[Repeat]) -> TargetRefused:
        """`refusal` with how many of `runs` are still to be measured, where it is for want of a server here.

        A fleet is refused for what it is, and a server that did not start has been found.
        """
        if self._store is None or arm.profile.fleet is not None or self.target.server(arm.profile):
            return refusal
        missing = sum(not self._store.servers(self._question(*run)) for run in runs)
        return TargetRefused(f"not measured yet: {missing} runs missing; {refusal}") if missing else refusal

    def available(self, measurement: Measurement) -> int:
        """How many repeats of `measurement`, from the first on, are there without running anything."""
        unknown = (repeat for repeat in range(self.max_repeats) if not self._knows(measurement, repeat))
        return next(unknown, self.max_repeats)

    def run(self, measurement: Measurement, repeat: int) -> Run:
        """Repeat `repeat` of `measurement`: the remembered or stored Run, or a new one."""
        if not self._knows(measurement, repeat):
            question = self._question(measurement, repeat)
            self._served = question.profile
            run = self.target.run(*question)
            if self._store is not None:
                self._store.save(question, run)
            self._runs[self._key(measurement, repeat)] = run
        return self._runs[self._key(measurement, repeat)]

    def _knows(self, measurement: Measurement, repeat: int) -> bool:
        """Whether the Run is remembered, which it is from now on when it is stored."""
        key = self._key(measurement, repeat)
        if key not in self._runs:
            stored = self._stored(measurement, repeat)
            if stored is not None:
                self._runs[key] = stored
        return key in self._runs

    def _stored(self, measurement: Measurement, repeat: int) -> Run | None:
        """The stored Run of the server that would serve here, when it is valid evidence.

        Where nothing here can serve, what was measured elsewhere on this target counts as it is, if all repeats had
        one server.
        """
        question = self._question(measurement, repeat)
        if self._store is None or not self._store.servers(question):
            return None
        here = self.target.server(question.profile)
        repeats = (repeat,) if here else range(self.max_repeats)
        asked = (self._question(measurement, other) for other in repeats)
        servers = sorted({server for other in asked for server in self._store.servers(other)})
        if here:
            run = self._store.load(question, here) if here in servers else None
            return run if run is not None and not run.problems else None
        if len(servers) > 1:
            raise TargetRefused(
                f"{self._store.folder} holds runs of several servers, none of them is here "
                f"({'; '.join(servers)}): give --gpulab-runs a folder with the runs of one"
            )
        run = self._store.load(question, servers[0])
        return run if run.provenance.target == self.target.name else None

    def _question(self, measurement: Measurement, repeat: int) -> Question:
        return Question(measurement.workload, measurement.profile, self.first_seed + repeat)

    def _key(self, measurement: Measurement, repeat: int) -> tuple[str, str]:
        """Equal for repeats that are the same run. A fleet's cold starts differ even where arrivals do not."""
        seed = self.first_seed + repeat
        if not self.target.repeatable or measurement.profile.fleet is not None:
            return measurement.id, str(seed)
        return measurement.id, _arrivals_hash(measurement.workload, seed)


def _require_kinds(workload: object, profile: object, admission: object, label: object) -> None:
    if not (isinstance(workload, Workload) and isinstance(profile, Profile)):
        got = f"{type(workload).__name__} and {type(profile).__name__}"
        raise TypeError(f"measure must be given a Workload and a Profile, in this order, got {got}")
    if not (admission is None or isinstance(admission, (Direct, BoundedQueue))):
        raise TypeError(f"admission must be a Direct(...) or a BoundedQueue(...), got {admission!r}")
    if not (label is None or isinstance(label, (str, Real))):
        raise TypeError(f"label must be text or a number, got {label!r}; write label=str(...)")


@lru_cache(maxsize=4096)
def _arrivals_hash(workload: Workload, seed: int) -> str:
    return hashlib.sha256(schedule(workload, seed).tobytes()).hexdigest()


def interleaved(arms: Sequence[Measurement], repeats: range, served: Profile | None) -> list[Repeat]:
    """All `repeats` of all `arms`, in an order that favours no arm when the machine drifts.

    Arms of one profile alternate their order from repeat to repeat (ABBA). Profiles take turns in blocks, because a
    change restarts the server: the first half of the repeats forward, the second half backward, beginning with the
    profile that is `served` already. So two profiles need two changes: A, B, A.
    """
    profiles = sorted(dict.fromkeys(arm.profile for arm in arms), key=lambda profile: profile != served)
    middle = (repeats.start + repeats.stop) // 2 if len(profiles) > 1 else repeats.stop

    def block(profile: Profile, half: range) -> list[Repeat]:
        own = [arm for arm in arms if arm.profile == profile]
        return [(arm, repeat) for repeat in half for arm in (own if repeat % 2 == 0 else reversed(own))]

    forward = [run for profile in profiles for run in block(profile, range(repeats.start, middle))]
    return forward + [run for profile in reversed(profiles) for run in block(profile, range(middle, repeats.stop))]
