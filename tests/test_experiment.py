"""Workloads and profiles: what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from pytest_gpulab import (
    ClosedLoop,
    Constant,
    Direct,
    EngineArgs,
    Gamma,
    Lengths,
    Mix,
    Poisson,
    Profile,
    Shape,
    SpikeToZero,
    Workload,
)
from pytest_gpulab.cluster.cloud import INSTANCE_TYPES, InstanceType
from pytest_gpulab.experiment import require_servable
from pytest_gpulab.fleet import Faults, Fleet, Shortage

SHAPE = Shape(prompt_tokens=512, output_tokens=128)
T4 = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 9216})


FAULTS = [
    Faults(losses=(61.0,)),
    Faults(interruptions=(5.0, 61.0)),
    Faults(pod_deletions=(61.0,)),
    Faults(shortages=(Shortage(start_s=61.0),)),
]


@pytest.mark.parametrize("faults", FAULTS, ids=lambda faults: next(iter(faults.model_fields_set)))
def test_faults_after_the_end_are_refused(faults: Faults) -> None:
    minute = Workload(arrivals=Constant(rate=1), shape=SHAPE, duration_s=60)
    harmed = T4.on(Fleet(faults=faults))
    with pytest.raises(ValueError, match=r"must happen while the workload lasts, which is 60 s, got one at 61 s"):
        require_servable(minute, harmed)
    with pytest.raises(ValueError, match="which is 12 s, got one at 61 s"):
        require_servable(Workload.from_trace([(0.0, 5, 5), (12.0, 5, 5)]), harmed)
    require_servable(minute.model_copy(update={"duration_s": 62.0}), harmed)
    require_servable(Workload(arrivals=Constant(rate=1), shape=SHAPE, requests=5), harmed)  # chance decides


SPOT = Shortage(capacity_type="spot")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Fleet(replicas=3), "got 3; write autoscaling=None for a fixed number"),
        (
            lambda: Fleet(capacity=("on-demand",), faults=Faults(interruptions=(5.0,))),
            "interruptions need spot instances, but capacity is on-demand",
        ),
        (
            lambda: Fleet(capacity=("on-demand",), faults=Faults(shortages=(SPOT,))),
            "capacity that the fleet buys, which is on-demand, got one of spot",
        ),
        (lambda: Shortage(start_s=600, end_s=0), "end_s must be after start_s, got 0 s after 600 s"),
        (lambda: Shortage(zone="us-west-2d"), "Input should be '', 'us-west-2a' or 'us-west-2b'"),
        (
            lambda: T4.on(Fleet(faults=Faults(shortages=(Shortage(instance_type="g4dn.xlage"),)))),
            "the profile's machine, which is g4dn.xlarge, got one of g4dn.xlage",
        ),
        (
            lambda: Profile(model="llama-3.1-8b", accelerator="h200", instance_type="g4dn.xlarge"),
            "one that carries the h200, of p5en or p5e, got g4dn.xlarge; leave it out for p5en.48xlarge",
        ),
    ],
)
def test_what_would_happen_to_nobody_is_refused(build: Callable[[], object], words: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        build()
    assert words in str(refusal.value)


@pytest.mark.parametrize("kind", INSTANCE_TYPES, ids=lambda kind: kind.name)
def test_machines_of_the_emulated_cloud_carry_their_accelerator(kind: InstanceType) -> None:
    shortage = Shortage(capacity_type="spot", instance_type=kind.name, zone="us-west-2a", start_s=5, end_s=6)
    fleet = Fleet(faults=Faults(shortages=(shortage,)))
    Profile(model="qwen2.5-0.5b", accelerator=kind.gpu_name, instance_type=kind.name, fleet=fleet)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused_by_name(rate: float) -> None:
    with pytest.raises(ValidationError, match="rate"):
        Poisson(rate=rate)


def test_an_empty_mix_is_refused() -> None:
    with pytest.raises(ValidationError, match="parts"):
        Mix(parts=())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: EngineArgs(max_num_seq=16), "did you mean 'max_num_seqs'"),
        (lambda: Profile(model="qwen2.5-0.5b", accelerator="h20"), "unknown accelerator 'h20': did you mean 'h200'"),
        (lambda: Profile(model="qwen2.5-0.5", accelerator="t4"), "did you mean 'qwen2.5-0.5b'"),
        (lambda: Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 40_000}), "32768"),
        (lambda: Workload(arrivals=Constant(rate=1), shape=SHAPE), "exactly one of duration_s and requests"),
        (lambda: Workload(arrivals=Constant(rate=1), duration_s=1), "shape must be given"),
        (
            lambda: Workload(arrivals=ClosedLoop(concurrency=2), shape=SHAPE, duration_s=9),
            "closed loop needs requests",
        ),
        (lambda: Workload.from_trace([(1, 5, 5), (0.5, 5, 5)]), "row 1: arrivals must be finite, >= 0 and in order"),
        (
            lambda: Workload.from_trace([(1764142800.5, 100, 10)]),
            r"got 1764142800.5 s; count seconds from the run's st",
        ),
        (lambda: Workload.from_trace([(0, 0, 5)]), "row 0: a request has at least 1 prompt"),
        (lambda: Workload.from_trace([]), "rows"),
        (
            lambda: Workload(arrivals=Poisson, shape=SHAPE, duration_s=3),
            "arrivals must be one Poisson, got the class",
        ),
        (
            lambda: Workload(arrivals=SpikeToZero(rate=5, spike_s=100), shape=SHAPE, duration_s=60),
            "duration_s must be at least the spike's 100 s, got 60 s",
        ),
        (lambda: Workload.from_trace([(0, 1, 1)], duration_s=3), "leave out duration_s"),
        (
            lambda: Lengths(
                prompt_median=9, prompt_sigma=1, prompt_max=8, output_median=1, output_sigma=0, output_max=1
            ),
            "raise prompt_max",
        ),
    ],
)
def test_bad_input_says_what_would_be_right(build, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValidationError) as refusal:
        build()
    assert words in str(refusal.value)


def test_a_prompt_beyond_the_model_length_is_refused_before_it_runs() -> None:
    workload = Workload(arrivals=Constant(rate=1), shape=Shape(prompt_tokens=9216, output_tokens=1), duration_s=10)
    with pytest.raises(ValueError, match=r"one of 9217 tokens .* serves 9216; shorten the shape or raise"):
        require_servable(workload, T4)


SHORT = Shape(prompt_tokens=64, output_tokens=5)
LENGTHS = Lengths(prompt_median=64, prompt_sigma=1, prompt_max=999, output_median=5, output_sigma=0, output_max=5)
SHORT_PROMPTS = {
    "shape": Workload(arrivals=Constant(rate=1), shape=SHORT, duration_s=10),
    "mix": Workload(arrivals=Constant(rate=1), shape=Mix(parts=((9, SHAPE), (1, SHORT))), duration_s=10),
    "lengths": Workload(arrivals=Constant(rate=1), shape=LENGTHS, duration_s=10),
    "trace": Workload.from_trace([(0.0, 512, 5), (1.0, 64, 5)]),
}


@pytest.mark.parametrize("kind", SHORT_PROMPTS)
def test_a_shared_prefix_leaves_something_unique(kind: str) -> None:
    require_servable(SHORT_PROMPTS[kind].model_copy(update={"shared_prefix_tokens": 63}), T4)
    with pytest.raises(ValueError, match="must be below prompt_tokens, got 64 and a prompt of 64: an empty"):
        require_servable(SHORT_PROMPTS[kind].model_copy(update={"shared_prefix_tokens": 64}), T4)


def test_equal_definitions_have_equal_hashes_and_others_do_not() -> None:
    def workload(rate: float) -> Workload:
        return Workload(arrivals=Poisson(rate=rate), shape=SHAPE, duration_s=10)

    assert workload(2).definition_hash == workload(2.0).definition_hash
    assert workload(2).definition_hash != workload(3).definition_hash


def test_changed_engine_arguments_are_validated_and_leave_the_original_alone() -> None:
    capped = T4.with_engine_args(max_num_seqs=16)
    assert (capped.engine_args.max_num_seqs, T4.engine_args.max_num_seqs) == (16, None)
    assert capped.engine_args.max_model_len == 9216
    with pytest.raises(ValidationError, match="max_num_seqs"):
        T4.with_engine_args(max_num_seqs=0)
    with pytest.raises(ValidationError, match=r"max_model_len must be at most 32768 for .*, got 200000"):
        T4.with_engine_args(max_model_len=200_000)


def test_a_changed_definition_is_the_one_written_out() -> None:
    written = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 9216, "max_num_seqs": 16})
    fleet = Fleet(warm=1)
    for changed, out in (
        (T4.with_engine_args(max_num_seqs=16), written),
        (T4.with_engine_args(max_num_seqs=16).on(fleet), Profile(**{**dict(written), "fleet": fleet})),
    ):
        assert changed == out and changed.definition_hash == out.definition_hash


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: T4.on(Fleet), "fleet must be one Fleet, got the class; write Fleet"),  # type: ignore[arg-type]
        (lambda: T4.on("fleet"), "instance of Fleet"),  # type: ignore[arg-type]
        (lambda: T4.model_copy(update={"accelerator": "t5"}), "unknown accelerator 't5'"),
        (lambda: T4.model_copy(update={"fleets": Fleet()}), "did you mean 'fleet'"),
    ],
)
def test_a_change_is_validated(change: Callable[[], Profile], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        change()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Poisson(20), r"Poisson takes its fields by name: Poisson\(rate=20\)"),
        (lambda: Gamma(4, burstiness=2), r"Gamma\(rate=4, burstiness=2\)"),
        (lambda: Shape(512, 128), r"Shape\(prompt_tokens=512, output_tokens=128\)"),
        (lambda: Direct(64), r"Direct\(max_outstanding=64\)"),
    ],
)
def test_values_without_names_are_shown_their_names(build: Callable[[], object], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        build()


@pytest.mark.parametrize("row", [(0, 5), (0, 5, 5, 5), "abc", 5, (0, 5.7, 5), (0, 5, float("nan")), (0, None, 5)])
def test_a_row_that_is_none_is_shown(row: object) -> None:
    with pytest.raises(
        ValueError, match=r"row 1: .* must be \(arrival in seconds, prompt tokens, output tokens\)"
    ) as no:
        Workload.from_trace([(0, 5, 5), row])  # type: ignore[list-item]
    assert str(no.value).endswith(f"got {row!r}")


def test_a_trace_may_begin_late_and_last_for_days() -> None:
    assert Workload.from_trace([(86_400.0, 5, 5), (400_000.0, 5, 5)]).length_s == 400_000.0


def test_rows_may_come_as_text() -> None:
    """As the csv module reads them."""
    assert Workload.from_trace([("0.5", "7", "9")]) == Workload.from_trace([(0.5, 7, 9)])  # type: ignore[list-item]
