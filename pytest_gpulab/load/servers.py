"""Servers that come and go while a load runs, as those of an autoscaled deployment do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Servers(Protocol):
    """What `run_load` asks of whoever deploys them."""

    def begin(self, start: float) -> None:
        """The run starts at `start` (Unix seconds), which is about to come. Returns at once."""

    def pages(self) -> Mapping[str, bool]:
        """URLs of the metrics pages that there are now; whether its server is ready, so that it must show it."""
