"""The same seed gives the same record, byte for byte apart from times, whatever process and order it ran in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def record(folder: Path, hash_seed: str, *arguments: str) -> str:
    """The record of the autoscaling study in a process of its own, without what tells when and how long."""
    command = [sys.executable, "-m", "pytest", "experiments/test_autoscaling.py", f"--gpulab-report-dir={folder}"]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = json.loads((folder / "decision-record.partial.json").read_text(encoding="utf-8"))
    for time in ("started", "seconds"):
        del found["session"][time]
    return json.dumps(found, indent=1)


@pytest.mark.slow
def test_the_autoscaling_study_gives_the_same_record_again(tmp_path):
    alone = record(tmp_path / "alone", "1")
    assert json.loads(alone)["decisions"][0]["runs"], "there is something to compare"
    assert record(tmp_path / "again", "2", "-n", "2") == alone
