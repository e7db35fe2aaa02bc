"""What the tests of manifests and rendering share: schemas of every kind, and Pod Security's rules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

Object = dict[str, Any]
VERSIONS = ("1.32", "1.34", "1.37")
"""Of Kubernetes: the embedded cluster's, and later ones."""
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


@cache
def custom_schemas() -> dict[str, Any]:
    """JSON schemas of custom resources' specs, by kind."""
    loaded: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "data" / "custom-resources.yaml").read_text())
    return loaded


def problems(obj: Object, version: str = VERSIONS[0]) -> list[str]:
    """What Kubernetes, or the definition of a custom resource, would refuse."""
    schemas = custom_schemas()
    if obj["kind"] in schemas:
        validator = Draft202012Validator({**schemas[obj["kind"]], "$defs": schemas["$defs"]})
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(obj["spec"])]
    try:
        kubernetes_validate.validate(obj, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.path}: {error.message}"]
    return []


def pod_spec(obj: Object) -> Object | None:
    """The spec of the pods that a workload makes."""
    if obj["kind"] not in ("Deployment", "DaemonSet", "Job"):
        return None
    spec: Object = obj["spec"]["template"]["spec"]
    return spec


def containers(spec: Object) -> list[Object]:
    """All of a pod's containers."""
    return [*spec["containers"], *spec.get("initContainers", ())]


def restricted_violations(spec: Object) -> Iterator[str]:
    """What breaks Pod Security's "restricted" profile.

    Source: kubernetes.io/docs/concepts/security/pod-security-standards, both "baseline" and "restricted".
    """
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec.get("volumes", ()):
        if set(volume) - {"name"} - RESTRICTED_VOLUMES:
            yield f"volume {volume['name']}"
    pod = spec.get("securityContext", {})
    if pod.get("sysctls"):
        yield "sysctls"
    for container in containers(spec):
        yield from _container_violations(container, pod)


def _container_violations(container: Object, pod: Object) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**pod, **own}
    capabilities = own.get("capabilities", {})
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield "runAsNonRoot"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile"
    if capabilities.get("drop") != ["ALL"] or not {"NET_BIND_SERVICE"} >= set(capabilities.get("add", ())):
        yield "capabilities"
    if any("hostPort" in port for port in container.get("ports", ())):
        yield "hostPort"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
