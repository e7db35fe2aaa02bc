"""Runs on disk come back as they were, and only as the answer to their own question."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pytest_gpulab.experiment import BoundedQueue, Poisson
from pytest_gpulab.run import SERVER_DTYPE, Run
from pytest_gpulab.run_store import Question, RunStore
from tests.known import PROFILE, WORKLOAD, arm, known_run

QUESTION = Question(WORKLOAD, PROFILE, 3)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


def full_run(server: str = "vLLM 1, GPU") -> Run:
    """A run that uses every field: times that never happened, samples, a timeline, problems."""
    run = known_run(np.linspace(0.1, 7.3, 200).tolist(), seed=3, server=server, delivered=150)
    run.requests["first_token"][150:] = np.nan
    samples = np.zeros(2, dtype=SERVER_DTYPE)
    samples["time"], samples["kv_cache_usage"] = (0.1, 1.1), (0.25, 1 / 3)
    return replace(run, server=samples, timeline=((-2.5, "server start 1"), (1.0, "x")), problems=("late", "lost"))


def test_a_run_comes_back_as_it_was(store: RunStore) -> None:
    run = full_run()
    store.save(QUESTION, run)
    again = RunStore(store.folder).load(QUESTION, "vLLM 1, GPU")
    assert again.requests.tobytes() == run.requests.tobytes()
    assert again.requests.dtype == run.requests.dtype
    assert again.server.tobytes() == run.server.tobytes()
    for field in ("totals", "duration_s", "provenance", "timeline", "problems"):
        assert getattr(again, field) == getattr(run, field)


@pytest.mark.parametrize(
    "other",
    [
        QUESTION._replace(seed=4),
        QUESTION._replace(profile=arm(9)),
        QUESTION._replace(workload=WORKLOAD.model_copy(update={"arrivals": Poisson(rate=2.0)})),
        QUESTION._replace(
            workload=WORKLOAD.model_copy(update={"admission": BoundedQueue(capacity=9, max_wait_s=1.0)})
        ),
    ],
    ids=["seed", "profile", "arrivals", "admission"],
)
def test_a_run_answers_no_other_question(store: RunStore, other: Question) -> None:
    store.save(QUESTION, full_run())
    assert RunStore(store.folder).servers(other) == []
    store.save(other, replace(full_run(), provenance=replace(full_run().provenance, seed=other.seed)))
    assert len(list(store.folder.iterdir())) == 2


def test_servers_are_kept_apart_and_a_later_run_replaces_an_earlier_one(store: RunStore) -> None:
    store.save(QUESTION, full_run("vLLM 1, GPU"))
    store.save(QUESTION, full_run("vLLM 2, GPU"))
    store.save(QUESTION, replace(full_run("vLLM 2, GPU"), duration_s=12.0))
    again = RunStore(store.folder)
    assert again.servers(QUESTION) == ["vLLM 1, GPU", "vLLM 2, GPU"]
    assert again.load(QUESTION, "vLLM 1, GPU").duration_s == 200.0
    assert again.load(QUESTION, "vLLM 2, GPU").duration_s == 12.0
    assert len(list(store.folder.iterdir())) == 2


def test_a_file_is_found_by_its_content(store: RunStore) -> None:
    """Its name holds hashes of the definitions, which change when a definition gains a field."""
    path = store.save(QUESTION, full_run())
    path.rename(path.with_name("renamed.npz"))
    assert RunStore(store.folder).servers(QUESTION) == ["vLLM 1, GPU"]


def test_a_save_that_fails_leaves_what_was_there(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(QUESTION, full_run())

    def torn(file: object, **arrays: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", torn)
        with pytest.raises(OSError, match="disk full"):
            store.save(QUESTION, replace(full_run(), duration_s=1.0))
    assert RunStore(store.folder).load(QUESTION, "vLLM 1, GPU").duration_s == 200.0
    assert len(list(store.folder.iterdir())) == 1


def test_damage_is_named_with_its_file(store: RunStore) -> None:
    """Every 16th byte in turn: the file is refused by its name, or nothing of it was lost."""
    run = full_run()
    path = store.save(QUESTION, run)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 16):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            again = RunStore(store.folder)
            found = [again.load(QUESTION, server) for server in again.servers(QUESTION)]
        except ValueError as named:
            assert f"{path} holds no run" in str(named)
            refused += 1
        else:
            assert [one.requests.tobytes() for one in found] == [run.requests.tobytes()]
    assert refused > 10


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04 torn"])
def test_a_foreign_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "foreign.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign\.npz holds no run .* remove it"):
        RunStore(tmp_path)
