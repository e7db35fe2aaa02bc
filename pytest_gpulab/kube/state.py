"""Where runs keep what must outlive them: a folder of this user, one ledger a run."""

from __future__ import annotations

import os
from pathlib import Path


def state_folder() -> Path:
    """`$XDG_STATE_HOME/gpulab/runs`, by default below `~/.local/state`."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "gpulab" / "runs"


def ledger_path(run: str) -> Path:
    """The ledger of a run, whether it has one or not."""
    return state_folder() / f"{run}.jsonl"
