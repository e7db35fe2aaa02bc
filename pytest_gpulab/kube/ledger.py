"""The ledger: what a run is about to create, on disk before it exists, so that nothing is forgotten with the run.

One file of JSON lines a run, in a folder of this user. Lines are only ever added. A kill in the middle of one leaves
a torn line, which is read over: what it was about to say had not begun. A run without a ledger owns nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pytest_gpulab.kube.objects import Ref
from pytest_gpulab.kube.place import can_see
from pytest_gpulab.kube.process import Process

Entry = dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """The ledger at `path`, and the run's private folder beside it."""

    path: Path
    _known: list[Entry] = field(default_factory=list, init=False, repr=False, compare=False)
    """What it said when this process last read or wrote it."""

    @classmethod
    def create(cls, path: Path, owner: Process) -> Self:
        """A new ledger whose run lives as long as `owner`. FileExistsError when there is one."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        ledger = cls(path)
        ledger._append(entry="run", host=socket.gethostname(), **vars(owner))
        _sync_folder(path.parent)
        ledger.folder.mkdir(mode=0o700)
        return ledger

    @property
    def run(self) -> str:
        """Id of the run."""
        return self.path.stem

    @property
    def folder(self) -> Path:
        """The run's own: kubeconfig, logs, caches. It goes with the ledger."""
        return self.path.with_suffix("")

    # --- writing ----------------------------------------------------------------------------------------------

    def cluster(self, kubeconfig: Path, speed: float) -> None:
        """The run is going to use the cluster behind a kubeconfig."""
        self._append(entry="cluster", kubeconfig=str(kubeconfig), speed=speed)

    def process(self, process: Process) -> None:
        """The cluster is this process, which has not begun to work yet."""
        self._append(entry="process", **vars(process))

    def object(self, ref: Ref) -> None:
        """The run is going to create this."""
        self._append(entry="object", ref=ref)

    def up(self) -> None:
        """The pool is complete: others of the run may use it."""
        self._append(entry="up")

    def _append(self, **entry: Any) -> None:
        """One line, on disk when this returns. FileNotFoundError when the ledger is gone."""
        file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        try:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            os.write(file, (b"\n" if torn else b"") + json.dumps(entry).encode() + b"\n")
            os.fsync(file)
        finally:
            os.close(file)
        self._known.append(entry)

    def lost(self) -> bool:
        """Whether somebody else removed the file, but not what it names: the run's folder goes first."""
        return not self.path.exists() and self.folder.exists()

    def rescue(self) -> None:
        """Write it again as this process knows it, if it is gone."""
        if self.path.exists():
            return
        known = [*self._known, {"entry": "rescued"}]
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.touch(mode=0o600)
        for entry in known:
            self._append(**entry)

    def loss(self) -> list[str]:
        """What to tell the user of a ledger that was rescued; nothing of any other."""
        problem = (
            f"the ledger {self.path} must stay until its run is over, but somebody removed it: it was written again "
            "from memory. See that nothing else cleans up that folder"
        )
        return [problem] if self._of("rescued") else []

    def remove(self) -> None:
        """Forget the run: first its folder, the ledger last."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    # --- reading ----------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Every whole line, in order."""
        self._known[:] = _whole(self.path.read_bytes())
        return list(self._known)

    def owner_lives(self) -> bool:
        """Whether the run's session goes on, or may: see `out_of_sight`."""
        run = self._begun()
        if run is None:
            return False  # killed before its first line: it has not begun
        return bool(self.out_of_sight()) or _process(run).alive()

    def out_of_sight(self) -> str:
        """Why it cannot be told from here whether the run's session lives; empty when it can."""
        run = self._begun()
        if run is None or can_see(run["host"], run.get("place", "")):
            return ""
        return f"begun on {run['host']}, which cannot be seen from here"

    def is_up(self) -> bool:
        """Whether the pool is complete."""
        return bool(self._of("up"))

    def connection(self) -> tuple[Path, float] | None:
        """Kubeconfig and speed of the cluster, if the run came that far."""
        return next(((Path(entry["kubeconfig"]), entry["speed"]) for entry in self._of("cluster")), None)

    def cluster_process(self) -> Process | None:
        """The embedded cluster, if the run started one."""
        return next(map(_process, self._of("process")), None)

    def refs(self) -> list[Ref]:
        """Objects that may exist, each once, in the order of their creation."""
        return list(dict.fromkeys(Ref(*entry["ref"]) for entry in self._of("object")))

    def _begun(self) -> Entry | None:
        return next(iter(self._of("run")), None)

    def _of(self, kind: str) -> list[Entry]:
        return [entry for entry in self.entries() if entry["entry"] == kind]


def ledgers(folder: Path) -> list[Ledger]:
    """Every run that may have left something, oldest first by id."""
    return [Ledger(path) for path in sorted(folder.glob("*.jsonl"))]


def _process(entry: Entry) -> Process:
    """The one that an entry names; earlier versions named no place."""
    return Process(entry["pid"], entry["started"], entry.get("place", ""))


def _whole(text: bytes) -> Iterator[Entry]:
    for line in text.split(b"\n"):
        try:
            yield json.loads(line)
        except ValueError:  # torn, or the end
            continue


def _sync_folder(folder: Path) -> None:
    """The file's name is on disk too."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
