"""GPU utilization, memory and power during a run: from nvidia-smi on the same machine, or from DCGM's exporter."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

_QUERY = ("utilization.gpu", "memory.used", "power.draw")
_DCGM = (b"DCGM_FI_DEV_GPU_UTIL", b"DCGM_FI_DEV_FB_USED", b"DCGM_FI_DEV_POWER_USAGE")
_MIB = 1024**2
_LOCAL = ("127.0.0.1", "localhost", "::1")


class GpuSample(NamedTuple):
    """One GPU at one moment: utilization from 0 to 1, bytes in use, watts."""

    utilization: float
    memory_bytes: float
    power_watts: float


def first_gpu() -> str | None:
    """The GPU that CUDA calls the first, as nvidia-smi's ``--id`` takes it; None where CUDA may see none.

    A machine may have several GPUs, each with a server of its own: ``CUDA_VISIBLE_DEVICES`` says which is ours.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return None if visible in ("", "-1") else visible


def has_local_gpu(url: str) -> bool:
    """Whether the server at `url` runs on this machine, and nvidia-smi can tell about its GPUs."""
    return urlsplit(url).hostname in _LOCAL and shutil.which("nvidia-smi") is not None


@asynccontextmanager
async def local_gpu_samples(url: str) -> AsyncIterator[list[GpuSample]]:
    """Samples of nvidia-smi, one a second, while the context lasts; none without a local GPU, or a URL."""
    samples: list[GpuSample] = []
    gpu = first_gpu()
    if gpu is None or not has_local_gpu(url):
        yield samples
        return
    process = await asyncio.create_subprocess_exec(
        "nvidia-smi",
        f"--id={gpu}",
        f"--query-gpu={','.join(_QUERY)}",
        "--format=csv,noheader,nounits",
        "--loop=1",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    reading = asyncio.create_task(_read(process, samples))
    try:
        yield samples
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await reading
        await process.wait()


async def _read(process: asyncio.subprocess.Process, samples: list[GpuSample]) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        samples += smi_samples(line.decode())


def smi_samples(line: str) -> list[GpuSample]:
    """The sample in a line of nvidia-smi; none where it does not know, or was cut off."""
    try:
        utilization, memory_mib, watts = (float(value) for value in line.split(","))
    except ValueError:
        return []
    return [GpuSample(utilization / 100, memory_mib * _MIB, watts)]


def dcgm_samples(page: bytes) -> list[GpuSample]:
    """One sample a GPU from a page of DCGM's exporter; none from any other page."""
    columns = ([float(value) for value in _of_gpus(page, name)] for name in _DCGM)
    return [GpuSample(percent / 100, mib * _MIB, watts) for percent, mib, watts in zip(*columns, strict=False)]


def _of_gpus(page: bytes, name: bytes) -> list[bytes]:
    return re.findall(rb"^%s(?:\{.*\})? (\S+)" % name, page, re.MULTILINE)


def gpu_totals(samples: Sequence[GpuSample]) -> Mapping[str, float]:
    """Mean utilization, most memory and mean power over all samples of all GPUs."""
    if not samples:
        return {}
    utilization, memory, power = np.array(samples).T
    return {
        "gpu_utilization_mean": float(utilization.mean()),
        "gpu_memory_used_bytes_max": float(memory.max()),
        "gpu_power_watts_mean": float(power.mean()),
    }
