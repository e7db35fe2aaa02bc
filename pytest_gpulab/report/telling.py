"""Lines for the user while experiments run."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def teller(config: pytest.Config) -> Callable[[str], None]:
    """A function that writes a line to the terminal at once, past pytest's capturing; silent without a terminal."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")

    def tell(line: str) -> None:
        if reporter is None:
            return
        if capture is None:
            reporter.write_line(f"gpulab: {line}")
            return
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"gpulab: {line}")

    return tell
