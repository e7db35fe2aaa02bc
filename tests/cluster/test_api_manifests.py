"""The manifests, as they are and rendered, on the embedded API server."""

from __future__ import annotations

import pytest
import yaml
from kubernetes import config
from kubernetes.dynamic import DynamicClient

from pytest_gpulab import render
from pytest_gpulab.cluster.resources import CONFIG_MAP, DEPLOYMENT, HPA, INGRESS, SECRET
from pytest_gpulab.experiment import Profile
from pytest_gpulab.fleet import FROM_ZERO
from tests.cluster.serving import Served

PROFILE = Profile(model="qwen2.5-0.5b", accelerator="t4")
NAME = render.serving_name(PROFILE)
RENDERED = [
    *render.pool_objects(FROM_ZERO, [PROFILE.machine], run="r1"),
    *render.owned_cluster_objects(run="r1"),
    *render.serving_objects(PROFILE, FROM_ZERO, run="r1", api_key="k"),
]
STATIC = [obj for file in render.manifest_files() for obj in render.documents(file)]


def versions(served: Served) -> dict[tuple[str, str, str], str]:
    """Of everything in the store."""
    return {
        (kind.kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"]): obj["metadata"]["resourceVersion"]
        for kind in served.store.resources
        for obj in served.store.list(kind)
    }


def test_kubectl_applies_what_is_rendered_and_a_second_time_changes_nothing(served: Served):
    manifest = yaml.safe_dump_all(RENDERED)
    first = served.kubectl("apply", "--server-side", "-f", "-", stdin=manifest)
    assert first.count("serverside-applied") == len(RENDERED) and "Warning" not in first
    before = versions(served)
    served.clock.time += 60
    served.kubectl("apply", "--server-side", "-f", "-", stdin=manifest)
    assert versions(served) == before
    assert NAME in served.kubectl("get", "deploy,svc,ing,hpa", "-n", "gpulab", "-l", "gpulab.dev/run=r1")


def test_kubectl_applies_the_folder_and_a_second_time_changes_nothing(served: Served):
    one_of_each = [obj for obj in STATIC if not _is_the_other_autoscaler(obj)]
    manifest = yaml.safe_dump_all(one_of_each)
    assert served.kubectl("apply", "-f", "-", stdin=manifest).count("created") == len(one_of_each)
    assert served.kubectl("apply", "-f", "-", stdin=manifest).count("unchanged") == len(one_of_each)
    assert served.kubectl("diff", "-f", "-", stdin=manifest) == ""


def _is_the_other_autoscaler(obj: render.Object) -> bool:
    return obj["kind"] == "HorizontalPodAutoscaler" and obj in render.documents("hpa-running")


def test_the_python_client_applies_what_is_rendered_and_a_second_time_changes_nothing(served: Served):
    with config.new_client_from_config(str(served.config)) as connected:
        api = DynamicClient(connected, cache_file=str(served.folder / "discovery"))
        for obj in RENDERED:
            _apply(api, obj)
        before = versions(served)
        served.clock.time += 60
        for obj in RENDERED:
            _apply(api, obj)
    assert versions(served) == before
    assert served.store.get(SECRET, NAME, "gpulab")["data"] == {"api-key": "aw=="}


def _apply(api: DynamicClient, obj: render.Object) -> None:
    kind = api.resources.get(api_version=obj["apiVersion"], kind=obj["kind"])
    meta = obj["metadata"]
    kind.server_side_apply(
        body=obj,
        name=meta["name"],
        namespace=meta.get("namespace"),
        field_manager="gpulab",
        field_validation="Strict",
    )


def test_replicas_that_the_autoscaler_set_survive_another_apply(served: Served):
    manifest = yaml.safe_dump_all(RENDERED)
    served.kubectl("apply", "--server-side", "-f", "-", stdin=manifest)
    assert served.store.get(DEPLOYMENT, NAME, "gpulab")["spec"]["replicas"] == 1
    served.kubectl("scale", "-n", "gpulab", f"deploy/{NAME}", "--replicas=3")
    served.kubectl("apply", "--server-side", "-f", "-", stdin=manifest)
    assert served.store.get(DEPLOYMENT, NAME, "gpulab")["spec"]["replicas"] == 3


def test_objects_without_their_namespace_are_refused(served: Served):
    orphans = [obj for obj in RENDERED if obj["kind"] in ("Deployment", "Ingress")]
    refused = served.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(orphans), ok=False)
    assert 'namespaces "gpulab" not found' in refused
    assert not served.store.list(INGRESS) and not served.store.list(HPA)


@pytest.mark.parametrize(
    "kind", ["ingressclassparams", "ingressclass", "nodepool", "nodeclass", "netpol", "podmonitor"]
)
def test_kubectl_knows_the_kind(served: Served, kind: str):
    served.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(STATIC))
    assert "gpulab" in served.kubectl("get", kind, "-A", "-o", "yaml")
    assert served.store.get(CONFIG_MAP, "prometheus-adapter", "gpulab")
