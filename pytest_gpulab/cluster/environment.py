"""A container's environment variables, with what they take from Secrets and from the pod itself."""

from __future__ import annotations

import re
from base64 import b64decode
from typing import Any

from pytest_gpulab.cluster.objects import Object, at, namespace_of
from pytest_gpulab.cluster.resources import SECRET
from pytest_gpulab.cluster.store import Store


class MissingReference(Exception):
    """A variable names a Secret or a key that does not exist or is no text; the container cannot be created."""


def environment(store: Store, pod: Object, container: dict[str, Any]) -> dict[str, str]:
    """The variables of a pod's container that are literal, or come from a Secret or a field of the pod.

    Raises:
        MissingReference: in the kubelet's words, unless the reference is optional.
    """
    found = {}
    for variable in container.get("env") or ():
        value = _value(store, pod, variable)
        if value is not None:
            found[variable["name"]] = value
    return found


def _value(store: Store, pod: Object, variable: dict[str, Any]) -> str | None:
    if (field := at(variable, "valueFrom.fieldRef.fieldPath")) is not None:
        return field_value(pod, field)
    reference = at(variable, "valueFrom.secretKeyRef")
    return variable.get("value") if reference is None else _secret_value(store, pod, reference)


_KEYED = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


def field_value(pod: Object, path: str) -> str:
    """A field as the downward API gives it, such as ``metadata.labels['app']``; empty when there is none."""
    keyed = _KEYED.fullmatch(path)
    return str((pod["metadata"].get(keyed[1]) or {}).get(keyed[2], "") if keyed else at(pod, path, ""))


def _secret_value(store: Store, pod: Object, reference: dict[str, Any]) -> str | None:
    secret = store.find(SECRET, reference["name"], namespace_of(pod))
    encoded = at(secret, "data", {})
    if reference["key"] in encoded:
        try:
            return b64decode(encoded[reference["key"]]).decode()
        except ValueError as error:
            raise MissingReference(
                f"key {reference['key']} in Secret {reference['name']} is no text: {error}"
            ) from error
    if reference.get("optional"):
        return None
    if secret is None:
        raise MissingReference(f'secret "{reference["name"]}" not found')
    raise MissingReference(f"couldn't find key {reference['key']} in Secret {namespace_of(pod)}/{reference['name']}")
