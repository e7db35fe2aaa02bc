"""A request in Kubernetes' terms: which kind, which object, which options."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from aiohttp import web

from pytest_gpulab.cluster.api import protobuf
from pytest_gpulab.cluster.errors import BadRequest, NotFound, Unsupported
from pytest_gpulab.cluster.resources import NAMESPACE, Resource, Resources

_PATH = re.compile(
    r"^/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?$"
)
_OF_NAMESPACE = ("status", "finalize")


def no_such_path() -> NotFound:
    """What a path that nothing serves is answered."""
    return NotFound("the server could not find the requested resource")


def flag(query: Mapping[str, str], name: str) -> bool:
    """A boolean option as apimachinery reads it: absent, `0` and `false` (any case) are false, all else is true."""
    return name in query and query[name].lower() not in ("0", "false")


def whole(query: Mapping[str, str], name: str, default: int = 0) -> int:
    """A whole-number option."""
    text = query.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise BadRequest(f"{name} must be a whole number, got {text!r}") from error


@dataclass(frozen=True)
class Call:
    """What a request addresses and how."""

    method: str
    resource: Resource
    namespace: str
    name: str
    subresource: str
    query: Mapping[str, str]
    accept: str
    agent: str
    media_type: str
    body: Any

    @property
    def dry_run(self) -> bool:
        """Whether nothing is to be stored."""
        return bool(self.query.get("dryRun"))

    @property
    def manager(self) -> str:
        """Who writes: the field manager, or the first word of the client's name."""
        return self.query.get("fieldManager") or self.agent.partition("/")[0] or "unknown"

    @property
    def wants_table(self) -> bool:
        """Whether the client asks for a table, as `kubectl get` does."""
        return "as=Table" in self.accept

    @property
    def watches(self) -> bool:
        """Whether this is a watch."""
        return self.method == "GET" and flag(self.query, "watch")

    @property
    def fields(self) -> str:
        """The field selector; a watch of one object selects it by name."""
        named = f"metadata.name={self.name}" if self.name else ""
        return ",".join(part for part in (self.query.get("fieldSelector", ""), named) if part)


async def read_call(request: web.Request, resources: Resources) -> Call:
    """Parse a request; `NotFound` when no kind is served at its path."""
    found = _PATH.match(request.path.rstrip("/"))
    if not found:
        raise no_such_path()
    group, version = found["group"] or "", found["core"] or found["version"]
    namespace, plural, name, sub = (found[part] or "" for part in ("namespace", "plural", "name", "sub"))
    if not group and namespace and not name and plural in _OF_NAMESPACE:
        namespace, plural, name, sub = "", NAMESPACE.plural, namespace, plural
    resource = resources.at(group, version, plural)
    if resource is None or (sub and sub not in resource.subresources) or (namespace and not resource.namespaced):
        raise no_such_path()
    return Call(
        request.method,
        resource,
        namespace,
        name,
        sub,
        request.query,
        request.headers.get("Accept", ""),
        request.headers.get("User-Agent", ""),
        request.content_type,
        _parsed(await request.read(), request.content_type),
    )


def _parsed(raw: bytes, media_type: str) -> Any:
    if not raw:
        return None
    if media_type == protobuf.MEDIA_TYPE:
        return protobuf.decode(raw)
    if "cbor" in media_type:
        raise Unsupported(f"{media_type} is not served; accepted media types include: application/json")
    try:
        return yaml.safe_load(raw) if "yaml" in media_type else json.loads(raw)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        language = "YAML" if "yaml" in media_type else "JSON"
        raise BadRequest(f"the request body is not valid {language}: {error}") from error
