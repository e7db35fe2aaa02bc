"""What a session is about to make in AWS, on disk before it exists: one file a cluster, in the ledger's own form.

Names are enough: a cluster's stack, its switch and its tags all follow from the cluster's name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.process import Process
from pytest_gpulab.kube.state import state_folder


def clusters_folder() -> Path:
    """Where the ledgers of clusters lie, beside those of runs."""
    return state_folder().parent / "clusters"


@dataclass(frozen=True)
class Site:
    """Where a cluster is and whose: `adopted` ones are never deleted."""

    name: str
    region: str
    account: str
    run: str
    adopted: bool


class ClusterLedger(Ledger):
    """The ledger of one cluster; its folder holds the kubeconfig, in which there is no secret."""

    @property
    def name(self) -> str:
        """Of the cluster."""
        return self.path.stem

    @property
    def kubeconfig(self) -> Path:
        """The way in, once the cluster is there."""
        return self.folder / "kubeconfig"

    def begin(self, site: Site) -> None:
        """The session is going to create or adopt the cluster."""
        self._append(entry="site", **vars(site))

    def site(self) -> Site | None:
        """The cluster, if the session came that far."""
        found = next(iter(self._of("site")), None)
        return None if found is None else Site(**{key: value for key, value in found.items() if key != "entry"})


def cluster_ledgers() -> list[ClusterLedger]:
    """Of every cluster that may be there, by name."""
    return [ClusterLedger(path) for path in sorted(clusters_folder().glob("*.jsonl"))]


def open_ledger(site: Site) -> ClusterLedger:
    """A new ledger for `site`, owned by this process.

    Raises:
        FileExistsError: an earlier session left one.
    """
    path = clusters_folder() / f"{site.name}.jsonl"
    try:
        ledger = ClusterLedger.create(path, Process.of(os.getpid()))
    except FileExistsError:
        raise FileExistsError(
            f"{path} exists: an earlier session with the cluster {site.name} has not ended, or was killed. "
            f"`gpulab reap --cluster {site.name} --region {site.region}` shows what it left"
        ) from None
    assert isinstance(ledger, ClusterLedger)
    ledger.begin(site)
    return ledger
