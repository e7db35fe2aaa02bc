"""The manifests with a profile, a fleet and a run filled in."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

from pytest_gpulab import render
from pytest_gpulab.accelerators import ACCELERATORS
from pytest_gpulab.cluster.clock import VirtualClock
from pytest_gpulab.cluster.cloud import INSTANCE_TYPES
from pytest_gpulab.cluster.embedded import EmbeddedCluster
from pytest_gpulab.cluster.karpenter import Pool
from pytest_gpulab.cluster.resources import DEPLOYMENT, NODE_CLAIM, NODE_CLASS, NODE_POOL
from pytest_gpulab.experiment import Profile
from pytest_gpulab.fleet import FROM_ZERO, Autoscaling, Fleet
from pytest_gpulab.models import MODELS
from pytest_gpulab.vllm_args import from_argv
from tests.manifests import pod_spec, problems, restricted_violations

Object = dict[str, Any]
T4 = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_num_seqs": 16, "kv_cache_dtype": "fp8"})
MACHINES = render.Machines("node-role", ("subnet-1", "subnet-2"), ("sg-1",))
FLEETS = {
    "none": None,
    "from-zero": FROM_ZERO,
    "fixed": Fleet(autoscaling=None, replicas=3, capacity=("on-demand",), pre_stop_s=20, grace_s=40),
    "running": Fleet(
        autoscaling=Autoscaling(policy="running", target=2.5, min_replicas=2, max_replicas=6, scale_down_window_s=60),
        readiness_period_s=1,
        max_gpus=6,
        consolidate_after_s=300,
    ),
}


def serving(profile: Profile = T4, fleet: Fleet | None = FROM_ZERO) -> dict[str, Object]:
    objects = render.serving_objects(profile, fleet, run="r1", api_key="a key")
    assert len({obj["kind"] for obj in objects}) == len(objects)
    return {obj["kind"]: obj for obj in objects}


def container(objects: dict[str, Object]) -> Object:
    (found,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def everything(profile: Profile, fleet: Fleet | None) -> list[Object]:
    return [
        *render.pool_objects(fleet or FROM_ZERO, [profile.machine], run="r1"),
        *render.owned_cluster_objects(run="r1"),
        *render.serving_objects(profile, fleet, run="r1", api_key="a key"),
    ]


def assert_valid(objects: list[Object]) -> None:
    for obj in objects:
        about = f"{obj['kind']} {obj['metadata']['name']}"
        assert problems(obj) == [], about
        spec = pod_spec(obj)
        if spec and obj["metadata"]["namespace"] == "gpulab":
            assert list(restricted_violations(spec)) == [], about


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("model", MODELS)
def test_what_every_profile_needs_is_valid(model: str, accelerator: str):
    profile = Profile(model=model, accelerator=accelerator, engine_args={"enable_prefix_caching": False})
    assert_valid(render.serving_objects(profile, FROM_ZERO, run="r1", api_key="a key"))
    assert_valid(render.gpu_capacity(FROM_ZERO, [profile.machine], run="r1"))


@pytest.mark.parametrize("fleet", FLEETS.values(), ids=FLEETS)
def test_what_every_fleet_needs_is_valid(fleet: Fleet | None):
    assert_valid(render.serving_objects(T4, fleet, run="r1", api_key="a key"))
    assert_valid(render.gpu_capacity(fleet or FROM_ZERO, ["g4dn.xlarge"], run="r1"))


def test_the_pool_is_valid():
    assert_valid(everything(T4, None))


@pytest.mark.parametrize("fleet", FLEETS.values(), ids=FLEETS)
def test_everything_and_all_it_makes_carries_the_run(fleet: Fleet | None):
    wanted = {"app.kubernetes.io/managed-by": "gpulab", "gpulab.dev/run": "r1"}
    for obj in everything(T4, fleet):
        assert wanted.items() <= obj["metadata"]["labels"].items()
        if "template" in obj.get("spec", {}):
            assert wanted.items() <= obj["spec"]["template"]["metadata"]["labels"].items()
        assert obj["metadata"].get("namespace", "gpulab") in ("gpulab", "gpulab-dcgm", "kube-system")


def test_the_servers_arguments_are_the_profiles():
    assert from_argv(container(serving())["args"], "t4") == T4


@pytest.mark.parametrize("fleet", FLEETS.values(), ids=FLEETS)
def test_the_pieces_of_a_serving_find_each_other(fleet: Fleet | None):
    objects = serving(T4, fleet)
    name = render.serving_name(T4)
    assert {obj["metadata"]["name"] for obj in objects.values()} == {name}
    assert {obj["metadata"]["namespace"] for obj in objects.values()} == {"gpulab"}
    deployment = objects["Deployment"]["spec"]
    pod_labels = deployment["template"]["metadata"]["labels"]
    for selector in (deployment["selector"]["matchLabels"], objects["Service"]["spec"]["selector"]):
        assert selector.items() <= pod_labels.items() and name in selector.values()
    (rule,) = objects["Ingress"]["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (path["path"], path["backend"]["service"]["name"]) == ("/v1", name)
    if "HorizontalPodAutoscaler" in objects:
        target = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}


def test_the_key_is_in_the_secret_and_nowhere_else():
    objects = serving()
    secret = objects.pop("Secret")
    assert base64.b64decode(secret["data"]["api-key"]) == b"a key"
    (variable,) = (item for item in container(objects)["env"] if item["name"] == "VLLM_API_KEY")
    assert variable["valueFrom"] == {"secretKeyRef": {"name": secret["metadata"]["name"], "key": "api-key"}}
    assert "a key" not in str(objects) and secret["data"]["api-key"] not in str(objects)


def test_without_a_fleet_there_is_one_replica():
    objects = serving(fleet=None)
    assert objects["Deployment"]["spec"]["replicas"] == 1 and "HorizontalPodAutoscaler" not in objects


def test_a_fixed_fleet_has_its_replicas_and_drains():
    objects = serving(fleet=FLEETS["fixed"])
    assert objects["Deployment"]["spec"]["replicas"] == 3 and "HorizontalPodAutoscaler" not in objects
    assert container(objects)["lifecycle"]["preStop"] == {"sleep": {"seconds": 20}}
    assert objects["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 60


def test_an_autoscaled_fleet_leaves_replicas_to_the_autoscaler():
    objects = serving(fleet=FLEETS["running"])
    assert "replicas" not in objects["Deployment"]["spec"]
    spec = objects["HorizontalPodAutoscaler"]["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 6)
    assert spec["metrics"][0]["pods"] == {
        "metric": {"name": "vllm_requests_running"},
        "target": {"type": "AverageValue", "averageValue": "2500m"},
    }
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 60
    assert "behavior" not in serving()["HorizontalPodAutoscaler"]["spec"]


def test_a_server_has_half_an_hour_to_start_however_often_it_is_asked():
    for fleet in FLEETS.values():
        probe = container(serving(fleet=fleet))["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] == 1800
    served = container(serving(fleet=FLEETS["running"]))
    assert served["readinessProbe"]["periodSeconds"] == 1 and "lifecycle" not in served


def test_names_are_dns_labels_and_tell_profiles_apart():
    profiles = [
        Profile(model=model, accelerator=accelerator, engine_args={"max_num_seqs": seqs}).on(fleet)
        for model in MODELS
        for accelerator in ACCELERATORS
        for seqs in (None, 16)
        for fleet in FLEETS.values()
        if fleet
    ]
    names = {render.serving_name(profile) for profile in profiles}
    assert len(names) == len(profiles)
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])", name) for name in names)


def pools(fleet: Fleet, **options: Any) -> dict[str, Object]:
    objects = render.gpu_capacity(fleet, ["g4dn.xlarge", "g4dn.2xlarge"], run="r1", **options)
    return {obj["metadata"]["name"]: obj for obj in objects}


def test_pools_sell_what_the_fleet_may_have():
    made = pools(FLEETS["running"] or FROM_ZERO)
    spot, on_demand = Pool.of(made["gpu-spot"]), Pool.of(made["gpu-on-demand"])
    assert spot.weight > on_demand.weight
    for pool, capacity in ((spot, "spot"), (on_demand, "on-demand")):
        offered = {
            (o.type.name, o.capacity_type) for o in EmbeddedCluster(VirtualClock()).cloud.offerings if pool.allows(o)
        }
        assert offered == {("g4dn.xlarge", capacity), ("g4dn.2xlarge", capacity)}
        assert (pool.limits, pool.consolidate_after) == ({"nvidia.com/gpu": 6000}, 300.0)
    assert set(pools(FLEETS["fixed"] or FROM_ZERO)) == {"gpulab", "gpu-on-demand"}


@pytest.mark.parametrize("instance_type", [kind.name for kind in INSTANCE_TYPES if kind.gpus])
def test_a_rendered_pool_buys_a_machine_for_a_rendered_pod(instance_type: str):
    """Taints, tolerations, selectors, requests and requirements of the two fit, and so do the claims' fields."""
    cluster = EmbeddedCluster(VirtualClock())
    for obj in render.gpu_capacity(FROM_ZERO, [instance_type], run="r1"):
        cluster.apply({"NodePool": NODE_POOL, "NodeClass": NODE_CLASS}[obj["kind"]], obj)
    pods = serving(fleet=None)["Deployment"]
    cluster.apply(DEPLOYMENT, {**pods, "metadata": {**pods["metadata"], "namespace": "default"}})
    cluster.wait("a claim", lambda: bool(cluster.store.list(NODE_CLAIM)), 60.0, lambda: ())
    (claim,) = cluster.store.list(NODE_CLAIM)
    assert problems({"kind": "NodeClaim", "spec": claim["spec"]}) == []
    assert claim["metadata"]["labels"]["gpulab.dev/run"] == "r1"


def test_machines_name_the_clusters_own_network():
    node_class = pools(FROM_ZERO, machines=MACHINES)["gpulab"]
    assert problems(node_class) == []
    assert node_class["spec"]["role"] == "node-role"
    assert node_class["spec"]["subnetSelectorTerms"] == [{"id": "subnet-1"}, {"id": "subnet-2"}]
    assert node_class["spec"]["securityGroupSelectorTerms"] == [{"id": "sg-1"}]


def test_what_aws_bills_is_tagged_with_the_run():
    wanted = {"gpulab.dev/managed-by": "gpulab", "gpulab.dev/run": "r1"}
    assert pools(FROM_ZERO, machines=MACHINES)["gpulab"]["spec"]["tags"] == wanted
    load_balancer = params(machines=MACHINES)
    assert problems(load_balancer) == []
    assert {tag["key"]: tag["value"] for tag in load_balancer["spec"]["tags"]} == wanted


def params(**options: Any) -> Object:
    objects = render.pool_objects(FROM_ZERO, ["g4dn.xlarge"], run="r1", **options)
    (found,) = (obj for obj in objects if obj["kind"] == "IngressClassParams")
    return found


def test_the_load_balancer_is_public_only_with_a_certificate_and_addresses():
    assert params()["spec"]["scheme"] == "internal"
    public = params(public=render.PublicAccess("arn:aws:acm:us-west-2:1:certificate/c", ("192.0.2.0/24",)))
    assert problems(public) == []
    assert public["spec"]["scheme"] == "internet-facing" and public["spec"]["inboundCIDRs"] == ["192.0.2.0/24"]
    assert public["spec"]["certificateARNs"] == ["arn:aws:acm:us-west-2:1:certificate/c"]
    for certificate, cidrs in (("", ("192.0.2.0/24",)), ("arn", ())):
        with pytest.raises(ValueError, match="certificate"):
            render.PublicAccess(certificate, cidrs)


def load(**changes: Any) -> list[Object]:
    given: dict[str, Any] = {
        "run": "r1",
        "service": "vllm-qwen-t4-1",
        "share": '{"seed": 1}',
        "code": b"zip",
        "pods": 3,
        "memory_bytes": 700 << 20,
        "longest_s": 90.5,
        "ready_s": 600.0,
        **changes,
    }
    return render.load_objects("load-1a2b", **given)


def test_a_load_is_valid_and_carries_the_run():
    objects = load()
    assert_valid(objects)
    wanted = {"app.kubernetes.io/managed-by": "gpulab", "gpulab.dev/run": "r1"}
    for obj in objects:
        assert wanted.items() <= obj["metadata"]["labels"].items()
        if "template" in obj.get("spec", {}):
            assert wanted.items() <= obj["spec"]["template"]["metadata"]["labels"].items()


def test_a_load_has_its_pods_its_share_and_the_models_key():
    _, _, config, job = load()
    assert {config["metadata"]["name"], job["metadata"]["name"]} == {"load-1a2b"}
    assert config["data"] == {"share.json": '{"seed": 1}'}
    assert base64.b64decode(config["binaryData"]["gpulab.zip"]) == b"zip"
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
    pod = job["spec"]["template"]["spec"]
    (mounted,) = (volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume)
    assert mounted == "load-1a2b"
    (sends,) = pod["containers"]
    assert sends["resources"]["requests"]["memory"] == sends["resources"]["limits"]["memory"] == "700Mi"
    variables = {variable["name"]: variable for variable in sends["env"]}
    assert variables["GPULAB_LOAD_SERVICE"]["value"] == "vllm-qwen-t4-1"
    key = {"secretKeyRef": {"name": "vllm-qwen-t4-1", "key": "api-key"}}
    assert variables["GPULAB_API_KEY"]["valueFrom"] == key


def test_a_loads_deadlines_count_in_the_clusters_time():
    spec, fast = load()[-1]["spec"], load(speed=100.0)[-1]["spec"]
    assert spec["activeDeadlineSeconds"] == 691 and fast["activeDeadlineSeconds"] == 600 + 9050
    assert fast["ttlSecondsAfterFinished"] == 100 * spec["ttlSecondsAfterFinished"]
    graces = [one["template"]["spec"]["terminationGracePeriodSeconds"] for one in (spec, fast)]
    assert graces == [10, 1000]


def test_a_share_that_no_configmap_holds_is_refused():
    with pytest.raises(ValueError, match=r"must fit into a ConfigMap of 1,000,000 bytes, got 1,000,004"):
        load(share="x" * 1_000_000)


def test_what_is_handed_out_is_the_callers():
    first = serving()["Deployment"]
    first["spec"]["template"]["spec"]["containers"].clear()
    assert container(serving())
