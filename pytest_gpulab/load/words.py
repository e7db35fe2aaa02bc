"""What a shard says, line by line, to whoever started it: ``ready``, ``clock``, ``progress``, ``outcome``."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from pytest_gpulab.load.progress import Progress, of_all
from pytest_gpulab.load.share import Outcome
from pytest_gpulab.load.wire import outcome_of_parts

_LAST_LINES = 3


class Heard:
    """What one shard has said so far. It may be heard twice: lines that were heard before change nothing."""

    def __init__(self) -> None:
        self.ready = False
        self.clock: float | None = None
        """Its Unix time when it was last asked."""
        self.progress: Progress | None = None
        self.outcome: Outcome | None = None
        self.others: deque[str] = deque(maxlen=_LAST_LINES)
        """The last lines that are none of these: an error, as a rule."""
        self._parts: list[str] = []

    def line(self, line: str) -> None:
        """Take a line in. ValueError: it is damaged."""
        word, _, rest = line.partition(" ")
        if word == "ready":
            self.ready = True
        elif word == "clock":
            self.clock = float(rest)
        elif word == "progress":
            self.progress = Progress(**json.loads(rest))
        elif word == "outcome":
            self._parts.append(rest)
            if self.outcome is None and _is_last(rest):
                self.outcome = outcome_of_parts(self._parts)
        elif line.strip() not in self.others:
            self.others.append(line.strip())


def _is_last(part: str) -> bool:
    number, of = part.partition(" ")[0].split("/")
    return int(number) == int(of) - 1


def progress_of(shards: Iterable[Heard], elapsed_s: float) -> Progress:
    """The progress of a load by what its shards say."""
    said = [shard.progress for shard in shards if shard.progress is not None]
    return replace(of_all(said or [_NOTHING]), elapsed_s=elapsed_s)


_NOTHING = Progress(elapsed_s=0, length_s=0, finished=0, offered=0, in_flight=0, p95_s=None)
