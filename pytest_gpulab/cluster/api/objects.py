"""The verbs on stored objects: read, write and delete, with validation, dry run and managed fields."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Any

from pytest_gpulab.cluster.api.apply import Manager, applied, tracked
from pytest_gpulab.cluster.api.patch import APPLY, patched
from pytest_gpulab.cluster.api.requests import Call, flag, whole
from pytest_gpulab.cluster.api.subresources import bind, evict, rescaled, scale_of
from pytest_gpulab.cluster.api.tables import table
from pytest_gpulab.cluster.api.validation import checked, typed
from pytest_gpulab.cluster.api.watching import selects
from pytest_gpulab.cluster.errors import BadRequest, Expired, NotAllowed
from pytest_gpulab.cluster.objects import Object, name_of, namespace_of, timestamp, uid_of
from pytest_gpulab.cluster.store import Store


@dataclass(frozen=True)
class Answer:
    """What a call is answered."""

    body: Object
    code: int = 200
    warnings: list[str] = field(default_factory=list)


def success(**more: Any) -> Object:
    """A `Status` that says all went well."""
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", **more}


def answer(store: Store, call: Call) -> Answer:
    """Carry out a call that is neither a watch nor a log."""
    if call.subresource == "scale":
        return _scale(store, call)
    if call.subresource in ("eviction", "binding"):
        return _post_to_pod(store, call)
    if call.method == "GET":
        return _read(store, call)
    verb = {"POST": _create, "PUT": _replace, "PATCH": _patch, "DELETE": _delete}.get(call.method)
    misplaced = bool(call.name) if call.method == "POST" else not call.name and call.method != "DELETE"
    if verb is None or misplaced:
        raise NotAllowed("the server does not allow this method on the requested resource")
    return verb(store, call)


# reading


def _read(store: Store, call: Call) -> Answer:
    if call.name:
        found = [store.get(call.resource, call.name, call.namespace)]
        meta: Object = {"resourceVersion": found[0]["metadata"]["resourceVersion"]}
    else:
        found, meta = _page(store, call)
    if call.wants_table:
        include = call.query.get("includeObject", "Metadata")
        shown = table(call.resource, found, meta["resourceVersion"], store.clock.now(), include)
        return Answer({**shown, "metadata": meta})
    if call.name:
        return Answer(found[0])
    kind = f"{call.resource.kind}List"
    return Answer({"kind": kind, "apiVersion": call.resource.api_version, "metadata": meta, "items": found})


def _page(store: Store, call: Call) -> tuple[list[Object], Object]:
    """A list, sorted by namespace and name; the token to continue with is the last key and the first version."""
    visible = selects(call)
    found = sorted(filter(visible, store.list(call.resource, call.namespace)), key=_key)
    version = str(store.version)
    if token := call.query.get("continue"):
        version, last = _read_token(token)
        found = [obj for obj in found if _key(obj) > last]
    limit = whole(call.query, "limit")
    meta: Object = {"resourceVersion": version}
    if limit and len(found) > limit:
        meta |= {"continue": _token(version, found[limit - 1]), "remainingItemCount": len(found) - limit}
        found = found[:limit]
    return found, meta


def _key(obj: Object) -> tuple[str, str]:
    return namespace_of(obj), name_of(obj)


def _token(version: str, last: Object) -> str:
    return urlsafe_b64encode(json.dumps([version, *_key(last)]).encode()).decode()


def _read_token(token: str) -> tuple[str, tuple[str, str]]:
    try:
        version, namespace, name = json.loads(urlsafe_b64decode(token))
    except ValueError as error:
        raise Expired("the continue token is not one of this server's; list again from the start") from error
    return str(version), (str(namespace), str(name))


# writing


def _create(store: Store, call: Call) -> Answer:
    obj, warnings = checked(call.resource, _body(call), _strictness(call))
    obj = _placed(call, obj)
    meta = obj["metadata"]
    if not meta.get("name") and meta.get("generateName"):
        obj = {**obj, "metadata": {**meta, "name": store.generated_name(meta["generateName"])}}
    obj = tracked(call.resource, None, obj, _manager(call, "Update"), _now(store))
    return Answer(store.create(call.resource, obj, call.namespace, dry_run=call.dry_run), 201, warnings)


def _replace(store: Store, call: Call) -> Answer:
    obj, warnings = checked(call.resource, _body(call), _strictness(call))
    obj = _placed(call, obj)
    if name_of(obj) != call.name:
        raise BadRequest(f"the name of the object ({name_of(obj)}) does not match the name on the URL ({call.name})")
    live = store.get(call.resource, call.name, call.namespace)
    return Answer(_write(store, call, live, obj), 200, warnings)


def _patch(store: Store, call: Call) -> Answer:
    if call.media_type == APPLY:
        return _apply(store, call)
    live = store.get(call.resource, call.name, call.namespace)
    new = patched(call.resource, live, call.body, call.media_type)
    new, warnings = checked(call.resource, new, _strictness(call))
    if "metadata" not in new or name_of(new) != call.name:
        raise BadRequest(f"a patch must not change metadata.name, which is {call.name!r}")
    return Answer(_write(store, call, live, new), 200, warnings)


def _apply(store: Store, call: Call) -> Answer:
    if not call.query.get("fieldManager"):
        why = "fieldManager: Required value: is required for apply patch"
        raise BadRequest(f"PatchOptions.meta.k8s.io is invalid: {why}")
    config, warnings = typed(call.resource, _body(call), _strictness(call))
    config = _placed(call, config)
    config["metadata"].setdefault("name", call.name)
    live = store.find(call.resource, call.name, call.namespace)
    manager = _manager(call, "Apply")
    new = applied(call.resource, live, config, manager, force=flag(call.query, "force"), time=_now(store))
    new = checked(call.resource, new, "Ignore")[0]
    if live is None:
        return Answer(store.create(call.resource, new, call.namespace, dry_run=call.dry_run), 201, warnings)
    if not config["metadata"].get("resourceVersion"):
        new["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"]
    return Answer(_store(store, call, new), 200, warnings)


def _write(store: Store, call: Call, live: Object, new: Object) -> Object:
    """Store an update under the writer's name; the part it cannot change does not count as changed by it."""
    part = "status" if call.subresource == "status" else ""
    if part:
        counted = {**live, "status": new.get("status") or {}}
    elif call.resource.has_status:
        counted = {key: value for key, value in new.items() if key != "status"}
        counted |= {"status": live["status"]} if "status" in live else {}
    else:
        counted = new
    managed = tracked(call.resource, live, counted, _manager(call, "Update"), _now(store))
    meta = {**new["metadata"], "managedFields": managed["metadata"]["managedFields"]}
    return _store(store, call, {**new, "metadata": meta})


def _store(store: Store, call: Call, new: Object) -> Object:
    write = store.update_status if call.subresource == "status" else store.update
    return write(call.resource, new, dry_run=call.dry_run)


def _body(call: Call) -> Object:
    body = call.body
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    kind, version = body.get("kind", call.resource.kind), body.get("apiVersion", call.resource.api_version)
    if (kind, version) != (call.resource.kind, call.resource.api_version):
        raise BadRequest(
            f"the API version in the data ({version}, kind {kind}) does not match the expected API version "
            f"({call.resource.api_version}, kind {call.resource.kind})"
        )
    return body


def _strictness(call: Call) -> str:
    return call.query.get("fieldValidation", "Warn")


def _placed(call: Call, obj: Object) -> Object:
    """The object in the namespace of the URL."""
    meta = dict(obj.get("metadata") or {})
    if call.resource.namespaced and meta.setdefault("namespace", call.namespace) != call.namespace:
        raise BadRequest(
            f"the namespace of the provided object does not match the namespace sent on the request: "
            f"{meta['namespace']} and {call.namespace}"
        )
    return {**obj, "metadata": meta}


def _manager(call: Call, operation: str) -> Manager:
    return Manager(call.manager, operation, call.subresource)


def _now(store: Store) -> str:
    return timestamp(store.clock.now())


# deleting


def _delete(store: Store, call: Call) -> Answer:
    options: Object = {**(call.body if isinstance(call.body, dict) else {}), **_query_options(call)}
    names = [call.name] if call.name else None
    if names is None:
        for obj in filter(selects(call), store.list(call.resource, call.namespace)):
            if store.find(call.resource, *reversed(_key(obj))):
                _delete_one(store, call, name_of(obj), namespace_of(obj), options)
        return Answer(success())
    last = _delete_one(store, call, call.name, call.namespace, options)
    if not call.dry_run and store.find(call.resource, call.name, call.namespace):
        return Answer(last)
    details = {"name": call.name, "kind": call.resource.plural, "uid": uid_of(last)}
    return Answer(success(details={**details, "group": call.resource.group} if call.resource.group else details))


def _delete_one(store: Store, call: Call, name: str, namespace: str, options: Object) -> Object:
    orphans = "Orphan" if options.get("orphanDependents") else "Background"
    return store.delete(
        call.resource,
        name,
        namespace,
        propagation=options.get("propagationPolicy") or orphans,
        grace=options.get("gracePeriodSeconds"),
        preconditions=options.get("preconditions"),
        dry_run=call.dry_run or bool(options.get("dryRun")),
    )


def _query_options(call: Call) -> Object:
    options: Object = {}
    if "propagationPolicy" in call.query:
        options["propagationPolicy"] = call.query["propagationPolicy"]
    if "gracePeriodSeconds" in call.query:
        options["gracePeriodSeconds"] = whole(call.query, "gracePeriodSeconds")
    return options


# subresources


def _scale(store: Store, call: Call) -> Answer:
    live = store.get(call.resource, call.name, call.namespace)
    if call.method == "GET":
        return Answer(scale_of(live))
    if call.method not in ("PUT", "PATCH"):
        raise NotAllowed("the server does not allow this method on the requested resource")
    new = tracked(call.resource, live, rescaled(call, live), _manager(call, "Update"), _now(store))
    return Answer(scale_of(store.update(call.resource, new, dry_run=call.dry_run)))


def _post_to_pod(store: Store, call: Call) -> Answer:
    if call.method != "POST":
        raise NotAllowed("the server does not allow this method on the requested resource")
    act = evict if call.subresource == "eviction" else bind
    act(store, call)
    return Answer(success(code=201), 201)
