"""GPU samples: lines of nvidia-smi and pages of DCGM's exporter."""

from __future__ import annotations

import pytest

from pytest_gpulab.load.gpu import dcgm_samples, gpu_totals, smi_samples
from tests.load.golden import golden_server
from tests.load.loads import load, requests

DCGM = b"""# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-a",modelName="NVIDIA H200"} 90
DCGM_FI_DEV_GPU_UTIL{gpu="1",UUID="GPU-b",modelName="NVIDIA H200"} 30
DCGM_FI_DEV_FB_USED{gpu="0",UUID="GPU-a",modelName="NVIDIA H200"} 1024
DCGM_FI_DEV_FB_USED{gpu="1",UUID="GPU-b",modelName="NVIDIA H200"} 2048
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-a",modelName="NVIDIA H200"} 600.5
DCGM_FI_DEV_POWER_USAGE{gpu="1",UUID="GPU-b",modelName="NVIDIA H200"} 100.5
"""


def test_dcgm_and_smi_agree():
    lines = ["90, 1024, 600.5\n", "30, 2048, 100.5\n"]
    samples = [sample for line in lines for sample in smi_samples(line)]
    assert dcgm_samples(DCGM) == samples
    assert gpu_totals(samples) == {
        "gpu_utilization_mean": pytest.approx(0.6),
        "gpu_memory_used_bytes_max": 2048 * 1024**2,
        "gpu_power_watts_mean": pytest.approx(350.5),
    }


@pytest.mark.parametrize("line", ["", "90, 1024", "[N/A], 1024, 10", "90, 1024, [Not Supported]"])
def test_what_nvidia_smi_does_not_know_is_no_sample(line):
    assert smi_samples(line) == []
    assert gpu_totals([]) == {}


def test_samples_of_a_run_on_this_machine(tmp_path, monkeypatch):
    """A command that says what nvidia-smi would of the second GPU, which is the one that serves."""
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\n[ "$1" = --id=1 ] && echo "50, 100, 70.0"\nexec sleep 60\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with golden_server() as url:
        run = load(url, requests(5), basis="measured")
        emulated = load(url, requests(5))
    assert run.totals["gpu_utilization_mean"] == 0.5
    assert run.totals["gpu_power_watts_mean"] == 70.0
    assert not any(name.startswith("gpu_") for name in emulated.totals)
