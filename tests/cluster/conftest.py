"""Servers for the API's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.serving import Served


@pytest.fixture
def served(tmp_path: Any) -> Iterator[Served]:
    """An empty cluster behind an API."""
    running = Served(tmp_path).start()
    yield running
    running.stop()
