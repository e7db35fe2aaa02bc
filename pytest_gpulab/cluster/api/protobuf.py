"""Kubernetes' protobuf: what `kubectl create` sends for built-in kinds, without a way to fall back to JSON.

Bodies of the kinds in `_MESSAGES` are read into the JSON they stand for; answers are JSON, which such clients take as
well. Field numbers: the `generated.proto` files of k8s.io/api and k8s.io/apimachinery; wire format:
protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from typing import Any, Final

from pytest_gpulab.cluster.errors import BadRequest, Unsupported
from pytest_gpulab.cluster.objects import Object

MEDIA_TYPE: Final = "application/vnd.kubernetes.protobuf"
_MAGIC: Final = b"k8s\0"
_LONGEST_VARINT: Final = 70
"""Bits: ten bytes of seven."""

Fields = dict[int, tuple[str, str]]
"""Field number to its name in JSON and its type: a scalar, a message, `[...]` for a list or `{...}` for a map."""

_META: Final = {1: ("metadata", "ObjectMeta")}
_ROLE: Final = {**_META, 2: ("rules", "[PolicyRule]")}
_BINDING: Final = {**_META, 2: ("subjects", "[Subject]"), 3: ("roleRef", "RoleRef")}
_MESSAGES: Final[dict[str, Fields]] = {
    "Unknown": {1: ("typeMeta", "TypeMeta"), 2: ("raw", "raw"), 3: ("encoding", "string"), 4: ("type", "string")},
    "TypeMeta": {1: ("apiVersion", "string"), 2: ("kind", "string")},
    "ObjectMeta": {
        1: ("name", "string"),
        2: ("generateName", "string"),
        3: ("namespace", "string"),
        11: ("labels", "{string}"),
        12: ("annotations", "{string}"),
        14: ("finalizers", "[string]"),
    },
    "Namespace": {**_META, 2: ("spec", "NamespaceSpec")},
    "NamespaceSpec": {1: ("finalizers", "[string]")},
    "ConfigMap": {
        **_META,
        2: ("data", "{string}"),
        3: ("binaryData", "{bytes}"),
        4: ("immutable", "bool"),
    },
    "Secret": {
        **_META,
        2: ("data", "{bytes}"),
        3: ("type", "string"),
        4: ("stringData", "{string}"),
        5: ("immutable", "bool"),
    },
    "ServiceAccount": {
        **_META,
        3: ("imagePullSecrets", "[LocalObjectReference]"),
        4: ("automountServiceAccountToken", "bool"),
    },
    "LocalObjectReference": {1: ("name", "string")},
    "Role": _ROLE,
    "ClusterRole": _ROLE,
    "PolicyRule": {
        1: ("verbs", "[string]"),
        2: ("apiGroups", "[string]"),
        3: ("resources", "[string]"),
        4: ("resourceNames", "[string]"),
        5: ("nonResourceURLs", "[string]"),
    },
    "RoleBinding": _BINDING,
    "ClusterRoleBinding": _BINDING,
    "Subject": {1: ("kind", "string"), 2: ("apiGroup", "string"), 3: ("name", "string"), 4: ("namespace", "string")},
    "RoleRef": {1: ("apiGroup", "string"), 2: ("kind", "string"), 3: ("name", "string")},
}
_KINDS: Final = frozenset(name for name, fields in _MESSAGES.items() if fields.get(1) == _META[1])


def decode(body: bytes) -> Object:
    """The object in a request's body.

    Raises:
        Unsupported: its kind, or a field it sets, is not one that is read here.
        BadRequest: it is no protobuf of Kubernetes.
    """
    if not body.startswith(_MAGIC):
        raise BadRequest("a protobuf body must begin with k8s and a zero byte")
    try:
        envelope = _message("Unknown", body[len(_MAGIC) :])
        meta = envelope["typeMeta"]
        if meta["kind"] not in _KINDS:
            raise _unsupported(meta["kind"])
        return {**meta, **_message(meta["kind"], envelope.get("raw", b""))}
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request body is not valid protobuf: {error!r}") from error


def _unsupported(what: str) -> Unsupported:
    return Unsupported(
        f"the body of the request was in an unknown format ({MEDIA_TYPE} of {what}) - accepted media types include: "
        "application/json, application/yaml; with kubectl, send the object with create -f or apply -f"
    )


def _message(name: str, data: bytes) -> Object:
    """Fields at their zero value are left out, as in JSON; a boolean that is sent at all is one that was set."""
    result: Object = {}
    for number, value in _fields(data):
        if number in _MESSAGES[name]:
            key, kind = _MESSAGES[name][number]
            _add(result, key, kind, value)
        elif not _is_empty(value):
            raise _unsupported(f"{name} with field {number}")
    return result


def _add(result: Object, key: str, kind: str, value: Any) -> None:
    if kind.startswith("["):
        result.setdefault(key, []).append(_value(kind[1:-1], value))
    elif kind.startswith("{"):
        entry = dict(_fields(value))
        name, item = entry.get(1, b"").decode(), _value(kind[1:-1], entry.get(2, b""))
        result.setdefault(key, {})[name] = item
    elif kind == "bool" or not (_is_empty(value) if kind in _MESSAGES else value == b""):
        result[key] = _value(kind, value)


def _value(kind: str, value: Any) -> Any:
    if kind == "bool":
        return bool(value)
    if kind == "string":
        return value.decode()
    if kind == "bytes":
        return b64encode(value).decode()
    return value if kind == "raw" else _message(kind, value)


def _is_empty(value: int | bytes) -> bool:
    """Zero, no bytes, or a message of such fields only: what Go sends of a field that nobody set."""
    if isinstance(value, int):
        return value == 0
    try:
        return all(_is_empty(item) for _, item in _fields(value))
    except IndexError:
        return False


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values: whole numbers, and bytes for all that has a length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise IndexError(f"wire type {wire}")
        if at + length > len(data):
            raise IndexError("cut short")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while shift < _LONGEST_VARINT:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise IndexError("a number without end")
