"""The Lab: which runs it makes, in which order, and which it need not make again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab.experiment import Direct, Poisson, Profile, Workload
from pytest_gpulab.gates import Ledger, TargetRefused, collecting
from pytest_gpulab.lab import Lab, Repeat, interleaved
from pytest_gpulab.measurement import Measurement, summarize
from pytest_gpulab.run import Run
from pytest_gpulab.run_store import RunStore
from tests.known import WORKLOAD, Known, arm, known_lab, known_run


class Machine(Known):
    """A measured target that remembers what it ran, and may be taken away."""

    def __init__(self, server: str = "here", broken: Callable[[int], bool] = lambda runs: False) -> None:
        super().__init__(lambda profile, seed: known_run(1.0, seed=seed, server=self.here), max_repeats=12)
        self.here = server
        self.broken = broken
        self.order: list[tuple[int | None, int]] = []

    def server(self, profile: Profile) -> str:
        return self.here

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        if not self.here:
            raise TargetRefused("nothing serves here")
        if self.broken(len(self.order)):
            raise KeyboardInterrupt
        self.order.append((profile.engine_args.max_num_seqs, seed))
        return super().run(workload, profile, seed)


def compare(lab: Lab) -> list[Measurement]:
    """A test that compares the arms 1 and 2 at the first look."""
    arms = [lab.measure(WORKLOAD, arm(1)), lab.measure(WORKLOAD, arm(2))]
    with collecting(Ledger("item")):
        (arms[0].p50 <= arms[1].p50).decide()
    return arms


# --- order ----------------------------------------------------------------------------------------------------


def names(order: list[Repeat]) -> list[str]:
    return [f"{run.label}{repeat}" for run, repeat in order]


def test_two_profiles_need_two_changes() -> None:
    machine = Machine()
    compare(Lab(machine))
    first, second = [(1, 0), (1, 1), (1, 2)], [(1, 3), (1, 4), (1, 5)]
    assert machine.order == [*first, *((2, seed) for seed in range(6)), *second]


def test_arms_of_one_profile_alternate() -> None:
    lab = Lab(Machine())
    a = lab.measure(WORKLOAD, arm(1), label="a")
    b = lab.measure(WORKLOAD.model_copy(update={"arrivals": Poisson(rate=2.0)}), arm(1), label="b")
    assert names(interleaved([a, b], range(4), None)) == ["a0", "b0", "b1", "a1", "a2", "b2", "b3", "a3"]


@given(profiles=st.lists(st.integers(1, 4), min_size=1, max_size=6), served=st.integers(1, 5), first=st.booleans())
def test_every_run_once_with_few_changes(profiles: list[int], served: int, first: bool) -> None:
    lab = known_lab(lambda profile, seed: known_run(1.0))
    arms = [
        lab.measure(WORKLOAD.model_copy(update={"requests": 10 + index}), arm(seqs), label=f"arm {index}")
        for index, seqs in enumerate(profiles)
    ]
    repeats = range(6) if first else range(6, 12)
    order = interleaved(arms, repeats, arm(served))
    assert sorted(names(order)) == sorted(names([(one, repeat) for one in arms for repeat in repeats]))
    shown = [arm(served), *(one.profile for one, _ in order)]
    changes = sum(one != other for one, other in pairwise(shown))
    distinct = len(set(profiles))
    assert changes <= 2 * (distinct - 1) + (served not in profiles)


@pytest.mark.parametrize("basis", ["measured", "simulated"])
def test_the_first_measured_look_brings_the_other_arms_along(basis: str) -> None:
    lab = known_lab(lambda profile, seed: known_run(1.0, seed=seed, basis=basis), basis=basis)  # type: ignore[arg-type]
    with collecting(Ledger("item")):
        one, other = lab.measure(WORKLOAD, arm(1)), lab.measure(WORKLOAD, arm(2))
        (one.delivery_ratio >= 0.9).decide()
    assert (one.pulled, other.pulled) == (6, 6 if basis == "measured" else 0)


# --- what it is given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [16, 0.5, "16"])
def test_a_label_may_be_the_number_that_differs(label: str | float) -> None:
    lab = known_lab(lambda profile, seed: known_run(1.0))
    assert summarize(lab.measure(WORKLOAD, arm(16), label=label)).label == str(label)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"label": Direct()}, r"label must be text or a number, got Direct\(.*write label=str"),
        ({"admission": Direct}, r"admission must be a Direct\(\.\.\.\) or a BoundedQueue\(\.\.\.\), got <class"),
        ({"admission": "direct"}, r"admission must be .*, got 'direct'"),
    ],
)
def test_what_is_something_else_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        known_lab(lambda profile, seed: known_run(1.0)).measure(WORKLOAD, arm(1), **fields)


# --- what was measured is not measured again ------------------------------------------------------------------


def test_a_second_session_runs_nothing(tmp_path: Path) -> None:
    first = compare(Lab(Machine(), store=RunStore(tmp_path)))
    machine = Machine()
    again = compare(Lab(machine, store=RunStore(tmp_path)))
    assert machine.order == []
    assert [run.requests.tobytes() for run in again[0].runs] == [run.requests.tobytes() for run in first[0].runs]


@pytest.mark.parametrize("after", [0, 1, 4, 8, 11])
def test_an_ended_session_goes_on_where_it_was(tmp_path: Path, after: int) -> None:
    whole = Machine()
    compare(Lab(whole))
    broken = Machine(broken=lambda runs: runs == after)
    with pytest.raises(KeyboardInterrupt):
        compare(Lab(broken, store=RunStore(tmp_path)))
    rest = Machine()
    compare(Lab(rest, store=RunStore(tmp_path)))
    assert broken.order + rest.order == whole.order


def test_a_machine_without_a_server_decides_on_what_was_measured(tmp_path: Path) -> None:
    compare(Lab(Machine("vLLM 1, GPU"), store=RunStore(tmp_path)))
    arms = compare(Lab(Machine(""), store=RunStore(tmp_path)))
    assert {run.provenance.server for one in arms for run in one.runs} == {"vLLM 1, GPU"}


def test_an_unfinished_look_stays_open_elsewhere(tmp_path: Path) -> None:
    """Arm 1 has repeats 0 to 2, arm 2 has 0 and 1: two votes, and the reason why there are no more."""
    with pytest.raises(KeyboardInterrupt):
        compare(Lab(Machine(broken=lambda runs: runs == 5), store=RunStore(tmp_path)))
    lab = Lab(Machine(""), store=RunStore(tmp_path))
    decided = (lab.measure(WORKLOAD, arm(1)).p50 <= lab.measure(WORKLOAD, arm(2)).p50).decide()
    assert decided.outcome == "undecided"
    assert decided.reason.endswith(
        ": 2 of 2 repeats held; undecided after 2: not measured yet: 7 runs missing; nothing serves here"
    )


def test_what_was_never_measured_is_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(Lab(Machine(broken=lambda runs: runs == 3), store=RunStore(tmp_path)))
    with pytest.raises(TargetRefused, match="nothing serves here"):
        compare(Lab(Machine(""), store=RunStore(tmp_path)))


def test_an_arm_that_cannot_be_served_waits_for_its_own_gate(tmp_path: Path) -> None:
    compare(Lab(Machine(), store=RunStore(tmp_path)))
    lab = Lab(Machine(""), store=RunStore(tmp_path))
    with collecting(Ledger("item")):
        one, two, never = (lab.measure(WORKLOAD, arm(seqs)) for seqs in (1, 2, 3))
        assert (one.p50 <= two.p50).decide().outcome == "held"
        with pytest.raises(TargetRefused, match="nothing serves here"):
            (one.p50 <= never.p50).decide()


def test_another_server_measures_anew(tmp_path: Path) -> None:
    compare(Lab(Machine("vLLM 1, GPU"), store=RunStore(tmp_path)))
    machine = Machine("vLLM 2, GPU")
    compare(Lab(machine, store=RunStore(tmp_path)))
    assert len(machine.order) == 12
    with pytest.raises(TargetRefused, match=r"several servers.*vLLM 1, GPU; vLLM 2, GPU"):
        compare(Lab(Machine(""), store=RunStore(tmp_path)))


def test_repeats_of_two_servers_are_not_one_arm(tmp_path: Path) -> None:
    """Seeds 0 to 2 were measured on one server, the rest on another."""
    for server, runs in (("vLLM 1, GPU", 3), ("vLLM 2, GPU", 6)):
        lab = Lab(Machine(server), store=RunStore(tmp_path))
        one = lab.measure(WORKLOAD, arm(1))
        for repeat in range(runs - 3, runs):
            one.run(repeat)
    lab = Lab(Machine(""), store=RunStore(tmp_path))
    with pytest.raises(TargetRefused, match=r"several servers.*vLLM 1, GPU; vLLM 2, GPU"):
        (lab.measure(WORKLOAD, arm(1)).p50 <= 2.0).decide()


def test_what_another_target_measured_is_no_evidence_of_this_one(tmp_path: Path) -> None:
    """An endpoint's runs in the folder do not become those of a vLLM that was started here."""
    compare(Lab(Machine(), store=RunStore(tmp_path)))
    other = Machine("")
    other.name = "endpoint"
    with pytest.raises(TargetRefused, match="nothing serves here"):
        compare(Lab(other, store=RunStore(tmp_path)))


def test_invalid_evidence_is_measured_again_where_a_server_is(tmp_path: Path) -> None:
    invalid = Machine()
    invalid._run = lambda profile, seed: replace(known_run(1.0, seed=seed, server="here"), problems=("late",))
    compare(Lab(invalid, store=RunStore(tmp_path)))
    elsewhere = compare(Lab(Machine(""), store=RunStore(tmp_path)))
    assert elsewhere[0].runs[0].problems == ("late",)
    machine = Machine()
    compare(Lab(machine, store=RunStore(tmp_path)))
    assert len(machine.order) == 12


def test_what_will_be_measured_is_announced(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(Lab(Machine(broken=lambda runs: runs == 10), store=RunStore(tmp_path)))

    def announced(machine: Machine) -> list[int]:
        told: list[int] = []
        lab = Lab(machine, store=RunStore(tmp_path), announce=lambda runs: told.extend(repeat for _, repeat in runs))
        with suppress(TargetRefused):
            compare(lab)
        return told

    assert announced(Machine("")) == []
    assert announced(Machine()) == [4, 5]
