"""``python -m pytest_gpulab.load.shard``: sends one share of a load, as a child process or as a pod.

It reads a share from ``GPULAB_LOAD_SHARE`` or the first line of stdin, encodes its bodies and says ``ready``. It
starts at the Unix time in ``GPULAB_LOAD_START`` or on the next line of stdin, says ``progress {...}`` each second and
``outcome BASE64`` at the end. In a Kubernetes Indexed Job ``JOB_COMPLETION_INDEX`` says which share it is. SIGTERM
ends it with the partial outcome.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import asdict

import uvloop

from pytest_gpulab.load.local import OneProcess
from pytest_gpulab.load.progress import Progress, meanwhile, tell_every
from pytest_gpulab.load.share import Outcome
from pytest_gpulab.load.wire import outcome_to_line, share_from_line


def main() -> int:
    """Send the share; 1 when it came too late to start with the others."""
    index = os.environ.get("JOB_COMPLETION_INDEX")
    line = os.environ.get("GPULAB_LOAD_SHARE") or sys.stdin.readline()
    load = OneProcess(share_from_line(line, index=None if index is None else int(index)))
    print("ready", flush=True)
    start_unix = float(os.environ.get("GPULAB_LOAD_START") or sys.stdin.readline())
    start = time.perf_counter() + start_unix - time.time()
    if start < time.perf_counter():
        print(f"too late: the start was {time.perf_counter() - start:.1f} s ago", file=sys.stderr)
        return 1
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(_run(load, start))
    print(f"outcome {outcome_to_line(outcome)}", flush=True)
    return 0


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
