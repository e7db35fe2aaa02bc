"""The target `vllm` around its server: what it refuses, when it restarts, what it says of itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pytest_gpulab.accelerators import ACCELERATORS
from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.fleet import Fleet
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.run import Run
from pytest_gpulab.targets import loading
from pytest_gpulab.targets.machine import find_gpu, find_vllm
from pytest_gpulab.targets.vllm import WARM_UP, VllmTarget
from tests.known import WORKLOAD, known_run
from tests.targets.processes import install_stand_in, is_gone, pids_in, wait_for

T4 = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 4096})
LLAMA = Profile(model="llama-3.1-8b", accelerator="t4")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a T4, a stand-in for vLLM and a model folder; its path."""
    site = install_stand_in(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(site)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "nvidia-smi").write_text("#!/bin/sh\necho 'Tesla T4, 550.54.15'\necho 'Tesla T4, 550.54.15'\n")
    (commands / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "models" / "qwen2.5-0.5b").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Workload, str]]:
    """What was sent, and to which URL; nothing is sent really."""
    sent: list[tuple[Workload, str]] = []

    def run(self: loading.Loading, workload: Workload, profile: Profile, seed: int, **where: object) -> Run:
        endpoint = where["endpoint"]
        sent.append((workload, endpoint.url))  # type: ignore[attr-defined]
        return known_run(1.0, seed=seed, server=str(where["server"]))

    monkeypatch.setattr(loading.Loading, "run", run)
    monkeypatch.setattr(loading.Loading, "headroom", None)
    return sent


def target_on(machine: Path) -> VllmTarget:
    return VllmTarget(machine / "models", machine / "logs", lambda line: None)


def test_equal_arguments_share_a_server(machine: Path, loads: list[tuple[Workload, str]]) -> None:
    target = target_on(machine)
    price = T4.model_copy(update={"price_usd_per_hour": 9.0})
    runs = [target.run(WORKLOAD, profile, seed) for seed, profile in enumerate((T4, price))]
    assert [workload for workload, _ in loads] == [WARM_UP, WORKLOAD, WORKLOAD]
    assert len({url for _, url in loads}) == 1
    for run in runs:
        [(second, what)] = run.timeline
        assert second < 0 and what.startswith("server start 1 of this session; ready after ")
    target.close()


def test_no_key_of_the_environment_is_in_the_logs(
    machine: Path, loads: list[tuple[Workload, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM logs its arguments, so a key must never be one."""
    for name in ("GPULAB_API_KEY", "VLLM_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "planted-key")
    told: list[str] = []
    target = VllmTarget(machine / "models", machine / "logs", told.append)
    run = target.run(WORKLOAD, T4, 0)
    target.close()
    [log] = (machine / "logs").iterdir()
    assert "'--model'" in log.read_text() and "planted-key" not in log.read_text()
    assert "planted-key" not in f"{told} {run}"


def test_another_profile_restarts_it(machine: Path, loads: list[tuple[Workload, str]]) -> None:
    target = target_on(machine)
    target.run(WORKLOAD, T4, 0)
    [first] = (machine / "logs").iterdir()
    run = target.run(WORKLOAD, T4.with_engine_args(max_num_seqs=4), 0)
    assert run.timeline[0][1].startswith("server start 2 ")
    wait_for(lambda: all(map(is_gone, pids_in(first))))
    target.close()
    for log in (machine / "logs").iterdir():
        wait_for(lambda log=log: all(map(is_gone, pids_in(log))))  # type: ignore[misc]


def test_a_server_that_died_is_started_again(machine: Path, loads: list[tuple[Workload, str]]) -> None:
    target = target_on(machine)
    target.run(WORKLOAD, T4, 0)
    [log] = (machine / "logs").iterdir()
    os.kill(pids_in(log)[0], 9)
    assert target._running is not None
    wait_for(lambda: target._running is not None and not target._running.is_running)
    assert target.run(WORKLOAD, T4, 1).timeline[0][1].startswith("server start 2 ")
    target.close()


def test_a_server_that_cannot_start_is_asked_once(machine: Path, loads: list[tuple[Workload, str]]) -> None:
    (machine / "models" / "fails").mkdir()
    target = target_on(machine)
    target._folder = lambda profile: machine / "models" / "fails"  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(TargetRefused, match="No common block size"):
            target.run(WORKLOAD, T4, 0)
    assert len(list((machine / "logs").iterdir())) == 1
    assert loads == []


def test_a_server_that_refuses_the_client_is_blocked(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once, and ended: it would refuse every run, which would read as a model that delivers nothing."""
    monkeypatch.setattr(loading.Loading, "headroom", None)
    target = target_on(machine)
    for _ in range(2):
        with pytest.raises(
            TargetRefused, match=r"must answer the first 16 requests in full, got 16 http_401; see .*log"
        ):
            target.run(WORKLOAD, T4, 0)
    [log] = (machine / "logs").iterdir()
    wait_for(lambda: all(map(is_gone, pids_in(log))))


@pytest.mark.slow
def test_the_client_has_the_key_that_the_server_asks_for(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.Loading, "headroom", None)
    monkeypatch.setenv("VLLM_API_KEY", "planted-key")
    target = target_on(machine)
    target._folder = lambda profile: machine / "models" / "emulates"  # type: ignore[method-assign]
    (machine / "models" / "emulates").mkdir()
    told: list[str] = []
    target._tell = told.append
    run = target.run(Workload(arrivals=WORKLOAD.arrivals, shape=WORKLOAD.shape, requests=1), T4, 0)
    target.close()
    assert run.requests["ok"].all()
    [log] = (machine / "logs").iterdir()
    assert "planted-key" not in f"{told} {run} {log.read_text()}"


def test_it_says_what_serves(machine: Path) -> None:
    target = target_on(machine)
    assert target.server(T4) == "vllm 1.2.3, Tesla T4, driver 550.54.15, random weights"
    (machine / "models" / "qwen2.5-0.5b" / "model.safetensors").touch()
    assert target.server(T4) == "vllm 1.2.3, Tesla T4, driver 550.54.15"


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (LLAMA, r"must hold a folder llama-3\.1-8b"),
        (T4.model_copy(update={"accelerator": "h200"}), "must have the profile's accelerator h200, it has Tesla T4"),
        (T4.on(Fleet()), "a profile with a fleet needs a cluster"),
    ],
    ids=["model", "accelerator", "fleet"],
)
def test_what_it_cannot_serve_is_refused(machine: Path, profile: Profile, reason: str) -> None:
    target = target_on(machine)
    assert target.server(profile) == ""
    with pytest.raises(TargetRefused, match=reason):
        target.run(WORKLOAD, profile, 0)


def test_a_cpu_is_no_gpu(machine: Path) -> None:
    (machine / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    target = target_on(machine)
    assert target.server(T4) == ""
    with pytest.raises(TargetRefused, match="accelerator t4, it has no GPU"):
        target.run(WORKLOAD, T4, 0)


@pytest.mark.parametrize(
    ("name", "accelerator"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200"),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_gpu_is_known_by_its_name(machine: Path, name: str, accelerator: str) -> None:
    (machine / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\necho '{name}, 580.1'\n")
    gpu = find_gpu()
    assert gpu is not None
    assert gpu.accelerators & set(ACCELERATORS) == {accelerator}


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA L40S", "NVIDIA H20"])
def test_a_similar_name_is_another_gpu(machine: Path, name: str) -> None:
    (machine / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\necho '{name}, 580.1'\n")
    gpu = find_gpu()
    assert gpu is not None and not gpu.accelerators & set(ACCELERATORS)


def test_the_gpu_is_the_first_that_cuda_may_use(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers can share a machine with two GPUs, each pinned to its own."""
    smi = '#!/bin/sh\ncase "$*" in *--id=0*) echo "Tesla T4, 1";; *--id=1*) echo "NVIDIA L4, 1";; esac\n'
    (machine / "bin" / "nvidia-smi").write_text(smi)
    found = {}
    for visible in ("0", "1,0", "", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        gpu = find_gpu()
        found[visible] = gpu and gpu.name
    assert found == {"0": "Tesla T4", "1,0": "NVIDIA L4", "": None, "-1": None}


def test_vllm_is_found_beside_its_command(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment of its own, whose command is on the PATH: not importable from here."""
    found = find_vllm()
    assert found is not None and found.version == "vllm 1.2.3"
    monkeypatch.setattr("pytest_gpulab.targets.machine.find_spec", lambda name: None)
    assert find_vllm() is None
    for command in ("vllm", "python"):
        (machine / "bin" / command).write_text(f'#!/bin/sh\nexec {os.environ.get("PYTHON", "python3")} "$@"\n')
        (machine / "bin" / command).chmod(0o755)
    beside = find_vllm()
    assert beside is not None and beside.python == str(machine / "bin" / "python")


def test_vllm_is_found_behind_a_link_to_its_command(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pipx and uv tool install it; the interpreter of a virtual environment is a link itself, and stays one."""
    monkeypatch.setattr("pytest_gpulab.targets.machine.find_spec", lambda name: None)
    environment = machine / "tools" / "vllm" / "bin"
    environment.mkdir(parents=True)
    (environment / "vllm").write_text("#!/bin/sh\n")
    (environment / "vllm").chmod(0o755)
    (environment / "python").symlink_to(sys.executable)
    (machine / "bin" / "vllm").symlink_to(environment / "vllm")
    found = find_vllm()
    assert found is not None and found.python == str(environment / "python")
