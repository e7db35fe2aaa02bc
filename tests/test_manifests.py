"""The manifests as they are: valid, and with no more privilege than they need."""

from __future__ import annotations

import re
from copy import deepcopy
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_gpulab.render import MANAGED_LABEL, documents, manifest_files
from tests.manifests import VERSIONS, containers, pod_spec, problems, restricted_violations

Object = dict[str, Any]
EVERYTHING = [(file, obj) for file in manifest_files() for obj in documents(file)]
OBJECTS = [obj for _, obj in EVERYTHING]
WORKLOADS = [obj for obj in OBJECTS if pod_spec(obj)]
ONE_OF_EACH = [obj for file, obj in EVERYTHING if file != "hpa-running"]
"""Both autoscalers are the same object."""


NODE_POOLS = [obj for obj in OBJECTS if obj["kind"] == "NodePool"]


def title(obj: Object) -> str:
    return f"{obj['kind']} {obj['metadata']['name']}"


def named(kind: str, name: str) -> Object:
    (found,) = (obj for obj in ONE_OF_EACH if (obj["kind"], obj["metadata"]["name"]) == (kind, name))
    return found


def test_all_that_serving_on_eks_takes_is_there():
    assert {obj["kind"] for obj in OBJECTS} >= {
        *("Namespace", "NodePool", "NodeClass", "Deployment", "DaemonSet", "Service", "Ingress", "IngressClass"),
        *("IngressClassParams", "HorizontalPodAutoscaler", "ConfigMap", "APIService", "PodMonitor", "NetworkPolicy"),
        *("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "ServiceAccount"),
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(version: str):
    assert {title(obj): found for obj in OBJECTS if (found := problems(obj, version))} == {}


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("NodePool", "gpu-spot", "limit", {"nvidia.com/gpu": "1"}),
        ("NodePool", "gpu-spot", "weight", 101),
        ("NodePool", "gpu-spot", "disruption.consolidateAfter", "30 s"),
        ("NodePool", "gpu-spot", "template.spec.requirements.0.operator", "in"),
        ("NodePool", "gpu-spot", "template.spec.requirements.0.values", []),
        ("NodePool", "gpu-spot", "template.spec.requirements.0.key", "karpenter.sh/initialized"),
        ("NodePool", "gpu-spot", "template.spec.nodeClassRef.group", ""),
        ("NodeClass", "gpulab", "metadataOptions", {"httpPutResponseHopLimit": 1}),
        ("NodeClass", "gpulab", "subnetSelectorTerms", []),
        ("NodeClass", "gpulab", "ephemeralStorage.size", "200"),
        ("IngressClassParams", "gpulab", "scheme", "public"),
        ("Deployment", "vllm", "template.spec.containers.0.imgae", "x"),
        ("Deployment", "vllm", "template.spec.containers.0.image", 1),
    ],
)
def test_the_schemas_find_mistakes(kind: str, name: str, path: str, value: Any):
    broken = deepcopy(named(kind, name))
    place: Any = broken["spec"]
    *way, last = path.split(".")
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    assert problems(broken)


@pytest.mark.parametrize("obj", WORKLOADS, ids=title)
def test_images_are_pinned_by_digest(obj: Object):
    spec = pod_spec(obj)
    assert spec
    for container in containers(spec):
        assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]+/[a-z0-9/-]+:[\w.-]+@sha256:[0-9a-f]{64}", container["image"])


@pytest.mark.parametrize("obj", WORKLOADS, ids=title)
def test_pods_keep_to_the_restricted_profile(obj: Object):
    spec = pod_spec(obj)
    assert spec
    host_path = ["volume all-gpus"] if obj["metadata"]["name"] == "dcgm-exporter" else []
    assert list(restricted_violations(spec)) == host_path
    assert all(container["securityContext"]["readOnlyRootFilesystem"] for container in containers(spec))


def test_only_the_exporters_namespace_lets_a_host_path_in():
    enforced = {
        obj["metadata"]["name"]: obj["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for obj in OBJECTS
        if obj["kind"] == "Namespace"
    }
    assert enforced == {"gpulab": "restricted", "gpulab-dcgm": "privileged"}
    assert [title(obj) for obj in WORKLOADS if obj["metadata"]["namespace"] == "gpulab-dcgm"] == [
        "DaemonSet dcgm-exporter"
    ]


def test_only_what_asks_the_api_server_has_a_token():
    with_token = {
        obj["metadata"]["name"] for obj in WORKLOADS if (pod_spec(obj) or {})["automountServiceAccountToken"]
    }
    assert with_token == {"prometheus", "prometheus-adapter"}
    assert all(not obj["automountServiceAccountToken"] for obj in OBJECTS if obj["kind"] == "ServiceAccount")


def test_roles_only_read_and_name_what_they_read():
    rules = [(title(obj), rule) for obj in OBJECTS if obj["kind"] in ("Role", "ClusterRole") for rule in obj["rules"]]
    assert rules
    for name, rule in rules:
        assert {"get", "list", "watch"} >= set(rule["verbs"]), name
        assert "*" not in [*rule["apiGroups"], *rule["resources"]] and "secrets" not in rule["resources"], name


def test_an_autoscaled_deployment_says_nothing_of_replicas():
    for hpa in (obj for obj in OBJECTS if obj["kind"] == "HorizontalPodAutoscaler"):
        target = hpa["spec"]["scaleTargetRef"]
        assert "replicas" not in named(target["kind"], target["name"])["spec"]


def test_only_v1_is_routed_and_only_within_the_vpc():
    routes = [
        (path["path"], path["pathType"], path["backend"]["service"]["name"])
        for obj in OBJECTS
        if obj["kind"] == "Ingress"
        for rule in obj["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    assert routes == [("/v1", "Prefix", "vllm")]
    assert all("defaultBackend" not in obj["spec"] for obj in OBJECTS if obj["kind"] == "Ingress")
    (params,) = (obj for obj in OBJECTS if obj["kind"] == "IngressClassParams")
    assert params["spec"]["scheme"] == "internal"
    assert all(obj["spec"].get("type", "ClusterIP") == "ClusterIP" for obj in OBJECTS if obj["kind"] == "Service")


def test_names_that_refer_to_each_other_agree():
    vllm = named("Deployment", "vllm")["spec"]["template"]
    for selector in (
        named("Service", "vllm")["spec"]["selector"],
        named("NetworkPolicy", "vllm")["spec"]["podSelector"]["matchLabels"],
        named("PodMonitor", "vllm")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= vllm["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in vllm["spec"]["containers"][0]["ports"]}
    assert named("PodMonitor", "vllm")["spec"]["podMetricsEndpoints"][0]["port"] in ports
    assert named("Service", "vllm")["spec"]["ports"][0]["targetPort"] == ports["http"]
    for pool in NODE_POOLS:
        template = pool["spec"]["template"]
        assert template["spec"]["nodeClassRef"]["name"] == named("NodeClass", "gpulab")["metadata"]["name"]
        if pool["metadata"]["name"] == "load":
            continue
        assert vllm["spec"]["nodeSelector"].items() <= template["metadata"]["labels"].items()
        assert [taint["key"] for taint in template["spec"]["taints"]] == [vllm["spec"]["tolerations"][0]["key"]]
    assert named("Ingress", "vllm")["spec"]["ingressClassName"] == named("IngressClass", "gpulab")["metadata"]["name"]


def test_every_metric_an_autoscaler_reads_has_a_rule_and_a_reader():
    config = yaml.safe_load(named("ConfigMap", "prometheus-adapter")["data"]["config.yaml"])
    rules = {rule["name"]["as"] for rule in config["rules"]}
    read = {
        obj["spec"]["metrics"][0]["pods"]["metric"]["name"]
        for obj in OBJECTS
        if obj["kind"] == "HorizontalPodAutoscaler"
    }
    assert read == rules
    assert set(named("Role", "gpulab-custom-metrics")["rules"][0]["resources"]) == {f"pods/{name}" for name in rules}


def test_nothing_holds_a_secret_and_everything_says_who_made_it():
    assert not [obj for obj in OBJECTS if obj["kind"] == "Secret"]
    assert {obj["metadata"]["labels"][MANAGED_LABEL] for obj in OBJECTS} == {"gpulab"}


def test_load_has_machines_of_its_own_and_reaches_models_only() -> None:
    """No pod of the load fits a GPU machine or brings one about, and no other pod a machine of the load."""
    load, pod = named("Job", "load")["spec"], named("Job", "load")["spec"]["template"]["spec"]
    for pool in NODE_POOLS:
        template, is_loads = pool["spec"]["template"], pool["metadata"]["name"] == "load"
        assert (pod["nodeSelector"].items() <= template["metadata"]["labels"].items()) == is_loads
        tolerated = {(one["key"], one["effect"]) for one in pod["tolerations"]}
        assert ({(one["key"], one["effect"]) for one in template["spec"]["taints"]} <= tolerated) == is_loads
        assert "nvidia.com/gpu" not in pool["spec"]["limits"] or not is_loads
    (container,) = pod["containers"]
    assert "nvidia.com/gpu" not in str(container["resources"]) and "cpu" not in container["resources"]["limits"]
    vllm = named("Deployment", "vllm")["spec"]["template"]
    assert container["image"] == vllm["spec"]["containers"][0]["image"]
    reached = [rule for rule in opened(named("Job", "load"), "egress") if rule["ports"][0]["port"] != 53]
    (port,) = vllm["spec"]["containers"][0]["ports"]
    selector = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "vllm"}}}
    assert reached == [{"ports": [{"port": port["containerPort"]}], "to": [selector]}]
    assert opened(named("Job", "load"), "ingress") == []
    from_load = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "load"}}}
    assert any(from_load in rule["from"] for rule in opened(named("Deployment", "vllm"), "ingress"))
    assert load["template"]["metadata"]["labels"]["app.kubernetes.io/name"] == "load"


def test_a_dead_shard_fails_the_load_and_nothing_of_it_stays_for_ever() -> None:
    job = named("Job", "load")["spec"]
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert 0 < job["activeDeadlineSeconds"] <= 3600 and 0 < job["ttlSecondsAfterFinished"] <= 600


POLICIES = [obj for obj in OBJECTS if obj["kind"] == "NetworkPolicy"]


def acting_on(pod: Object) -> list[Object]:
    """The policies that select a workload's pods."""
    labels = pod["spec"]["template"]["metadata"]["labels"].items()
    return [
        policy["spec"]
        for policy in POLICIES
        if policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
        and policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels
    ]


def opened(pod: Object, direction: str) -> list[Object]:
    """Rules that let traffic of a workload's pods through, "ingress" or "egress"."""
    return [rule for spec in acting_on(pod) for rule in spec.get(direction, ())]


@pytest.mark.parametrize("pod", WORKLOADS, ids=title)
def test_pods_are_closed_but_for_named_ports(pod: Object):
    assert {kind for spec in acting_on(pod) for kind in spec["policyTypes"]} == {"Ingress", "Egress"}
    listens = {port["containerPort"] for c in (pod_spec(pod) or {})["containers"] for port in c.get("ports", ())}
    rules = opened(pod, "ingress")
    assert {port["port"] for rule in rules for port in rule["ports"]} == listens
    assert all(rule["from"] for rule in rules)


@pytest.mark.parametrize("pod", WORKLOADS, ids=title)
def test_no_pod_reaches_the_instance_metadata_service(pod: Object):
    metadata = ip_address("169.254.169.254")
    for rule in opened(pod, "egress"):
        ports = {port["port"] for port in rule["ports"]}
        blocks = [peer["ipBlock"] for peer in rule.get("to", ()) if "ipBlock" in peer]
        reached = [
            block
            for block in blocks
            if metadata in ip_network(block["cidr"])
            and not any(metadata in ip_network(part) for part in block.get("except", ()))
        ]
        assert not reached and (ports == {53} or rule["to"])


def test_public_addresses_get_no_further_than_the_load_balancer():
    sources = [
        ip_network(peer["ipBlock"]["cidr"])
        for pod in WORKLOADS
        for rule in opened(pod, "ingress")
        for peer in rule["from"]
        if "ipBlock" in peer
    ]
    assert sources and all(source.is_private for source in sources)


def test_the_readme_names_every_manifest():
    text = (Path(__file__).parents[1] / "manifests" / "README.md").read_text()
    assert [file for file in manifest_files() if f"`{file}.yaml`" not in text] == []
