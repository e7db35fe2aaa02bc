"""The end of a run: everything its ledger names, in an order that leaves no load balancer and no machine behind.

The same function after success, failure, Ctrl-C, SIGTERM and SIGHUP, and in `gpulab reap` after a kill. It may be
called again wherever it was cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pytest_gpulab.kube.apply import belongs_to
from pytest_gpulab.kube.client import Kube, KubeError, NoAnswer, connect
from pytest_gpulab.kube.embedded import last_words
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.nodes import wait_for_zero
from pytest_gpulab.kube.objects import Object, Ref
from pytest_gpulab.kube.wait import wait

OBJECT_GONE_S: Final = 600.0
"""Cluster seconds for a load balancer or a draining pod to go."""

_FIRST: Final[Mapping[str, int]] = {
    "Ingress": 0,
    **dict.fromkeys(("CronJob", "DaemonSet", "Deployment", "HorizontalPodAutoscaler", "Job"), 1),
    **dict.fromkeys(("PersistentVolumeClaim", "Pod", "Service", "StatefulSet"), 1),
    "NodePool": 2,
    "Namespace": 4,
}
_REST: Final = 3
"""The order of kinds; each must be gone before the next: an Ingress is when its load balancer is, a NodePool's
machines when the pods on them are."""


@dataclass
class Teardown:
    """What became of a run."""

    removed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What did not go, or could not be asked for, each with its last events."""


def tear_down(ledger: Ledger) -> Teardown:
    """Remove what the ledger names, then the ledger itself unless something is left."""
    ended = Teardown()
    process = ledger.cluster_process()
    connection = ledger.connection()
    if ledger.refs() and connection is not None:
        if process is None or process.alive():
            _remove_objects(ledger, *connection, ended)
        else:
            died = f"the embedded cluster, process {process.pid}, must live until the teardown, but has ended"
            ended.problems.append(f"{died}. It wrote: {last_words(ledger)}")
    if process is not None and process.stop():
        ended.removed.append(f"the embedded cluster, process {process.pid}")
    if process is not None or not ended.problems:  # an embedded cluster takes along whatever was left in it
        ledger.remove()
    return ended


def _remove_objects(ledger: Ledger, kubeconfig: Path, speed: float, ended: Teardown) -> None:
    try:
        with connect(kubeconfig, ledger.folder, speed=speed) as kube:
            remove(kube, ledger.run, ledger.refs(), ended)
    except KubeError as problem:
        ended.problems.append(str(problem))


def remove(kube: Kube, run: str, refs: Sequence[Ref], ended: Teardown) -> None:
    """Delete those of `refs` that are the run's, in order. What is refused or does not go is noted, and does not keep
    the rest.

    Raises:
        NoAnswer: the API server does not answer any more.
    """
    for rank in sorted({_rank(ref) for ref in refs}):
        with _noting(ended):
            _remove(kube, run, [ref for ref in reversed(refs) if _rank(ref) == rank], ended)
            if rank == _FIRST["NodePool"]:
                wait_for_zero(kube, run=run)


@contextmanager
def _noting(ended: Teardown) -> Iterator[None]:
    """Note what is refused or does not go, and carry on; NoAnswer ends it all."""
    try:
        yield
    except NoAnswer:
        raise
    except KubeError as problem:
        ended.problems.append(str(problem))


def _remove(kube: Kube, run: str, refs: Sequence[Ref], ended: Teardown) -> None:
    """Delete those that are the run's, and wait until they are gone."""
    deleted = []
    for ref in refs:
        with _noting(ended):
            if _is_ours(kube.get(ref), run):
                kube.delete(ref)
                deleted.append(ref)
    if not deleted:
        return

    def left() -> list[Object]:
        return [obj for obj in map(kube.get, deleted) if obj is not None]

    what = f"{', '.join(map(str, deleted))} to be gone"
    wait(kube, what, lambda: not left(), deadline_s=OBJECT_GONE_S, about=left)
    ended.removed.extend(map(str, deleted))


def _rank(ref: Ref) -> int:
    return _FIRST.get(ref.kind, _REST)


def _is_ours(obj: Object | None, run: str) -> bool:
    return obj is not None and belongs_to(obj, run)
