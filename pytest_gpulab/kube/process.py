"""A process by pid and start time: a pid that another process has got since is nobody we know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psutil

_STOP_S: Final = 10.0
_SAME_START_S: Final = 1.0
"""Start times come in clock ticks, counted from a boot time in seconds."""


@dataclass(frozen=True)
class Process:
    """One process of this machine; `started` in Unix seconds."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> Process:
        """The one that has `pid` now. psutil.NoSuchProcess when none has."""
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        """Whether it still runs."""
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
            return found if abs(found.create_time() - self.started) < _SAME_START_S else None
        except psutil.NoSuchProcess:
            return None
