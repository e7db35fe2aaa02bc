"""The API through the official Python client."""

from __future__ import annotations

import json
import ssl
import stat
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic import DynamicClient

from pytest_gpulab.cluster.api.requests import flag
from pytest_gpulab.cluster.objects import Object
from pytest_gpulab.cluster.resources import POD
from tests.cluster.serving import Served

LABELS = {"app": "web"}


@pytest.fixture
def api(served: Served) -> Iterator[client.ApiClient]:
    with config.new_client_from_config(str(served.config)) as connected:
        yield connected


def deployment(**spec: Any) -> Object:
    container = {"name": "vllm", "image": "vllm:1", "ports": [{"containerPort": 8000}]}
    template = {"metadata": {"labels": LABELS}, "spec": {"containers": [container]}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web"},
        "spec": {"selector": {"matchLabels": LABELS}, "template": template, **spec},
    }


def pod(name: str, **meta: Any) -> Object:
    return {"metadata": {"name": name, **meta}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}}


def refused(error: pytest.ExceptionInfo[ApiException]) -> tuple[int, str]:
    """Code and reason."""
    return error.value.status, json.loads(error.value.body)["reason"]


def fetch(served: Served, path: str, token: str | None, **headers: str) -> tuple[int, str]:
    """A plain HTTPS request that checks the server's certificate."""
    authority = served.server._certificates.authority.decode()
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(served.server.url + path, headers=headers)
    context = ssl.create_default_context(cadata=authority)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        with urllib.request.urlopen(request, context=context, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("path", ["/api/v1/pods", "/version", "/healthz", "/openapi/v3", "/nothing"])
@pytest.mark.parametrize("token", [None, "", "wrong"])
def test_nothing_is_answered_without_the_token(served: Served, path: str, token: str | None) -> None:
    code, body = fetch(served, path, token)
    assert code == 401 and json.loads(body)["reason"] == "Unauthorized"


def test_the_server_is_on_loopback_and_its_kubeconfig_is_private(served: Served) -> None:
    assert served.server.url.startswith("https://127.0.0.1:")
    assert stat.S_IMODE(served.config.stat().st_mode) == 0o600
    assert fetch(served, "/healthz", served.server.token) == (200, "ok")


@pytest.mark.parametrize("path", ["/nothing", "/api/v1/nothing", "/apis/apps/v2/deployments", "/api/v1/pods/a/b/c/d"])
def test_unknown_paths(served: Served, path: str) -> None:
    code, body = fetch(served, path, served.server.token)
    assert (code, json.loads(body)["message"]) == (404, "the server could not find the requested resource")


@pytest.mark.parametrize(
    ("query", "value"),
    [({}, False), ({"w": "true"}, True), ({"w": "True"}, True), ({"w": "1"}, True), ({"w": ""}, True)]
    + [({"w": text}, False) for text in ("0", "false", "False", "FALSE")],
)
def test_booleans_read_as_go_reads_them(query: dict[str, str], value: bool) -> None:
    assert flag(query, "w") is value


def test_a_deployment_lives(api: client.ApiClient) -> None:
    apps = client.AppsV1Api(api)
    made = apps.create_namespaced_deployment("default", deployment())
    assert (made.spec.replicas, made.metadata.generation, made.status.replicas) == (1, 1, None)
    scaled = apps.patch_namespaced_deployment_scale("web", "default", {"spec": {"replicas": 3}})
    assert scaled.spec.replicas == 3 and scaled.status.selector == "app=web"
    image = {"spec": {"template": {"spec": {"containers": [{"name": "vllm", "image": "vllm:2"}]}}}}
    changed = apps.patch_namespaced_deployment("web", "default", image)
    container = changed.spec.template.spec.containers[0]
    assert (container.image, container.ports[0].container_port, changed.metadata.generation) == ("vllm:2", 8000, 3)
    reported = apps.patch_namespaced_deployment_status("web", "default", {"status": {"readyReplicas": 2}})
    assert (reported.status.ready_replicas, reported.metadata.generation) == (2, 3)
    apps.replace_namespaced_deployment("web", "default", reported)
    assert apps.delete_namespaced_deployment("web", "default").status == "Success"
    assert apps.list_deployment_for_all_namespaces().items == []


def test_conflicts_and_names_that_are_taken(api: client.ApiClient) -> None:
    core = client.CoreV1Api(api)
    old = core.create_namespaced_config_map("default", {"metadata": {"name": "a"}, "data": {"k": "1"}})
    core.patch_namespaced_config_map("a", "default", {"data": {"k": "2"}})
    with pytest.raises(ApiException) as error:
        core.replace_namespaced_config_map("a", "default", old)
    assert refused(error) == (409, "Conflict")
    with pytest.raises(ApiException) as error:
        core.create_namespaced_config_map("default", {"metadata": {"name": "a"}})
    assert refused(error) == (409, "AlreadyExists")
    with pytest.raises(ApiException) as error:
        core.read_namespaced_config_map("b", "default")
    assert refused(error) == (404, "NotFound")
    with pytest.raises(ApiException) as error:
        core.create_namespaced_config_map("default", {"metadata": {"name": "a", "namespace": "other"}})
    assert refused(error) == (400, "BadRequest")


def test_finalizers_namespaces_and_generated_names(api: client.ApiClient) -> None:
    core = client.CoreV1Api(api)
    core.create_namespace({"metadata": {"name": "lab"}})
    made = core.create_namespaced_pod("lab", {**pod(""), "metadata": {"generateName": "p-", "finalizers": ["x/y"]}})
    name = made.metadata.name
    assert core.delete_namespace("lab").status == "{'phase': 'Terminating'}"
    assert core.read_namespaced_pod(name, "lab").metadata.deletion_timestamp
    with pytest.raises(ApiException) as error:
        core.create_namespaced_pod("lab", pod("late"))
    assert refused(error) == (403, "Forbidden")
    core.patch_namespaced_pod(name, "lab", [{"op": "remove", "path": "/metadata/finalizers"}])
    with pytest.raises(ApiException) as error:
        core.read_namespace("lab")
    assert refused(error) == (404, "NotFound")


def test_validation(api: client.ApiClient) -> None:
    apps = client.AppsV1Api(api)
    with pytest.raises(ApiException) as error:
        apps.create_namespaced_deployment("default", deployment(replica=1), field_validation="Strict")
    assert refused(error) == (400, "BadRequest") and 'unknown field \\"spec.replica\\"' in error.value.body
    made = apps.create_namespaced_deployment("default", deployment(replica=1), dry_run="All")
    assert "replica" not in made.to_dict()["spec"]
    for wrong, reason in (({"replicas": "x"}, "BadRequest"), ({"selector": None}, "Invalid")):
        with pytest.raises(ApiException) as error:
            apps.create_namespaced_deployment("default", deployment(**wrong))
        assert refused(error)[1] == reason
    assert apps.list_namespaced_deployment("default").items == []


def test_lists_are_selected_and_paged(api: client.ApiClient) -> None:
    core = client.CoreV1Api(api)
    for name in "edcba":
        core.create_namespaced_pod("default", pod(name, labels={"even": str(name in "bd")}))
    assert [item.metadata.name for item in core.list_namespaced_pod("default", label_selector="even=True").items] == [
        "b",
        "d",
    ]
    assert len(core.list_pod_for_all_namespaces(field_selector="metadata.name=c").items) == 1
    first = core.list_namespaced_pod("default", limit=2)
    assert first.metadata.remaining_item_count == 3
    rest = core.list_namespaced_pod("default", limit=5, _continue=first.metadata._continue)
    assert [item.metadata.name for item in first.items + rest.items] == list("abcde")
    core.delete_collection_namespaced_pod("default", label_selector="even=True")
    assert [item.metadata.name for item in core.list_namespaced_pod("default").items] == list("ace")


def test_a_watch_resumes_where_it_was(api: client.ApiClient) -> None:
    core = client.CoreV1Api(api)
    core.create_namespaced_pod("default", pod("a", labels=LABELS))
    version = core.list_namespaced_pod("default").metadata.resource_version
    core.patch_namespaced_pod("a", "default", {"metadata": {"labels": {"app": "other"}}})
    core.create_namespaced_pod("default", pod("b", labels=LABELS))
    core.delete_namespaced_pod("b", "default")

    def heard(**options: Any) -> list[tuple[str, str]]:
        found = []
        stream = watch.Watch()
        for event in stream.stream(core.list_namespaced_pod, "default", timeout_seconds=1, **options):
            found.append((event["type"], event["object"].metadata.name))
            if len(found) == options.pop("limit_", 3):
                stream.stop()
        return found

    assert heard(resource_version=version) == [("MODIFIED", "a"), ("ADDED", "b"), ("DELETED", "b")]
    selected = heard(resource_version=version, label_selector="app=web")
    assert selected == [("DELETED", "a"), ("ADDED", "b"), ("DELETED", "b")]


def test_a_watch_hears_what_happens_later(api: client.ApiClient, served: Served) -> None:
    core = client.CoreV1Api(api)
    stream = watch.Watch()
    found = []
    served.do(lambda: served.store.create(POD, pod("p0"), "default"))
    for event in stream.stream(core.list_namespaced_pod, "default", timeout_seconds=10):
        found.append((event["type"], event["object"].metadata.name))
        number = len(found)
        if number == 4:
            stream.stop()
        else:
            served.do(lambda: served.store.create(POD, pod(f"p{number}"), "default"))  # noqa: B023
    assert found == [("ADDED", f"p{number}") for number in range(4)]


def test_an_expired_watch_is_410(api: client.ApiClient, served: Served) -> None:
    core = client.CoreV1Api(api)
    served.store._log._history = 2
    for name in "abcd":
        core.create_namespaced_pod("default", pod(name))
    with pytest.raises(ApiException) as error:
        list(watch.Watch().stream(core.list_namespaced_pod, "default", resource_version="1", timeout_seconds=5))
    assert error.value.status == 410


def test_eviction_obeys_disruption_budgets(api: client.ApiClient, served: Served) -> None:
    core = client.CoreV1Api(api)
    core.create_namespaced_pod("default", pod("a", labels=LABELS))
    budget = {"metadata": {"name": "b"}, "spec": {"selector": {"matchLabels": LABELS}, "minAvailable": 1}}
    client.PolicyV1Api(api).create_namespaced_pod_disruption_budget("default", budget)
    with pytest.raises(ApiException) as error:
        core.create_namespaced_pod_eviction("a", "default", {"metadata": {"name": "a"}})
    assert refused(error) == (429, "TooManyRequests")
    client.PolicyV1Api(api).delete_namespaced_pod_disruption_budget("b", "default")
    core.create_namespaced_pod_eviction("a", "default", {"metadata": {"name": "a"}})
    assert core.list_namespaced_pod("default").items == []


def test_autoscalers_and_binding(api: client.ApiClient, served: Served) -> None:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}
    spec = {"maxReplicas": 4, "scaleTargetRef": target}
    scaling = client.AutoscalingV2Api(api)
    made = scaling.create_namespaced_horizontal_pod_autoscaler("default", {"metadata": {"name": "h"}, "spec": spec})
    assert made.spec.min_replicas == 1
    core = client.CoreV1Api(api)
    core.create_namespaced_pod("default", pod("a"))
    body = {"metadata": {"name": "a"}, "target": {"kind": "Node", "name": "n1"}}
    core.create_namespaced_pod_binding("a", "default", body, _preload_content=False)
    assert core.read_namespaced_pod("a", "default").spec.node_name == "n1"
    with pytest.raises(ApiException) as error:
        core.create_namespaced_pod_binding("a", "default", body, _preload_content=False)
    assert refused(error) == (409, "Conflict")


def test_custom_objects_and_definitions(api: client.ApiClient) -> None:
    custom = client.CustomObjectsApi(api)
    pool = {"apiVersion": "karpenter.sh/v1", "kind": "NodePool", "metadata": {"name": "gpu"}}
    pool["spec"] = {"weight": 1, "template": {"spec": {"requirements": []}}}
    custom.create_cluster_custom_object("karpenter.sh", "v1", "nodepools", pool)
    custom.patch_cluster_custom_object("karpenter.sh", "v1", "nodepools", "gpu", {"spec": {"weight": 5}})
    assert custom.get_cluster_custom_object("karpenter.sh", "v1", "nodepools", "gpu")["spec"]["weight"] == 5
    names = {"plural": "runs", "kind": "Run", "singular": "run"}
    version = {"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}}
    spec = {"group": "lab.io", "scope": "Namespaced", "names": names, "versions": [version]}
    definition = {"metadata": {"name": "runs.lab.io"}, "spec": spec}
    extensions = client.ApiextensionsV1Api(api)
    extensions.create_custom_resource_definition(definition)
    run = {
        "apiVersion": "lab.io/v1",
        "kind": "Run",
        "metadata": {"name": "r"},
        "spec": {"seed": 1},
        "status": {"a": 1},
    }
    assert "status" not in custom.create_namespaced_custom_object("lab.io", "v1", "default", "runs", run)
    extensions.delete_custom_resource_definition("runs.lab.io")
    with pytest.raises(ApiException) as error:
        custom.list_namespaced_custom_object("lab.io", "v1", "default", "runs")
    assert error.value.status == 404


def test_the_dynamic_client_discovers_and_applies(api: client.ApiClient, tmp_path: Path) -> None:
    dynamic = DynamicClient(api, cache_file=str(tmp_path / "discovery.json"))
    deployments = dynamic.resources.get(api_version="apps/v1", kind="Deployment")
    manifest = deployment(replicas=2)

    def apply(body: Object, manager: str, **options: Any) -> Any:
        return deployments.server_side_apply(
            body=json.loads(json.dumps(body)), name="web", namespace="default", field_manager=manager, **options
        )

    first = apply(manifest, "lab")
    assert [entry.operation for entry in first.metadata.managedFields] == ["Apply"]
    assert apply(manifest, "lab").metadata.resourceVersion == first.metadata.resourceVersion
    with pytest.raises(ApiException) as error:
        apply(deployment(replicas=5), "other")
    body = json.loads(error.value.body)
    assert body["message"] == 'Apply failed with 1 conflict: conflict with "lab": .spec.replicas'
    forced = apply(deployment(replicas=5), "other", force_conflicts=True)
    assert forced.spec.replicas == 5
    kept = apply(deployment(), "lab")
    assert kept.spec.replicas == 5, "a field that another manager owns stays when one lets it go"
    assert apply(deployment(), "other").spec.replicas == 1, "a field nobody owns goes back to its default"
    selector = deployments.get(name="web", namespace="default").spec.selector
    assert selector.matchLabels.app == "web"


def test_server_side_apply_meets_an_autoscaler(api: client.ApiClient, tmp_path: Path) -> None:
    apps = client.AppsV1Api(api)
    dynamic = DynamicClient(api, cache_file=str(tmp_path / "discovery.json"))
    deployments = dynamic.resources.get(api_version="apps/v1", kind="Deployment")
    body, options = deployment(replicas=1), {"namespace": "default", "field_manager": "lab"}
    deployments.server_side_apply(body, **options)
    apps.patch_namespaced_deployment_scale("web", "default", {"spec": {"replicas": 3}}, field_manager="hpa")
    with pytest.raises(ApiException) as error:
        deployments.server_side_apply(body, **options)
    assert 'conflict with "hpa"' in json.loads(error.value.body)["message"]
    without = deployments.server_side_apply(deployment(), **options)
    assert without.spec.replicas == 3
    part = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": {"paused": True}}
    assert deployments.server_side_apply(part, namespace="default", field_manager="pauser").spec.paused
    with pytest.raises(ApiException) as error:
        deployments.server_side_apply({**part, "metadata": {"name": "new"}}, **options)
    assert refused(error) == (422, "Invalid")


def test_malformed_requests_are_refused_and_the_server_lives(api: client.ApiClient, served: Served) -> None:
    apps = client.AppsV1Api(api)
    apps.create_namespaced_deployment("default", deployment())
    bodies: list[tuple[Any, int]] = [
        ([{"op": "test", "path": "/spec/replicas", "value": 9}], 422),
        ([{"op": "nonsense"}], 400),
        ({"spec": {"template": {"spec": {"containers": [{"image": "x"}]}}}}, 400),
        ({"spec": {"template": {"spec": {"containers": ["x"]}}}}, 400),
        ({"spec": 3}, 400),
        ({"metadata": {"name": "other"}}, 400),
        ({"metadata": 7}, 400),
    ]
    for body, code in bodies:
        with pytest.raises(ApiException) as error:
            apps.patch_namespaced_deployment("web", "default", body)
        assert error.value.status == code, body
    assert fetch(served, "/api/v1/pods?limit=x", served.server.token)[0] == 400
    assert fetch(served, "/api/v1/pods?continue=x", served.server.token)[0] == 410
    assert client.VersionApi(api).get_code().git_version == "v1.32.0+gpulab"


async def _ready_line(namespace: str, name: str, query: Mapping[str, str]) -> AsyncIterator[str]:
    yield f"{namespace}/{name}: ready\n"


def test_metrics_and_logs_come_from_callables(tmp_path: Path) -> None:
    served = Served(
        tmp_path,
        metrics=lambda path, query: {"kind": "MetricValueList", "path": path, **query} if path else None,
        logs=_ready_line,
    ).start()
    try:
        with config.new_client_from_config(str(served.config)) as api:
            custom, core = client.CustomObjectsApi(api), client.CoreV1Api(api)
            core.create_namespaced_pod("default", pod("a"))
            assert core.read_namespaced_pod_log("a", "default", _preload_content=False).data == b"default/a: ready\n"
            group = "custom.metrics.k8s.io"
            values = custom.get_namespaced_custom_object(group, "v1beta1", "default", "pods", "*")
            assert values["path"] == "namespaces/default/pods/*"
    finally:
        served.stop()
