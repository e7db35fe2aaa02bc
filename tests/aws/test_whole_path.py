"""moto's account and the embedded cluster's API together: a whole life, through the code that EKS would see."""

from __future__ import annotations

import os

import yaml

from pytest_gpulab.aws.cluster import find_cluster, machines_of
from pytest_gpulab.aws.ledger import open_ledger
from pytest_gpulab.aws.lifecycle import bring_up, site_of, tear_down
from pytest_gpulab.experiment import Profile
from pytest_gpulab.fleet import Fleet
from pytest_gpulab.kube.apply import apply
from pytest_gpulab.kube.client import Ref
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.pool import use_cluster
from pytest_gpulab.kube.process import Process
from pytest_gpulab.kube.state import ledger_path
from pytest_gpulab.render import gpu_capacity
from tests.aws import moto_eks
from tests.aws.test_lifecycle import everything
from tests.cluster.serving import Served

NODE_CLASS = Ref("eks.amazonaws.com/v1", "NodeClass", "gpulab")


def test_from_nothing_to_nothing(clients, plan, clock, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "pytest_gpulab.cluster.api.server.is_authorized", lambda header, _: header.startswith("Bearer k8s-aws-v1.")
    )
    served = Served(tmp_path).start()
    try:
        (known,) = yaml.safe_load(served.config.read_text())["clusters"]
        authority = known["cluster"]["certificate-authority-data"]
        moto_eks.API_SERVER.update(endpoint=served.server.url, authority=authority)
        ledger = open_ledger(site_of(plan))
        kube = bring_up(clients, plan, ledger, clock=clock)
        _put_a_pool_there(clients, ledger, kube)
        removed = tear_down(clients, ledger, clock=clock)
        assert [word.split()[0] for word in removed] == ["NodePool", "NodePool", "NodeClass", "stack", "stack"]
        assert everything(clients) == {}
        assert kube.list("karpenter.sh/v1", "NodePool") == []
        assert kube.get(NODE_CLASS) is None
        kube.close()
    finally:
        served.stop()


def _put_a_pool_there(clients, ledger, kube) -> None:
    """As a session would: a run's ledger, the way in by kubeconfig, the GPU pools of the plan's machines."""
    run = Ledger.create(ledger_path("run-1"), Process.of(os.getpid()))
    machines = machines_of(find_cluster(clients, "lab"))
    types = [Profile(model="qwen2.5-0.5b", accelerator="t4").machine]
    with use_cluster(run, ledger.kubeconfig) as through_kubeconfig:
        apply(through_kubeconfig, run, gpu_capacity(Fleet(), types, run="run-1", machines=machines))
    made = kube.get(NODE_CLASS)
    assert made["spec"]["role"] == machines.role
    assert [one["id"] for one in made["spec"]["subnetSelectorTerms"]] == list(machines.subnets)
