"""``python -m pytest_gpulab.load.shard``: sends one share of a load, as a child process; `pod` does so in a pod.

It reads a share from the first line of stdin, encodes its bodies and says ``ready``. Asked ``clock`` it says what
time it has. It starts at the Unix time on the next line of stdin, by its own clock, says ``progress {...}`` each
second and ``outcome NUMBER/OF TEXT`` lines at the end. SIGTERM ends it with the partial outcome.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from dataclasses import asdict

import uvloop

from pytest_gpulab.load.local import OneProcess
from pytest_gpulab.load.progress import Progress, meanwhile, tell_every
from pytest_gpulab.load.share import Outcome, Share
from pytest_gpulab.load.wire import outcome_to_parts, share_from_line


def main() -> int:
    """Send the share on stdin; 1 when it came too late to start with the others."""
    return send(share_from_line(sys.stdin.readline()))


def send(share: Share) -> int:
    """Send a share when stdin says so; 1 when that came too late."""
    load = OneProcess(share)
    print("ready", flush=True)
    start_unix = _told_start()
    start = time.perf_counter() + start_unix - time.time()
    if start < time.perf_counter():
        print(f"too late: the start was {time.perf_counter() - start:.1f} s ago", file=sys.stderr)
        return 1
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(_run(load, start))
    for part in outcome_to_parts(outcome):
        print(f"outcome {part}")
    sys.stdout.flush()
    return 0


def _told_start() -> float:
    """The start by this process' clock, which tells the time until then to whoever asks."""
    while (line := sys.stdin.readline().strip()) == "clock":
        print(f"clock {time.time()!r}", flush=True)
    return float(line)


async def _run(load: OneProcess, start: float) -> Outcome:
    sending = asyncio.create_task(load.run(start))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sending.cancel)

    def say(progress: Progress) -> None:
        try:
            print(f"progress {json.dumps(asdict(progress))}", flush=True)
        except BrokenPipeError:  # nobody waits for the outcome: who asked for it was killed
            sending.cancel()

    async with meanwhile(tell_every(1.0, lambda: load.progress(time.perf_counter() - start), say)):
        return await sending


if __name__ == "__main__":
    sys.exit(main())
