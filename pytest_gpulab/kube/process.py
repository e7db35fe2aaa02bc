"""A process by pid and start: a pid that another process has got since is nobody we know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from pytest_gpulab.kube.place import here

_STOP_S: Final = 10.0
_SAME_START_S: Final = 1.0
"""Start times come in clock ticks, counted from a boot time in seconds."""
_START_TICKS: Final = 19
"""The 22nd field of a process's stat, after its pid and its name, which may have blanks."""


@dataclass(frozen=True)
class Process:
    """One process.

    `place`: where its pid means something. `started`: clock ticks since the boot, which no step of the wall clock
    moves. Without a place (on macOS, and in the ledgers of earlier versions): Unix seconds.
    """

    pid: int
    started: float
    place: str = ""

    @classmethod
    def of(cls, pid: int) -> Process:
        """The one that has `pid` now. psutil.NoSuchProcess when none has."""
        place = here()
        return cls(pid, _ticks(pid) if place else psutil.Process(pid).create_time(), place)

    def alive(self) -> bool:
        """Whether it still runs here."""
        found = self._found()
        return found is not None and found.status() != psutil.STATUS_ZOMBIE

    def stop(self) -> bool:
        """Ask it to end, then make it; whether it was there at all."""
        found = self._found()
        if found is None:
            return False
        try:
            found.terminate()
            try:
                found.wait(_STOP_S)
            except psutil.TimeoutExpired:
                found.kill()
                found.wait(_STOP_S)
        except psutil.NoSuchProcess:
            pass
        return True

    def _found(self) -> psutil.Process | None:
        try:
            found = psutil.Process(self.pid)
            if self.place:
                return found if self == Process.of(self.pid) else None
            return found if abs(found.create_time() - self.started) < _SAME_START_S else None
        except psutil.NoSuchProcess:
            return None


def _ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return int(stat.rpartition(b")")[2].split()[_START_TICKS])
