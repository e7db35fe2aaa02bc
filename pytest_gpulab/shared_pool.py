"""One GPU pool for a whole pytest session: who brings it up, who may use it, and when it is torn down.

The controlling process owns the run. The first process that asks brings the pool up, the others join it, and the
owner tears it down after every other end of the session, so that no worker is left that could still create something.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest

from pytest_gpulab.kube.state import ledger_path

if TYPE_CHECKING:
    from pytest_gpulab.kube.client import Kube
    from pytest_gpulab.kube.ledger import Ledger
    from pytest_gpulab.kube.objects import Object
    from pytest_gpulab.kube.pool import Pool

EndRun: TypeAlias = "Callable[[Ledger], list[str]]"

RUN_KEY = "gpulab_run"
"""Entry of xdist's workerinput: id of the run, and pid of its owner."""
_ENDINGS: Final = (signal.SIGTERM, signal.SIGHUP)
"""Somebody ends the session; the terminal or the connection that it was started from is gone."""


class SharedPool:
    """The session's pool, in the process that owns it or in a worker. Nothing happens before one asks for it."""

    def __init__(self, config: pytest.Config) -> None:
        given: tuple[str, int] | None = getattr(config, "workerinput", {}).get(RUN_KEY)
        self._owns = given is None
        self.run, self._owner_pid = given or (_new_run(), os.getpid())
        self._path = ledger_path(self.run)
        self._ledger: Ledger | None = None
        """What this process knows of the run, whatever becomes of the file."""
        self._heeded: list[signal.Signals] = []
        self._end_run: EndRun = _tear_down
        self._reason = ""
        self.problems: list[str] = []
        """What the teardown could not remove."""

    def equip_worker(self, workerinput: dict[str, Any]) -> None:
        """Tell a worker which run it belongs to."""
        self._heed()
        workerinput[RUN_KEY] = (self.run, self._owner_pid)

    def obtain(
        self,
        objects: Iterable[Object],
        *,
        start: Callable[[Ledger], Kube],
        lock: Path,
        end: EndRun | None = None,
    ) -> Pool:
        """The pool with `objects`: brought up by the first who asks, joined by the others.

        Args:
            objects: looked at when the cluster is there.
            start: connects the run to its cluster, which it may have to start.
            lock: a file that all processes of the session share.
            end: removes the run, and what `start` made besides; what is left. None: there is nothing besides.

        Raises:
            KubeError: it could not be brought up, here or in the worker that tried.
        """
        from filelock import FileLock

        from pytest_gpulab.kube.ledger import Ledger
        from pytest_gpulab.kube.pool import bring_up, join
        from pytest_gpulab.kube.process import Process

        self._heed()
        self._end_run = end or _tear_down
        with FileLock(lock):
            if self._path.exists():
                self._ledger = Ledger(self._path)
                return join(self._ledger)
            self._ledger = Ledger.create(self._path, Process.of(self._owner_pid))
            return bring_up(self._ledger, start(self._ledger), objects)

    def stop(self, reason: str) -> None:
        """End the session in order, as SIGTERM does; for threads that find that it must not go on."""
        self._reason = reason
        os.kill(os.getpid(), signal.SIGTERM if signal.SIGTERM in self._heeded else signal.SIGINT)

    def finish(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """Tear down after every other end of the session; what is left, GPU nodes above all, fails it."""
        try:
            return (yield)
        finally:
            if self._ledger is not None:
                self._ledger.rescue()  # a worker's owner may know nothing of it
            if self._owns and self._begun():
                self._tear_down()
            self._answer_endings(signal.SIG_DFL)
            if self.problems and session.exitstatus not in _WORSE:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def summarize(self, reporter: pytest.TerminalReporter) -> None:
        """Say what ended the session, and what is left."""
        if self._reason:
            reporter.section("gpulab: the session was stopped", red=True)
            reporter.line(self._reason)
        if self.problems:
            reporter.section("gpulab: the GPU pool was not torn down cleanly", red=True)
            for problem in self.problems:
                reporter.line(problem)
        if self._owns and self._path.exists():
            reporter.line("something is left: `gpulab reap` tries again")

    def _tear_down(self) -> None:
        from pytest_gpulab.kube.ledger import Ledger

        self._answer_endings(signal.SIG_IGN)  # it is ending already
        ledger = Ledger(self._path)
        if ledger.lost():
            self.problems = [_nobody_knows(ledger)]
            return
        self.problems = ledger.loss()
        try:
            self.problems += self._end_run(ledger)
        except KeyboardInterrupt:  # once more, by somebody who does not want to wait: what is left has a ledger
            self.problems.append("the teardown was interrupted before its end")

    def _begun(self) -> bool:
        """Whether there is something to tear down: a worker may have brought it up, and the ledger may be lost."""
        return self._ledger is not None or self._path.exists() or self._path.with_suffix("").exists()

    def _heed(self) -> None:
        """Turn `_ENDINGS` into an orderly end of the session while there is a pool; the owner hears them.

        What is ignored stays so: nohup has SIGHUP ignored.
        """
        if self._owns and threading.current_thread() is threading.main_thread():
            unheeded = [number for number in _ENDINGS if signal.getsignal(number) == signal.SIG_DFL]
            self._heeded += unheeded
            for number in unheeded:
                signal.signal(number, self._end)

    def _answer_endings(self, action: signal.Handlers) -> None:
        for number in self._heeded:
            signal.signal(number, action)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._begun():
            self._answer_endings(signal.SIG_IGN)  # shell and kernel both tell of a terminal that is gone
            on_interrupt = signal.getsignal(signal.SIGINT)
            if callable(on_interrupt) and on_interrupt is not signal.default_int_handler:
                on_interrupt(signal.SIGINT, frame)  # a load is running, which ends with what there is of it
                return
            raise KeyboardInterrupt(self._reason or signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


_WORSE = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)

POOL_KEY = pytest.StashKey[SharedPool]()


def shared_pool_of(config: pytest.Config) -> SharedPool:
    """The session's pool; KeyError before pytest_configure."""
    return config.stash[POOL_KEY]


def _tear_down(run: Ledger) -> list[str]:
    from pytest_gpulab.kube.teardown import tear_down

    return tear_down(run).problems


def _nobody_knows(run: Ledger) -> str:
    return (
        f"the ledger {run.path} must stay until its run is over, but somebody removed it, and the worker that knew "
        f"it has died: end the processes whose command names {run.folder}"
    )


def _new_run() -> str:
    """Sorts by time, is a label's value and a file's name."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
