"""Lines for the user while experiments run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest


def teller(config: pytest.Config) -> Callable[[str], None]:
    """A function that writes a line to the terminal at once, past pytest's capturing; silent without a terminal, and
    when it is gone: what goes on then, a teardown above all, must not end because nobody hears of it."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")

    def tell(line: str) -> None:
        if reporter is None:
            return
        with suppress(OSError), capture.global_and_fixture_disabled() if capture else nullcontext():
            reporter.ensure_newline()
            reporter.write_line(f"gpulab: {line}")

    return tell
