"""The GPU pool of a run: a cluster with zero GPU nodes and the objects that will buy some when pods ask for them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pytest_gpulab.kube.apply import apply
from pytest_gpulab.kube.client import Kube, KubeError, connect
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.nodes import check_zero
from pytest_gpulab.kube.objects import Object


@dataclass(frozen=True)
class Pool:
    """A cluster that is ready to serve, and the ledger that names everything put there."""

    kube: Kube
    ledger: Ledger

    @property
    def run(self) -> str:
        """Id that labels everything of the run."""
        return self.ledger.run

    @property
    def api_key(self) -> str:
        """What clients of this run's servers must show."""
        return _key_file(self.ledger).read_text(encoding="ascii")


def use_cluster(ledger: Ledger, kubeconfig: Path, *, speed: float = 1.0) -> Kube:
    """Connect the run to a cluster that exists, and will go on when the run is over."""
    ledger.cluster(kubeconfig, speed)
    return connect(kubeconfig, ledger.folder, speed=speed)


def bring_up(ledger: Ledger, kube: Kube, objects: Iterable[Object]) -> Pool:
    """Apply the pool's objects to a cluster without GPU nodes. The caller tears down, whatever this raises.

    Raises:
        NotZero: there are GPU nodes already.
        KubeError: the cluster refused an object.
    """
    key = _key_file(ledger)
    key.touch(mode=0o600)
    key.write_text(secrets.token_urlsafe(32), encoding="ascii")
    check_zero(kube)
    apply(kube, ledger, objects)
    ledger.up()
    return Pool(kube, ledger)


def join(ledger: Ledger) -> Pool:
    """The pool that another process of the run has brought up. KubeError when it failed to."""
    connection = ledger.connection()
    if connection is None or not ledger.is_up():
        raise KubeError("the GPU pool of this run did not come up; the worker that tried says why")
    kubeconfig, speed = connection
    return Pool(connect(kubeconfig, ledger.folder, speed=speed), ledger)


def _key_file(ledger: Ledger) -> Path:
    return ledger.folder / "api-key"
