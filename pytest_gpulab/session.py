"""The session as the controller sees it: merges what items report, writes the record, sets the exit status.

Invariants: only the controlling process writes; a narrowed session never touches the full record; a session in
which nothing asked for evidence leaves no trace.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpulab.markers import Entry, catalog_of, enter, entry_of
from pytest_gpulab.narrowing import collected, deselected_by_an_option, narrowing, only
from pytest_gpulab.options import options_of

if TYPE_CHECKING:
    from pytest_gpulab.baseline import Change
    from pytest_gpulab.outcomes import Reported
    from pytest_gpulab.record import Decision, Record

FOLDER_KEY = "gpulab_folder"
"""Entry of xdist's workerinput: where a worker leaves its catalog, so that it outlives the worker."""


def is_worker(config: pytest.Config) -> bool:
    """Whether this process runs items for a controller (xdist)."""
    return hasattr(config, "workerinput")


def runs_nothing(config: pytest.Config) -> bool:
    """Whether pytest was asked to show something instead of running tests."""
    shows = ("collectonly", "setupplan", "setuponly", "showfixtures", "show_fixtures_per_test", "cacheshow")
    return any(config.getoption(name, False) for name in shows)


class Session:
    """This run's catalog and outcomes, in the process that runs pytest, or in a worker (catalog only)."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.options = options_of(config)
        self.record: Record | None = None
        self.written: Path | None = None
        self.failure = ""
        """Why the record could not be written."""
        self.changes: list[Change] = []
        self._entered: dict[str, Entry] = {}
        self._catalog: dict[str, Entry] = {}
        self._deselected: set[str] = set()
        """By an option of pytest's."""
        self._left_out: list[str] = []
        """Node ids of entered items that will not run, although no option says so."""
        self._outcomes: dict[str, Reported] = {}
        self._collection_errors: dict[str, str] = {}
        self._skipped_files: set[str] = set()
        self._reported: set[str] = set()
        self._failed: set[str] = set()
        self._stopped = ""
        self._problems: list[str] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._baseline = self._load_baseline()

    @property
    def asks(self) -> bool:
        """Something collected can carry evidence."""
        return bool(self._catalog)

    @property
    def decisions(self) -> Sequence[Decision]:
        """Of the record; none before the session has ended."""
        return self.record.decisions if self.record is not None else ()

    # --- collection -----------------------------------------------------------------------------------------

    def check_items(self, items: list[pytest.Item]) -> None:
        """Read the markers of what is collected: of all before anything is deselected, then those added meanwhile.

        UsageError on bad ones; a worker tells its controller instead and runs nothing.
        """
        self._problems += enter(items)
        entered = catalog_of(items)
        self._entered.update(entered)
        if entered and not __debug__:
            self._problems.append("gates are asserts, which python -O and PYTHONOPTIMIZE leave out; run without them")
        if self._problems and is_worker(self.config):
            items.clear()
        elif self._problems:
            raise pytest.UsageError("\n".join(self._problems))

    def leave_ordinary_tests(self, items: list[pytest.Item]) -> None:
        """A session that is only played through must not do twice what is none of its business."""
        if self.options.target != "plan":
            return
        ordinary = [item for item in items if entry_of(item) is None]
        items[:] = [item for item in items if entry_of(item) is not None]
        self.config.hook.pytest_deselected(items=ordinary)

    def note_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Remember what an option leaves out; everything else that is gone in the end was left out by a plugin."""
        if deselected_by_an_option():
            self._deselected.update(item.nodeid for item in items)

    def know_items(self, items: Sequence[pytest.Item]) -> None:
        """Take the catalog from the items that will run; a worker leaves it for its controller."""
        self._catalog = catalog_of(items)
        self._left_out = sorted(self._entered.keys() - self._catalog.keys() - self._deselected)
        if is_worker(self.config):
            self._leave_catalog()
        elif self._catalog and not runs_nothing(self.config):
            self._check_report_dir()

    def equip_worker(self, workerinput: dict[str, Any]) -> None:
        """Tell a worker where to leave its catalog."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="pytest-gpulab-")
        workerinput[FOLDER_KEY] = self._folder.name

    def take_catalog(self, workerid: str) -> None:
        """Take over what a worker has collected. UsageError when its markers are wrong."""
        path = Path(self._folder.name, f"{workerid}.json") if self._folder else None
        if path is None or not path.is_file():  # a worker on another machine: its reports say what they are
            return
        left = json.loads(path.read_text(encoding="utf-8"))
        if left["problems"]:
            raise pytest.UsageError("\n".join(left["problems"]))
        if not self._catalog and left["catalog"]:
            self._left_out = left["left_out"]
            self._catalog = {entry[0]: Entry(*entry) for entry in left["catalog"]}
            self._check_report_dir()

    def _leave_catalog(self) -> None:
        workerinput: dict[str, Any] = self.config.workerinput  # type: ignore[attr-defined]
        folder = Path(workerinput[FOLDER_KEY])
        if (self._catalog or self._problems) and folder.is_dir():
            left = {
                "problems": self._problems,
                "catalog": list(self._catalog.values()),
                "left_out": self._left_out,
            }
            Path(folder, f"{workerinput['workerid']}.json").write_text(json.dumps(left), encoding="utf-8")

    def note_collection(self, report: pytest.CollectReport) -> None:
        """A folder or file that cannot be collected may hold decisions, and one that is skipped as a whole too."""
        if report.failed:
            last = self._from_root(_last_line(report.longreprtext))
            self._collection_errors[report.nodeid] = f"could not be collected: {last}"
        elif report.skipped and _names_evidence(self.config.rootpath / report.nodeid):
            self._skipped_files.add(report.nodeid)

    # --- running --------------------------------------------------------------------------------------------

    def note(self, report: pytest.TestReport) -> None:
        """Take one report of one phase of one item."""
        self._reported.add(report.nodeid)
        evidence = getattr(report, "gpulab", None)
        if report.outcome == "failed":
            self._failed.add(report.nodeid)
        if evidence is None and report.nodeid not in self._catalog:
            return
        from pytest_gpulab.outcomes import Reported

        outcome = self._outcomes.setdefault(report.nodeid, Reported())
        if report.when == "setup":
            outcome.begin()
        if evidence is not None:
            outcome.add(evidence)
            self._catalog.setdefault(report.nodeid, Entry(report.nodeid, evidence["decision"], evidence["statement"]))
        verdict = evidence["verdict"] if evidence is not None else None
        if report.outcome == "failed" and verdict is None:
            outcome.error = self._from_root(_crash(report, evidence))
        elif report.outcome == "skipped" and verdict is None and not hasattr(report, "wasxfail"):
            outcome.skipped = _skip_reason(report)
        outcome.done = report.when not in ("setup", "call")

    def note_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Remember what ended the session before its end."""
        self._stopped = str(excinfo.value) or type(excinfo.value).__name__

    def _from_root(self, text: str) -> str:
        """`text` with paths counted from the root folder: a record must not depend on where the project lies."""
        return text.replace(f"{self.config.rootpath}{os.sep}", "")

    # --- the end --------------------------------------------------------------------------------------------

    def finish(self, session: pytest.Session) -> None:
        """Write the record and set the exit status; nothing in a worker or where nothing ran."""
        usage_error = session.exitstatus == pytest.ExitCode.USAGE_ERROR
        if is_worker(self.config) or runs_nothing(self.config) or usage_error:
            return
        if not self._catalog and self._baseline is None:
            return
        record = self._compose(session)
        if self._catalog:
            self.record = record
            self._write(record)
        if self._baseline is not None:
            self._hold_against_baseline(session, record)
        if self.failure and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def close(self) -> None:
        """Remove what workers left."""
        if self._folder is not None:
            self._folder.cleanup()

    def _compose(self, session: pytest.Session) -> Record:
        from pytest_gpulab.outcomes import Setting, compose
        from pytest_gpulab.record import SessionInfo

        return compose(
            self._catalog,
            self._outcomes,
            self._collection_errors,
            Setting(
                target=self.options.target,
                accelerator=self.options.accelerator,
                git_commit=_git_commit(self.config.rootpath, {nodeid.split("::")[0] for nodeid in self._catalog}),
                versions=_versions(),
            ),
            SessionInfo(
                started=self._started.isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - self._clock, 3),
                first_seed=self.options.first_seed,
                max_repeats=self.options.max_repeats,
                require=self.options.require,
                narrowed=self._narrowed(session),
                collected=collected(self.config),
                load_from=self.options.load_from,
            ),
        )

    def _narrowed(self, session: pytest.Session) -> str:
        """Why this session did not run the whole catalog; empty when it did."""
        chosen = narrowing(self.config) or self._part_of_the_record_there()
        if chosen:
            return chosen
        if self._left_out:
            more = len(self._left_out) - 1
            return f"a plugin left out {self._left_out[0]}" + (f" and {more} more" if more else "")
        if self._collection_errors:
            return f"could not collect {', '.join(sorted(self._collection_errors))}"
        if self._skipped_files:
            return f"skipped as a whole: {', '.join(sorted(self._skipped_files))}"
        if session.exitstatus == pytest.ExitCode.INTERNAL_ERROR:
            return "internal error"
        stopped = self._stopped or str(session.shouldfail or session.shouldstop or "")
        if stopped and len(self._reported) < session.testscollected:
            return stopped
        return stopped if any(not outcome.done for outcome in self._outcomes.values()) else ""

    def _part_of_the_record_there(self) -> str:
        """How much this session collected of what the full record in the report folder has; empty for all of it."""
        from pytest_gpulab.baseline import covers, read_record

        try:
            known = read_record(self.options.report_dir / "decision-record.json").session.collected
        except ValueError:
            return ""
        mine, theirs = collected(self.config), [path for path in known if (self.config.rootpath / path).exists()]
        return "" if covers(mine, theirs) else only(mine, theirs)

    def _write(self, record: Record) -> None:
        from pytest_gpulab.files import replacing
        from pytest_gpulab.report.markdown import to_markdown

        name = "decision-record.partial" if record.session.narrowed else "decision-record"
        folder = self.options.report_dir
        texts = {f"{name}.md": to_markdown(record), f"{name}.json": record.to_json()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in texts.items():
                with replacing(folder / file) as out:
                    out.write(text.encode())
        except OSError as wrong:
            self.failure = f"could not write {folder / name}.json: {wrong}"
        else:
            self.written = folder / f"{name}.json"

    def _hold_against_baseline(self, session: pytest.Session, record: Record) -> None:
        from pytest_gpulab.baseline import compare, exit_status

        assert self._baseline is not None
        self.changes = compare(record, self._baseline)
        own = int(session.exitstatus)
        stopped_early = own == pytest.ExitCode.INTERRUPTED and bool(session.shouldfail or self._stopped_at_failures)
        if own in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR) and not (
            stopped_early or self._collection_errors
        ):
            return
        session.exitstatus = exit_status(1 if stopped_early else own, record, self._baseline, self._failed)

    @property
    def _stopped_at_failures(self) -> bool:
        """xdist reports ``-x`` as an interruption."""
        return self._stopped.startswith("stopping after ")

    # --- checks before anything runs --------------------------------------------------------------------------

    def _load_baseline(self) -> Record | None:
        if self.options.gate is None or is_worker(self.config):
            return None
        from pytest_gpulab.baseline import load_baseline

        try:
            return load_baseline(self.options.gate, self.options, collected(self.config))
        except ValueError as wrong:
            raise pytest.UsageError(f"--gpulab-gate: {wrong}") from None

    def _check_report_dir(self) -> None:
        """UsageError when no file can be made in the report folder."""
        folder = self.options.report_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as wrong:
            raise pytest.UsageError(
                f"--gpulab-report-dir: cannot write into {folder}: {wrong.strerror or wrong}; "
                "name a folder that can be written"
            ) from None


SESSION_KEY = pytest.StashKey[Session]()


def session_of(config: pytest.Config) -> Session:
    """This run's session; KeyError before pytest_configure."""
    return config.stash[SESSION_KEY]


def _crash(report: pytest.TestReport, evidence: dict[str, Any] | None) -> str:
    """Why an item crashed, in one line that does not depend on the worker."""
    if report.when not in ("setup", "call", "teardown"):
        return "the worker process died while it ran"
    if evidence is not None and evidence["reason"]:
        return str(evidence["reason"])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = _first_lines(str(crash.message)) if crash is not None else _last_line(report.longreprtext)
    return f"{report.when} failed: {text}"


def _first_lines(message: str) -> str:
    """The line that says what happened; pydantic says which field and why in the two after its first."""
    lines = message.splitlines()
    return " ".join(line.strip() for line in lines[: 3 if "ValidationError" in lines[0] else 1])


def _skip_reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    return str(reason).replace("Skipped: ", "skipped: ", 1)


def _last_line(text: str) -> str:
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _names_evidence(file: Path) -> bool:
    """Whether a file that nobody could look into seems to hold experiments: most that skip themselves do not."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(word in text for word in ("mark.decision", "measure("))


def _git_commit(root: Path, files: Iterable[str]) -> str:
    """HEAD of `root`, with ``+dirty`` when a folder of `files` has uncommitted changes; empty outside git."""
    folders = sorted({str(Path(file).parent) for file in files}) or ["."]
    head = _git(root, "rev-parse", "HEAD")
    if not head:
        return ""
    return head + ("+dirty" if _git(root, "status", "--porcelain", "--", *folders) else "")


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("pytest", "pytest-gpulab", "numpy", "pydantic")},
    }
