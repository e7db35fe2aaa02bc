"""What tests of the plugin share: a project with experiments on a target of known truth."""

from __future__ import annotations

import linecache
import signal
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

from pytest_gpulab.record import Decision, Record

# Who runs tests in the background may ignore these, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Inner sessions forget what they imported: numpy must not be loaded a second time, the rest takes time.
for module in (
    "numpy.fft",
    "numpy.random",
    "pytest_gpulab.baseline",
    "pytest_gpulab.lab",
    "pytest_gpulab.outcomes",
    "pytest_gpulab.report.html",
    "pytest_gpulab.report.markdown",
    "pytest_gpulab.report.plots",
    "rich.console",
    "rich.table",
    "rich.text",
    "tests.known",
):
    import_module(module)

CONFTEST = """
import pytest

from pytest_gpulab.gates import TargetRefused
from tests.known import WORKLOAD, arm, known_lab, known_run


def run(profile, seed):
    seconds = profile.engine_args.max_num_seqs
    if seconds == 500:
        raise TargetRefused("no such machine")
    if seconds == 501:
        raise RuntimeError("server fell over")
    if seconds == 7:  # a coin: no number of repeats decides against 2 s
        seconds = 1 + 2 * (seed % 2)
    return known_run(float(seconds), seed=seed, basis=BASIS)


BASIS = "simulated"


@pytest.fixture(scope="session")
def lab():
    return known_lab(run, basis=BASIS)


@pytest.fixture
def served(measure):
    '''served(n): a measurement whose answers take n seconds.'''
    return lambda seconds: measure(WORKLOAD, arm(seconds), label=f"{seconds} s")


@pytest.fixture
def coin(served):
    return served(7)
"""

QUICK = ("-p", "no:hypothesispytest", "-p", "no:anyio")
"""Plugins that experiments have no use for, and that take longer to load than a session here runs."""

HEAD = """
import pytest
from pytest_gpulab import any_of, blocked, caveat, requires
decision = pytest.mark.decision
"""


class Project:
    """A project under test; its experiments may use `served(n)` (answers take n s) and `coin` (1 s or 3 s)."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path
        pytester.makeconftest(CONFTEST)

    def write(self, body: str, name: str = "test_exp.py") -> Project:
        """Write experiments; the usual imports are added."""
        Path(self.path, name).write_text(HEAD + textwrap.dedent(body))
        return self

    def run(self, *arguments: str) -> pytest.RunResult:
        """A session in this process."""
        linecache.checkcache()  # experiments may have been written anew
        return self.pytester.runpytest_inprocess(*QUICK, *arguments)

    def spawn(self, *arguments: str) -> pytest.RunResult:
        """A session in its own process."""
        return self.pytester.runpytest_subprocess(*QUICK, *arguments, timeout=60)

    def file(self, suffix: str = ".json") -> Path:
        return Path(self.path, "reports", f"decision-record{suffix}")

    @property
    def record(self) -> Record:
        return Record.model_validate_json(self.file().read_bytes())

    @property
    def partial(self) -> Record:
        return Record.model_validate_json(self.file(".partial.json").read_bytes())

    def decision(self, id: str = "d") -> Decision:
        return next(decision for decision in self.record.decisions if decision.id == id)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    """An empty project on the known target."""
    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.syspath_prepend(root)
    return Project(pytester)
