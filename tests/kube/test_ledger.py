"""The ledger survives a kill at any byte, and names its owner."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulab.kube.ledger import Ledger, ledgers
from pytest_gpulab.kube.objects import Ref
from pytest_gpulab.kube.place import here
from pytest_gpulab.kube.process import Process
from pytest_gpulab.kube.state import state_folder

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
REFS = st.builds(Ref, NAMES, NAMES, NAMES, NAMES)


def this_process() -> Process:
    return Process.of(os.getpid())


@settings(max_examples=60, deadline=None)
@given(st.lists(REFS, max_size=8), REFS, st.data())
def test_a_torn_line_takes_nothing_else_along(written: list[Ref], later: Ref, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        ledger = Ledger.create(Path(folder) / "r.jsonl", this_process())
        ends = []
        for ref in written:
            ledger.object(ref)
            ends.append(ledger.path.stat().st_size)
        cut = data.draw(st.integers(0, ledger.path.stat().st_size))
        os.truncate(ledger.path, cut)
        # A line is whole without its newline: nothing is missing from what it says.
        whole = [ref for ref, end in zip(written, ends, strict=True) if end - 1 <= cut]
        assert ledger.refs() == list(dict.fromkeys(whole))
        ledger.object(later)
        assert ledger.refs() == list(dict.fromkeys([*whole, later]))


def test_what_is_appended_is_on_disk_before_the_call_returns(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(ledger.path.read_bytes()))
    ledger.up()
    assert synced and synced[-1] == ledger.path.read_bytes() and b'"up"' in synced[-1]


def test_it_lies_in_the_users_state_folder_where_nobody_else_reads_it(ledger: Ledger, state: Path) -> None:
    assert ledger.path.parent == state_folder() == state / "gpulab" / "runs"
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(ledger.folder.stat().st_mode) == 0o700
    assert ledgers(state_folder()) == [ledger]


def test_a_second_ledger_of_the_same_run_is_refused(ledger: Ledger) -> None:
    with pytest.raises(FileExistsError):
        Ledger.create(ledger.path, this_process())


def test_a_ledger_that_was_removed_takes_nothing_more(ledger: Ledger) -> None:
    ledger.remove()
    with pytest.raises(FileNotFoundError):
        ledger.up()
    assert not ledger.path.exists() and not ledger.folder.exists()


def test_the_owner_lives_as_long_as_its_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        owner = Process.of(child.pid)
        ledger = Ledger.create(tmp_path / "r.jsonl", owner)
        assert ledger.owner_lives()
        reused = Ledger.create(tmp_path / "s.jsonl", replace(owner, started=owner.started - 1))
        assert not reused.owner_lives(), "the pid has gone to another process"
        earlier = Ledger.create(tmp_path / "t.jsonl", Process(child.pid, psutil.Process(child.pid).create_time()))
        assert earlier.owner_lives(), "as earlier versions named it"
        child.communicate(b"\n")
    assert not ledger.owner_lives() and not earlier.owner_lives()


def test_a_step_of_the_wall_clock_kills_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells a start in ticks since a boot whose time moves with the clock."""
    ledger = Ledger.create(tmp_path / "r.jsonl", this_process())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        ledger.process(Process.of(child.pid))
        before = psutil._pslinux.boot_time()
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: before + 2.0)
        assert ledger.owner_lives()
        cluster = ledger.cluster_process()
        assert cluster.alive() and cluster.stop() and not cluster.alive()


BOOT, NAMESPACE = here().split("/")
HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("host", "place"),
    [
        ("renamed", f"{BOOT}/{NAMESPACE}"),
        (HOST, f"an-earlier-boot/{NAMESPACE}"),
        (HOST, ""),  # as earlier versions had it
    ],
)
def test_a_dead_run_of_this_machine_is_dead_whatever_its_name(tmp_path: Path, host: str, place: str) -> None:
    ledger = begun_by(tmp_path, host, Process(os.getpid(), 0, place))
    assert ledger.out_of_sight() == "" and not ledger.owner_lives()


@pytest.mark.parametrize(
    ("host", "place"),
    [
        ("elsewhere", "another-boot/1"),
        ("container", f"{BOOT}/1"),
        (HOST, f"{BOOT}/1"),  # a container with the network of its host
        ("elsewhere", ""),
    ],
)
def test_a_run_in_another_place_may_live(tmp_path: Path, host: str, place: str) -> None:
    ledger = begun_by(tmp_path, host, Process(os.getpid(), 0, place))
    assert ledger.out_of_sight() == f"begun on {host}, which cannot be seen from here" and ledger.owner_lives()


def test_a_new_name_of_the_machine_kills_nobody(tmp_path: Path) -> None:
    ledger = begun_by(tmp_path, "renamed", this_process())
    assert ledger.out_of_sight() == "" and ledger.owner_lives()


def begun_by(folder: Path, host: str, owner: Process) -> Ledger:
    """A ledger as `host` would have begun it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: host)
        return Ledger.create(folder / "r.jsonl", owner)
