"""The API through kubectl, as a person at a terminal would use it."""

from __future__ import annotations

import json
import threading

import yaml

from pytest_gpulab.cluster.resources import (
    CLUSTER_ROLE,
    CONFIG_MAP,
    DEPLOYMENT,
    HPA,
    NAMESPACE,
    POD,
    ROLE,
    ROLE_BINDING,
    SECRET,
    SERVICE_ACCOUNT,
)
from tests.cluster.serving import Served

MANIFEST = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: vllm
        image: vllm:1
        ports: [{containerPort: 8000}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8000}]}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: web}
spec:
  minReplicas: 1
  maxReplicas: 4
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: web}
  metrics:
  - type: Pods
    pods: {metric: {name: vllm_num_requests_running}, target: {type: AverageValue, averageValue: "4"}}
"""
CONTAINER = {"name": "c", "image": "i:1"}
OTHER = MANIFEST.replace("vllm:1", "vllm:2")


def apply(served: Served, manifest: str, *words: str, ok: bool = True) -> str:
    return served.kubectl("apply", *words, "-f", "-", stdin=manifest, ok=ok)


def test_apply_diff_and_validation(served: Served) -> None:
    assert apply(served, MANIFEST).count("created") == 3
    assert apply(served, MANIFEST).count("unchanged") == 3
    changed = served.kubectl("diff", "-f", "-", stdin=OTHER, ok=False)
    assert "-      - image: vllm:1" in changed and "+      - image: vllm:2" in changed
    assert served.kubectl("diff", "-f", "-", stdin=MANIFEST) == ""
    wrong = apply(served, MANIFEST.replace("image:", "imgae:"), ok=False)
    assert 'unknown field "spec.template.spec.containers[0].imgae"' in wrong
    assert "deployment.apps/web configured" in apply(served, OTHER)
    assert served.store.get(DEPLOYMENT, "web", "default")["spec"]["template"]["spec"]["containers"][0] == {
        "name": "vllm",
        "image": "vllm:2",
        "ports": [{"containerPort": 8000, "protocol": "TCP"}],
        "imagePullPolicy": "IfNotPresent",
        "resources": {},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
    }


def test_a_list_is_applied_as_its_items_are(served: Served) -> None:
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(yaml.safe_load_all(MANIFEST))})
    assert apply(served, listed).count("created") == 3
    assert apply(served, MANIFEST).count("unchanged") == 3
    assert "deployment.apps/web configured" in apply(served, listed.replace("vllm:1", "vllm:2"))


def test_get_prints_tables_and_describe_reads_the_autoscaler(served: Served) -> None:
    apply(served, MANIFEST)
    served.clock.time += 90
    rows = [line.split() for line in served.kubectl("get", "deploy,svc,hpa", "--no-headers").splitlines() if line]
    assert rows[0] == ["deployment.apps/web", "0/1", "0", "0", "90s"]
    assert rows[1] == ["service/web", "ClusterIP", "<none>", "80/TCP", "90s"]
    assert rows[2][1:] == ["Deployment/web", "<unknown>/4", "1", "4", "0", "90s"]
    metric = {"metric": {"name": "vllm_num_requests_running"}, "current": {"averageValue": "7"}}
    status = {"currentReplicas": 1, "desiredReplicas": 2, "currentMetrics": [{"type": "Pods", "pods": metric}]}
    served.do(lambda: served.store.patch_status(HPA, "web", "default", status))
    described = served.kubectl("describe", "hpa", "web")
    assert "7 / 4" in described and "1 current / 2 desired" in described
    assert "All" not in served.kubectl("get", "all") and "TYPE" in served.kubectl("get", "svc")
    assert json.loads(served.kubectl("get", "deploy", "web", "-o", "json"))["spec"]["replicas"] == 1
    assert "nodepools" in served.kubectl("api-resources") and "v1.32.0+gpulab" in served.kubectl("version")
    assert "Number of desired pods" in served.kubectl("explain", "deployment.spec.replicas")


def test_scale_label_restart_and_patch(served: Served) -> None:
    apply(served, MANIFEST)
    served.kubectl("scale", "deploy/web", "--replicas=3")
    served.kubectl("label", "deploy/web", "team=lab")
    served.kubectl("rollout", "restart", "deploy/web")
    served.kubectl("patch", "deploy/web", "--type=json", "-p", '[{"op":"add","path":"/spec/paused","value":true}]')
    served.kubectl("set", "image", "deploy/web", "vllm=vllm:3")
    after = served.store.get(DEPLOYMENT, "web", "default")
    assert after["spec"]["replicas"] == 3 and after["spec"]["paused"]
    assert after["metadata"]["labels"] == {"app": "web", "team": "lab"}
    template = after["spec"]["template"]
    assert template["spec"]["containers"][0]["image"] == "vllm:3"
    assert "kubectl.kubernetes.io/restartedAt" in template["metadata"]["annotations"]
    served.kubectl("label", "deploy/web", "team-")
    assert served.store.get(DEPLOYMENT, "web", "default")["metadata"]["labels"] == {"app": "web"}


def test_server_side_apply(served: Served) -> None:
    assert apply(served, MANIFEST, "--server-side").count("serverside-applied") == 3
    refused = apply(served, OTHER, "--server-side", "--field-manager=other", ok=False)
    assert 'conflict with "kubectl": .spec.template.spec.containers[name="vllm"].image' in refused
    apply(served, OTHER, "--server-side", "--field-manager=other", "--force-conflicts")
    assert "vllm:2" in served.kubectl("get", "deploy", "web", "-o", "yaml")


def test_a_client_side_manifest_becomes_server_side(served: Served) -> None:
    apply(served, MANIFEST)
    apply(served, MANIFEST, "--server-side")
    assert "serverside-applied" in apply(served, OTHER, "--server-side")


def test_wait_sees_a_condition_and_delete_waits(served: Served) -> None:
    apply(served, MANIFEST)
    condition = {"type": "Available", "status": "True"}

    def become_available() -> None:
        served.store.patch_status(DEPLOYMENT, "web", "default", {"conditions": [condition]})

    reports = threading.Timer(0.2, lambda: served.do(become_available))
    reports.start()
    assert "condition met" in served.kubectl("wait", "--for=condition=Available", "deploy/web", "--timeout=20s")
    reports.join()
    served.kubectl("delete", "deploy,svc,hpa", "--all")
    assert not served.store.list(DEPLOYMENT)
    assert "NotFound" in served.kubectl("get", "deploy", "web", ok=False)


def test_get_watch_prints_changes(served: Served) -> None:
    apply(served, MANIFEST)
    served.kubectl("wait", "--for=jsonpath={.spec.replicas}=1", "deploy/web", "--timeout=5s")
    pod = {"metadata": {"name": "a"}, "spec": {"containers": [CONTAINER]}}
    served.do(lambda: served.store.create(POD, pod, "default"))
    output = served.kubectl("get", "pods", "--watch", "--request-timeout=1")
    assert "a      0/1     Pending" in output


def test_create_sends_protobuf(served: Served) -> None:
    """Each of these bodies is Kubernetes' protobuf, and kubectl does not try again with JSON."""
    get = served.store.get
    assert "namespace/x created" in served.kubectl("create", "namespace", "x")
    assert get(NAMESPACE, "x")["status"] == {"phase": "Active"}
    served.kubectl("create", "configmap", "c", "-n", "x", "--from-literal=a=b", "--from-literal=empty=")
    assert get(CONFIG_MAP, "c", "x")["data"] == {"a": "b", "empty": ""}
    served.kubectl("create", "secret", "generic", "s", "-n", "x", "--from-literal=key=\u00fc")
    assert get(SECRET, "s", "x")["data"] == {"key": "w7w="} and get(SECRET, "s", "x")["type"] == "Opaque"
    served.kubectl("create", "serviceaccount", "sa", "-n", "x")
    assert get(SERVICE_ACCOUNT, "sa", "x")["metadata"]["namespace"] == "x"
    served.kubectl("create", "role", "r", "-n", "x", "--verb=get", "--verb=list", "--resource=pods")
    assert get(ROLE, "r", "x")["rules"] == [{"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]}]
    served.kubectl("create", "rolebinding", "b", "-n", "x", "--role=r", "--serviceaccount=x:sa", "--user=u")
    binding = get(ROLE_BINDING, "b", "x")
    assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"}
    assert binding["subjects"] == [
        {"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "u"},
        {"kind": "ServiceAccount", "name": "sa", "namespace": "x"},
    ]
    served.kubectl("create", "clusterrole", "r", "--verb=get", "--non-resource-url=/metrics")
    served.kubectl("create", "clusterrolebinding", "b", "--clusterrole=r", "--group=g")
    assert get(CLUSTER_ROLE, "r")["rules"] == [{"verbs": ["get"], "nonResourceURLs": ["/metrics"]}]
    assert "AlreadyExists" in served.kubectl("create", "namespace", "x", ok=False)
    served.kubectl("delete", "namespace", "x")


def test_protobuf_that_is_not_read_is_refused_with_the_way_out(served: Served) -> None:
    assert "create -f" in served.kubectl("create", "deployment", "x", "--image=i", ok=False)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [CONTAINER]}}
    served.kubectl("create", "-f", "-", stdin=json.dumps(pod))
