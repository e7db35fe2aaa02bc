"""Load from inside the cluster: a `Load` whose shards are sent by the pods of an Indexed Job.

The pods get their shares from a ConfigMap and the API key from the model's Secret. What they say comes back in their
logs; what they are told, the time and the start, goes to their stdin. Every step has a deadline, and whatever ends
the run removes the Job. A pod that is lost is not replaced: what it has sent already cannot be taken back.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import aiohttp

from pytest_gpulab.arrivals import schedule
from pytest_gpulab.experiment import BoundedQueue, ClosedLoop, Workload
from pytest_gpulab.kube.apply import apply
from pytest_gpulab.kube.client import Kube
from pytest_gpulab.kube.objects import Object, Ref
from pytest_gpulab.kube.pool import Pool
from pytest_gpulab.kube.shard_pod import SILENCE_S, PodLost, ShardPod, most_apart_s, phase, terminated
from pytest_gpulab.kube.teardown import Teardown, remove
from pytest_gpulab.kube.wait import WaitFailed, describe, pod_failure
from pytest_gpulab.load.headroom import BeyondHeadroom
from pytest_gpulab.load.progress import Progress
from pytest_gpulab.load.share import Outcome, Share, merge
from pytest_gpulab.load.shipped import shard_archive
from pytest_gpulab.load.wire import share_to_line
from pytest_gpulab.load.words import progress_of
from pytest_gpulab.render import NAMESPACE, load_objects

RUNNING_S: Final = 1200.0
"""Cluster seconds until all pods run: a machine, and vLLM's image on it."""
READY_S: Final = 180.0
"""Real seconds from there until all are ready: bodies encoded, the model seen, the client's own speed measured."""
LAST_WORDS_S: Final = 10.0
"""Real seconds in which pods that are ended say what they have sent; a Ctrl-C waits no longer."""
_LEAD_S: Final = 3.0
_POLL_S: Final = 0.5
_MOST_REQUESTS: Final = 100_000
"""Of one pod: its outcome is about 46 bytes each in the log, which the kubelet puts away at 10 MiB."""
_INDEX: Final = "batch.kubernetes.io/job-completion-index"

_BYTES_PER_TOKEN: Final = 8
"""Of a prompt in an encoded body: up to five digits and a comma, and some room."""
_BYTES_PER_REQUEST: Final = 2048
_BYTES_AT_LEAST: Final = 512 << 20


class Pods:
    """One pod a share. They load the model of `service`, which `serving_name` names.

    A pod starts at a time by its own clock: it is asked for the time beforehand, and half of the fastest answer's way
    is how far its start may be off. How far apart two may start is in `Outcome.clock_error_s`.

    BeyondHeadroom: a pod could not bring back what its share comes to.
    """

    lead_s = _LEAD_S

    def __init__(self, pool: Pool, service: str, shares: Sequence[Share]) -> None:
        requests = math.ceil(len(schedule(shares[0].workload, shares[0].seed)) / len(shares))
        if requests > _MOST_REQUESTS:
            raise BeyondHeadroom(
                f"a pod's log holds the outcome of {_MOST_REQUESTS:,} requests, each of {len(shares)} would send "
                f"{requests:,}: shorten the run, or load from the client's machine"
            )
        self._pool = pool
        self._kube: Kube = pool.kube
        self._service = service
        self._shares = shares
        self._job = Ref("batch/v1", "Job", f"load-{secrets.token_hex(4)}", NAMESPACE)
        self._config = Ref("v1", "ConfigMap", self._job.name, NAMESPACE)
        self._pods = [ShardPod(self._kube, index) for index in range(len(shares))]
        self._open = AsyncExitStack()
        self._following: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Pods that are ready.

        Raises:
            WaitFailed: they did not come about in time.
            PodLost: one ended.
            BeyondHeadroom: one cannot do its share.
        """
        try:
            session = await self._open.enter_async_context(_new_session(self._kube))
            await asyncio.to_thread(apply, self._kube, self._pool.ledger, self._objects())
            await self._until("all pods to run", self._all_run, RUNNING_S / self._kube.speed)
            self._following = [asyncio.create_task(pod.follow(session)) for pod in self._pods]
            await self._until("all pods to be ready", self._all_ready, READY_S)
            attached = [await self._open.enter_async_context(pod.attached(session)) for pod in self._pods]
            await asyncio.gather(*(pod.compare_clocks() for pod in attached))
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the Job, with its pods, and the ConfigMap."""
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await self._open.aclose()
        ended = Teardown()
        await asyncio.to_thread(remove, self._kube, self._pool.run, [self._config, self._job], ended)
        if ended.problems and error is None:
            raise WaitFailed("; ".join(ended.problems))

    async def run(self, start: float) -> Outcome:
        """Have it sent from `start` on. PodLost: a share's outcome is lost, and the run with it."""
        start_unix = time.time() + start - time.perf_counter()
        for pod in self._pods:
            await pod.tell(repr(start_unix + pod.offset_s))
        try:
            async with asyncio.timeout(self._longest_s()):
                await self._until_done()
        except TimeoutError:
            self._lost("sending has taken longer than it can")
        except asyncio.CancelledError:
            if not await self._last_words():
                raise
            return self._outcome()
        if stopped := [pod.name for pod in self._pods if pod.heard.outcome and pod.heard.outcome.interrupted]:
            self._lost(f"{', '.join(stopped)} was asked to end while it sent")
        return self._outcome()

    def progress(self, elapsed_s: float) -> Progress:
        return progress_of((pod.heard for pod in self._pods), elapsed_s)

    # what is made

    def _objects(self) -> list[Object]:
        share = self._shares[0]
        bare = replace(share.endpoint, api_key=None)
        return load_objects(
            self._job.name,
            run=self._pool.run,
            service=self._service,
            share=share_to_line(replace(share, endpoint=bare)),
            code=shard_archive(),
            pods=len(self._shares),
            memory_bytes=_memory_bytes(share),
            longest_s=READY_S + self._longest_s(),
            ready_s=RUNNING_S,
            speed=self._kube.speed,
        )

    def _longest_s(self) -> float:
        """Real seconds after which the last answer was given up, and some more."""
        share = self._shares[0]
        return longest_s(share.workload, share.seed, share.longest_answer_s) + self.lead_s + SILENCE_S

    # waiting

    async def _until(self, what: str, holds: Callable[[], Any], allowed_s: float) -> None:
        """Ask, off the event loop, until it holds. WaitFailed: not in time; what `holds` raises."""
        deadline = time.monotonic() + allowed_s
        while not await asyncio.to_thread(holds):
            self._check()
            if time.monotonic() > deadline:
                self._lost(f"waited for {what}: not within {allowed_s:g} s", WaitFailed)
            await asyncio.sleep(_POLL_S)

    def _listed(self) -> list[Object]:
        labels = f"batch.kubernetes.io/job-name={self._job.name}"
        return self._kube.list("v1", "Pod", NAMESPACE, labels=labels)

    def _all_run(self) -> bool:
        """Whether each share has its pod; remembers which."""
        listed = self._listed()
        if (failed := self._failed_job()) or (failed := pod_failure(listed)):
            self._lost(f"the load could not be started: {failed}", WaitFailed)
        running = {int(pod["metadata"]["annotations"][_INDEX]): pod for pod in listed if phase(pod) == "Running"}
        for pod in self._pods:
            if pod.index in running:
                pod.name, pod.uid = (running[pod.index]["metadata"][key] for key in ("name", "uid"))
        return len(running) == len(self._pods)

    def _all_ready(self) -> bool:
        return all(pod.heard.ready for pod in self._pods)

    def _failed_job(self) -> str | None:
        """Why the Job has failed, if it has."""
        job = self._kube.get(self._job)
        conditions = ((job or {}).get("status") or {}).get("conditions") or ()
        found = next((one for one in conditions if one["type"] in ("Failed", "FailureTarget")), None)
        if job is None:
            return "the Job is gone"
        return f"{found['reason']}: {found['message']}" if found else None

    async def _until_done(self) -> None:
        """Until every pod has said its outcome. PodLost."""
        while not all(pod.heard.outcome for pod in self._pods):
            await asyncio.wait(self._following, timeout=_POLL_S, return_when=asyncio.FIRST_EXCEPTION)
            self._check()

    def _check(self) -> None:
        """PodLost when a pod is, or has said nothing for too long; BeyondHeadroom when it cannot do its share."""
        for task in self._following:
            if task.done() and (error := task.exception()) is not None:
                self._lost(str(error)) if isinstance(error, PodLost) else _raise(error)
        for pod in self._pods:
            if pod.is_silent():
                self._lost(f"pod {pod.name} has said nothing for {SILENCE_S:g} s")

    async def _last_words(self) -> bool:
        """End the pods, which say what they have sent; whether all have."""
        await asyncio.to_thread(self._kube.delete, self._job)
        await asyncio.wait(self._following, timeout=LAST_WORDS_S)
        return all(pod.heard.outcome for pod in self._pods)

    def _lost(self, why: str, kind: type[WaitFailed] = PodLost) -> NoReturn:
        """Raise what is known of it: how pods ended, what they said last, what was said about them."""
        pods = self._listed()
        ends = [*filter(None, map(_end, pods)), *(f"there is no pod {name}" for name in self._missing(pods))]
        said = [f"{pod.name} wrote: {' / '.join(pod.heard.others)}" for pod in self._pods if pod.heard.others]
        about = [describe(self._kube, pod) for pod in pods if phase(pod) != "Succeeded"][:3]
        raise kind("; ".join([f"load from inside the cluster: {why}", *ends, *said, *about]))

    def _missing(self, pods: Sequence[Object]) -> list[str]:
        there = {pod["metadata"]["uid"] for pod in pods}
        return [pod.name for pod in self._pods if pod.uid and pod.uid not in there]

    def _outcome(self) -> Outcome:
        outcomes = [pod.heard.outcome for pod in self._pods if pod.heard.outcome is not None]
        return replace(merge(outcomes), clock_error_s=most_apart_s(self._pods))


def _new_session(kube: Kube) -> aiohttp.ClientSession:
    """For as long as it takes, and to as many pods as there are."""
    connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=kube.ca), limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def _raise(error: BaseException) -> NoReturn:
    raise error


def longest_s(workload: Workload, seed: int, longest_answer_s: float) -> float:
    """Real seconds from the start until every request has been answered or given up."""
    rows = schedule(workload, seed)
    limit_s = workload.timeout_s or longest_answer_s
    if isinstance(workload.arrivals, ClosedLoop):
        return limit_s * math.ceil(len(rows) / workload.arrivals.concurrency)
    wait_s = workload.admission.max_wait_s if isinstance(workload.admission, BoundedQueue) else 0.0
    return float(rows["scheduled"].max(initial=0.0)) + wait_s + limit_s


def _memory_bytes(share: Share) -> float:
    """Of the pod with the most to send: bodies are encoded beforehand."""
    rows = schedule(share.workload, share.seed)
    shards = (rows["prompt_tokens"][index :: share.count] for index in range(share.count))
    return _BYTES_AT_LEAST + max(
        float(_BYTES_PER_TOKEN * prompts.sum(dtype="i8") + _BYTES_PER_REQUEST * len(prompts)) for prompts in shards
    )


def _end(pod: Object) -> str:
    """How a pod failed: OOMKilled, Evicted, an exit status; empty when it has not."""
    if phase(pod) != "Failed":
        return ""
    status, ended = pod["status"], terminated(pod)
    reason = status.get("reason") or ended.get("reason") or "failed"
    code = f", exit status {ended['exitCode']}" if "exitCode" in ended else ""
    message = f": {status['message']}" if status.get("message") else ""
    return f"{pod['metadata']['name']} ended: {reason}{code}{message}"
