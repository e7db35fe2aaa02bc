"""Applying a run's objects: labelled as its own, in the ledger first, never over another's."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_gpulab.kube.client import FIELD_MANAGER, Kube, KubeError
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.objects import Object, Ref
from pytest_gpulab.render import MANAGED_LABEL, RUN_LABEL


class Taken(KubeError):
    """An object of that name belongs to somebody else."""


def apply(kube: Kube, ledger: Ledger, objects: Iterable[Object]) -> None:
    """Apply `objects` in order, each in the ledger before it is created.

    Raises:
        Taken: one of them exists and does not carry this run's label; then none is applied.
        FileNotFoundError: the ledger is gone: the run was torn down, and must not create anything any more.
        KubeError: the API server refused one.
    """
    labelled = [_labelled(obj, ledger.run) for obj in objects]
    known = set(ledger.refs())
    for ref in map(Ref.of, labelled):
        if ref not in known:
            _check_free(kube.get(ref), ref, ledger.run)
    for obj in labelled:
        if (ref := Ref.of(obj)) not in known:
            ledger.object(ref)
        kube.apply(obj)


def belongs_to(obj: Object, run: str) -> bool:
    """Whether an object carries the run's label."""
    return bool((obj["metadata"].get("labels") or {}).get(RUN_LABEL) == run)


def _labelled(obj: Object, run: str) -> Object:
    meta = obj["metadata"]
    labels = {**(meta.get("labels") or {}), MANAGED_LABEL: FIELD_MANAGER, RUN_LABEL: run}
    return {**obj, "metadata": {**meta, "labels": labels}}


def _check_free(live: Object | None, ref: Ref, run: str) -> None:
    if live is None or belongs_to(live, run):
        return
    other = (live["metadata"].get("labels") or {}).get(RUN_LABEL)
    owner = f"run {other}: wait for it, or `gpulab reap` when it is dead" if other else "nobody we know: remove it"
    raise Taken(f"{ref} must not exist yet, but it does and belongs to {owner}")
