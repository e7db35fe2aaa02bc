"""One test item under watch: its ledger through setup, call and teardown, and what its reports then say.

Invariants: an item keeps the first verdict it reached, whatever reruns it; a gate is only recorded while the
item's own body runs; reports carry builtin types only, because they cross processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from traceback import format_exception
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpulab.markers import Entry, entry_of, statement_of
from pytest_gpulab.options import options_of
from pytest_gpulab.verdict import Ending, Judgement, demand, judge, weakest

if TYPE_CHECKING:
    from pytest_gpulab.gates import Ledger
    from pytest_gpulab.measurement import Measurement

WATCH_KEY = pytest.StashKey["Watch"]()
KNOWN_KEY = pytest.StashKey[dict[int, "Measurement"]]()
"""Every measurement of this process by identity: each item counts the repeats of a shared fixture's anew."""

_PROPERTIES = ("verdict", "decision", "basis")


class Watch:
    """What one item shows, over all its attempts."""

    def __init__(self, item: pytest.Item, entry: Entry) -> None:
        from pytest_gpulab.gates import Ledger

        self.item = item
        self.entry = entry
        self.ledger = Ledger(item.nodeid, in_test=False)
        self.judgement: Judgement | None = None
        self._evidence: dict[str, Any] | None = None
        self._known = item.config.stash.setdefault(KNOWN_KEY, {})

    @property
    def stands(self) -> bool:
        """A verdict was reached in an earlier attempt."""
        return self._evidence is not None and self._evidence["verdict"] is not None

    def begin(self) -> None:
        """Start an attempt; a verdict that stands stays."""
        from pytest_gpulab.gates import Ledger

        if not self.stands:
            for measurement in self._known.values():
                measurement.pulled = 0  # repeats that another item asked for are none of this one's
            self.ledger = Ledger(self.item.nodeid, in_test=False)
            self.judgement = None

    def during(self, phase: str) -> Generator[None, Any, Any]:
        """Run `phase` of the item with its ledger open; a refusal becomes a skip."""
        from pytest_gpulab.gates import Blocked, collecting

        self.ledger.in_test = phase == "call"
        with collecting(self.ledger):
            try:
                return (yield)
            except Blocked as refusal:
                if phase == "teardown":
                    raise
                self.judgement = judge(self.ledger.gates, Ending("blocked", str(refusal)), gate_needed=False)
                if self.judgement.verdict is None:
                    raise pytest.fail.Exception(self.judgement.reason, pytrace=False) from None
                raise pytest.skip.Exception(f"blocked: {refusal}") from None
            finally:
                self._known.update({id(measurement): measurement for measurement in self.ledger.measurements})

    def call(self) -> Generator[None, Any, Any]:
        """Run the body and judge it. Errors of its own (a decision without a gate) are raised as failures."""
        first = self.judgement if self.stands else None
        result, ended = None, None
        try:
            result = yield from self.during("call")
        except (KeyboardInterrupt, GeneratorExit, pytest.exit.Exception):
            raise
        except BaseException as exception:
            ended = exception
        if first is not None:
            return self._keep(first, ended)
        if self.judgement is None:
            self.judgement = self._judge(_ending_of(ended, self.ledger.refuted_in))
        if ended is None and self.judgement.verdict is None and self.judgement.reason:
            raise pytest.fail.Exception(self.judgement.reason, pytrace=False)
        if ended is not None and self.judgement.verdict not in ("open", "partial"):
            raise self._explained(ended)
        return result

    def report(self, report: pytest.TestReport) -> None:
        """Give `report` the outcome of the verdict, and the evidence once the item is judged."""
        if report.when == "teardown":
            if report.failed:
                self._set_properties(report, None)
            return
        if hasattr(report, "wasxfail") and self.entry.decision is not None:
            self.judgement = judge(self.ledger.gates, Ending("xfailed"), gate_needed=True)
            del report.wasxfail
            report.outcome, report.longrepr = "failed", self.judgement.reason
        if self.judgement is None or (report.when == "setup" and report.passed):
            return
        if report.failed and self.judgement.verdict not in (None, "rejected") and not self.stands:
            self.judgement = Judgement(None, f"the test failed, though no gate refuted anything: {_crash(report)}")
        if self.judgement.verdict == "blocked":
            path, line, _ = self.item.location
            report.longrepr = (path, (line or 0) + 1, f"Skipped: blocked: {self.judgement.reason}")
        elif self.judgement.verdict in ("open", "partial") and report.passed:
            report.outcome = "skipped"
            report.wasxfail = self.judgement.reason
        if not self.stands:
            try:
                self._evidence = self._gather()
            except Exception as crash:
                self._fail(report, crash)
        if self._evidence is not None:
            report.__dict__["gpulab"] = self._evidence
            self._set_properties(report, self._evidence)
            self._illustrate(report)

    def _judge(self, ending: Ending) -> Judgement:
        judgement = judge(self.ledger.gates, ending, gate_needed=self.entry.decision is not None)
        if judgement.verdict is not None and self.ledger.lost:
            return Judgement(None, self.ledger.lost)
        basis = weakest(m.run(0).provenance.basis for m in self.ledger.measurements if _has_run(m))
        return demand(judgement, basis, options_of(self.item.config).require)

    def _keep(self, first: Judgement, ended: BaseException | None) -> None:
        if ended is not None:
            raise ended
        if first.verdict == "rejected":
            raise pytest.fail.Exception(f"the first verdict stands: rejected: {first.reason}", pytrace=False)

    def _explained(self, ended: BaseException) -> BaseException:
        """`ended`, with a note where it says too little, or looks like evidence but is none."""
        judgement = self.judgement or Judgement(None, "")
        if judgement.verdict == "rejected" and judgement.reason not in str(ended):
            ended.add_note(judgement.reason)
        ordinary = self.entry.decision is None and not self.ledger.gates
        if judgement.verdict is not None or ordinary or judgement.reason == _ending_of(ended, None).reason:
            return ended
        if isinstance(ended, Exception):
            ended.add_note(f"gpulab: no verdict: {judgement.reason}")
            return ended
        return pytest.fail.Exception(judgement.reason, pytrace=False)

    def _gather(self) -> dict[str, Any] | None:
        """Everything the record needs, in builtin types; None for a test that turned out to be an ordinary one."""
        from pytest_gpulab.measurement import evidence_of

        judgement = self.judgement or Judgement(None, "")
        if self.entry.decision is None and not self.ledger.gates and judgement.verdict is None:
            return None
        # A measurement whose first run was refused has nothing to summarize.
        self.ledger.measurements = [m for m in self.ledger.measurements if _has_run(m)]
        evidence = evidence_of(self.ledger)
        for gate in evidence["gates"]:
            gate["file"] = _relative(gate["file"], self.item)
        return {
            "decision": self.entry.decision,
            "statement": self.entry.statement,
            "verdict": judgement.verdict,
            "basis": weakest(run["basis"] for run in evidence["runs"]),
            "reason": judgement.reason.replace(f"{self.item.config.rootpath}{os.sep}", ""),
            **evidence,
        }

    def _fail(self, report: pytest.TestReport, crash: Exception) -> None:
        """The item cannot say what it has shown: an error of this item, not of the session."""
        self.judgement = Judgement(None, f"its evidence cannot be summarized: {type(crash).__name__}: {crash}")
        report.outcome = "failed"
        report.longrepr = f"{''.join(format_exception(crash))}\n{self.judgement.reason}"
        report.__dict__.pop("wasxfail", None)

    def _set_properties(self, report: pytest.TestReport, evidence: dict[str, Any] | None) -> None:
        """JUnit reads the item's properties; consumers of the report see the same."""
        kept = [pair for pair in self.item.user_properties if pair[0] not in _PROPERTIES]
        kept += [(name, evidence[name]) for name in _PROPERTIES if evidence and evidence[name] is not None]
        self.item.user_properties[:] = kept
        report.user_properties = list(kept)

    def _illustrate(self, report: pytest.TestReport) -> None:
        config = self.item.config
        if not (config.pluginmanager.hasplugin("html") and config.getoption("htmlpath", None)):
            return
        from pytest_gpulab.report.html import extras, without_extras

        try:
            own = extras(self.ledger, config, self._evidence, self.entry.statement)
        except Exception as crash:
            own = without_extras(crash)
        report.__dict__["extras"] = [*getattr(report, "extras", []), *own]


# --- what the hooks call --------------------------------------------------------------------------------------


def setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Wrap the setup phase; ordinary tests pass through."""
    watch = item.stash.get(WATCH_KEY, None) or _new_watch(item)
    if watch is None:
        return (yield)
    watch.begin()
    return (yield from watch.during("setup"))


def call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Wrap the call phase."""
    watch = item.stash.get(WATCH_KEY, None)
    return (yield) if watch is None else (yield from watch.call())


def teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """Wrap the teardown phase."""
    watch = item.stash.get(WATCH_KEY, None)
    return (yield) if watch is None else (yield from watch.during("teardown"))


def skip_body(item: pytest.Item) -> bool | None:
    """True where a verdict stands already, so that a rerun does not ask again."""
    watch = item.stash.get(WATCH_KEY, None)
    return True if watch is not None and watch.stands else None


def fixture_setup() -> Generator[None, Any, Any]:
    """Close the ledger while a fixture is set up, also one that the test asks for while it runs."""
    ledger = _open_ledger()
    if ledger is None:
        return (yield)
    was, ledger.in_test = ledger.in_test, False
    try:
        return (yield)
    finally:
        ledger.in_test = was


def make_report(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Wrap the making of a report."""
    report = yield
    watch = item.stash.get(WATCH_KEY, None)
    if watch is not None:
        watch.report(report)
    return report


def explain_comparison(left: object, right: object) -> list[str] | None:
    """The numbers of the gate that just failed, for pytest's assertion message; None for any other comparison."""
    ledger = _open_ledger()
    if ledger is None or ledger.refuted is None:
        return None
    claim, gate = ledger.refuted, ledger.gates[-1]
    own = getattr(claim, "left", None) is left and getattr(claim, "right", None) is right
    return [gate.text, gate.reason] if own else None


def _new_watch(item: pytest.Item) -> Watch | None:
    """A watch for catalogued items, and for any test once gates are loaded; None for an ordinary test."""
    entry = entry_of(item)
    if entry is None:
        if "pytest_gpulab.gates" not in sys.modules:
            return None
        entry = Entry(item.nodeid, None, statement_of(item))
    watch = item.stash[WATCH_KEY] = Watch(item, entry)
    return watch


def _open_ledger() -> Ledger | None:
    gates = sys.modules.get("pytest_gpulab.gates")
    return gates.current_ledger() if gates is not None else None


def _ending_of(exception: BaseException | None, refuted_in: FrameType | None) -> Ending:
    """How the body ended; an AssertionError has a place only in the frame that asked the last false gate."""
    if exception is None:
        return Ending("passed")
    exception = _assertion_in(exception) or exception
    text = str(exception)
    reason = f"{type(exception).__name__}: {text.splitlines()[0]}" if text else type(exception).__name__
    if isinstance(exception, pytest.skip.Exception):
        return Ending("skipped", f"skipped: {exception.msg}")
    if isinstance(exception, pytest.xfail.Exception):
        return Ending("xfailed", reason)
    if not isinstance(exception, AssertionError):
        return Ending("raised", reason)
    trace = exception.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame is not refuted_in:
        return Ending("asserted", reason)
    return Ending("asserted", reason, trace.tb_frame.f_code.co_filename, trace.tb_lineno)


def _crash(report: pytest.TestReport) -> str:
    """Why `report` says that the test failed, in a line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return text.strip().splitlines()[0] if text.strip() else "it does not say why"


def _assertion_in(exception: BaseException) -> AssertionError | None:
    """The AssertionError that alone makes up a group of exceptions, such as an asyncio.TaskGroup raises."""
    while isinstance(exception, BaseExceptionGroup) and len(exception.exceptions) == 1:
        (exception,) = exception.exceptions
    return exception if isinstance(exception, AssertionError) else None


def _has_run(measurement: Any) -> bool:
    """Whether there is a run to summarize: none where nothing was asked, or where the target refused or failed."""
    if not measurement.pulled:
        return False
    try:
        return bool(measurement.runs)
    except Exception:
        return False


def _relative(file: str, item: pytest.Item) -> str:
    """`file` from the root folder, in POSIX form: a record must not depend on where the project lies."""
    from pathlib import Path

    try:
        return Path(file).relative_to(item.config.rootpath).as_posix()
    except ValueError:
        return Path(file).name
