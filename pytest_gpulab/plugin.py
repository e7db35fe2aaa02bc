"""pytest hooks: wiring only. `watch` knows one item, `session` all of them, `options` what was asked for."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpulab import watch
from pytest_gpulab.markers import MARKERS
from pytest_gpulab.options import OPTIONS_KEY, add_options, options_of, resolve_options, use_catalog
from pytest_gpulab.report import terminal
from pytest_gpulab.session import SESSION_KEY, Session, session_of
from pytest_gpulab.shared_pool import POOL_KEY, SharedPool, shared_pool_of

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

pytest.register_assert_rewrite("pytest_gpulab.fixtures")
pytest_plugins = ["pytest_gpulab.fixtures.cluster", "pytest_gpulab.fixtures.measure"]


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    use_catalog(early_config)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    config.stash[OPTIONS_KEY] = resolve_options(config)
    config.stash[SESSION_KEY] = Session(config)
    config.stash[POOL_KEY] = SharedPool(config)
    config.pluginmanager.register(SessionHooks(session_of(config)), "gpulab-session")
    config.pluginmanager.register(PoolHooks(shared_pool_of(config)), "gpulab-pool")


def pytest_report_header(config: pytest.Config) -> str | None:
    return terminal.header(options_of(config))


# --- collection -----------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, Any, Any]:
    session = session_of(config)
    session.check_items(items)
    result = yield
    session.check_items(items)
    session.leave_ordinary_tests(items)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    session_of(session.config).know_items(session.items)


def pytest_report_collectionfinish(config: pytest.Config) -> str | None:
    return terminal.announcement(session_of(config))


# --- one item -------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from watch.setup(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from watch.call(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from watch.teardown(item))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    return watch.skip_body(pyfuncitem)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, Any, Any]:
    return (yield from watch.fixture_setup())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return (yield from watch.make_report(item))


def pytest_assertrepr_compare(left: object, right: object) -> list[str] | None:
    return watch.explain_comparison(left, right)


# --- the session ----------------------------------------------------------------------------------------------


class SessionHooks:
    """Hooks that are not handed the config they belong to, and those of the session's end."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.session.note_collection(report)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.session.note_deselected(items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.session.note(report)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self.session.note_interrupt(excinfo)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.session.finish(session)

    def pytest_unconfigure(self) -> None:
        self.session.close()

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> terminal.Status | None:
        return terminal.status(report)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminal.summarize(self.session, terminalreporter)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: WorkerController) -> None:
        self.session.equip_worker(node.workerinput)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: WorkerController) -> None:
        self.session.take_catalog(node.gateway.id)

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_header(self, cells: list[str]) -> None:
        html().header_cells(cells)

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_row(self, report: pytest.TestReport, cells: list[str]) -> None:
        html().row_cells(report, cells)

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_summary(self, prefix: list[str]) -> None:
        prefix.extend(html().summary(self.session.decisions))


class PoolHooks:
    """The ends of the session's GPU pool."""

    def __init__(self, pool: SharedPool) -> None:
        self.pool = pool

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: WorkerController) -> None:
        self.pool.equip_worker(node.workerinput)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, Any, Any]:
        return (yield from self.pool.finish(session))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        self.pool.summarize(terminalreporter)


def html() -> ModuleType:
    """`pytest_gpulab.report.html`, loaded when a report is made."""
    from pytest_gpulab.report import html

    return html
