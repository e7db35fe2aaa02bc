"""A gate's definition: what is asked, whatever comes out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_gpulab import any_of, find_knee
from pytest_gpulab.evidence import Claim
from pytest_gpulab.experiment import Constant, Profile
from pytest_gpulab.gates import Gate, Ledger, collecting
from pytest_gpulab.knee import Knee
from pytest_gpulab.measurement import Measurement
from pytest_gpulab.run import Run
from pytest_gpulab.source import Place
from tests.known import PROFILE, WORKLOAD, arm, known_lab, known_run


class Arms:
    """Measurements on a target whose answers take so many times as long as usual."""

    def __init__(self, slowness: float) -> None:
        def run(profile: Profile, seed: int) -> Run:
            return known_run(slowness * (profile.engine_args.max_num_seqs or 1), seed=seed)

        self.lab = known_lab(run)
        self.one, self.three = (self.lab.measure(WORKLOAD, arm(n), label=f"{n} s") for n in (1, 3))

    def knee(self, limit_s: float = 2.0, low: float = 1.0, profile: Profile = PROFILE) -> Knee:
        def at(rate: float) -> Measurement:
            workload = WORKLOAD.model_copy(update={"arrivals": Constant(rate=rate)})
            return self.lab.measure(workload, profile, label=f"{rate:.3g} req/s")

        return find_knee(at, low=low, high=8.0, stable=lambda m: m.p50 <= limit_s)


Asks = Callable[[Arms], Claim]


def gate_of(asks: Asks, slowness: float = 1.0) -> Gate:
    with collecting(Ledger("experiment")):  # not this test's own
        return asks(Arms(slowness)).gate("gate", Place("test_exp.py", 1, 1, ""))


OTHER: dict[str, tuple[Asks, Asks]] = {
    "constant": (lambda arms: arms.one.p50 <= 2.0, lambda arms: arms.one.p50 <= 2000.0),
    "constant in the fifth digit": (lambda arms: arms.one.p50 <= 2.0, lambda arms: arms.one.p50 <= 2.0001),
    "operator": (lambda arms: arms.one.p50 <= 2.0, lambda arms: arms.one.p50 < 2.0),
    "figure": (lambda arms: arms.one.p95 <= 2.0, lambda arms: arms.one.p50 <= 2.0),
    "margin": (lambda arms: arms.one.p50 <= 0.5 * arms.three.p50, lambda arms: arms.one.p50 <= arms.three.p50),
    "arm": (
        lambda arms: arms.lab.measure(WORKLOAD, arm(1), label="arm").p50 <= 2.0,
        lambda arms: arms.lab.measure(WORKLOAD, arm(2), label="arm").p50 <= 2.0,
    ),
    "an alternative that did not hold": (
        lambda arms: any_of(arms.one.p50 <= 2.0, arms.three.p50 <= 1.0),
        lambda arms: any_of(arms.one.p50 <= 2.0, arms.three.p50 <= 2.0),
    ),
    "rate of a knee": (lambda arms: arms.knee() >= 4.0, lambda arms: arms.knee() >= 2.0),
    "margin of a knee": (lambda arms: arms.knee() >= 4.0, lambda arms: 2 * arms.knee() >= 4.0),
    "what stable means": (lambda arms: arms.knee() >= 4.0, lambda arms: arms.knee(limit_s=20.0) >= 4.0),
    "arm of a knee": (lambda arms: arms.knee() >= 4.0, lambda arms: arms.knee(profile=arm(2)) >= 4.0),
    "one of two knees": (
        lambda arms: arms.knee() >= 0.9 * arms.knee(profile=arm(2)),
        lambda arms: arms.knee() >= 0.9 * arms.knee(profile=arm(3)),
    ),
}


@pytest.mark.parametrize(("one", "other"), OTHER.values(), ids=OTHER)
def test_gates_that_ask_something_else(one: Asks, other: Asks) -> None:
    assert gate_of(one).definition_hash != gate_of(other).definition_hash


@pytest.mark.parametrize("asks", [pair[0] for pair in OTHER.values()], ids=OTHER)
def test_what_comes_out_changes_no_definition(asks: Asks) -> None:
    """Not even where it decides which alternative is shown, or which rates a search asks."""
    usual, slow = gate_of(asks), gate_of(asks, slowness=50.0)
    assert usual.definition_hash == slow.definition_hash != ""
    assert usual.left != slow.left
