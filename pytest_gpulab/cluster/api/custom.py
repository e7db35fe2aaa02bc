"""CustomResourceDefinitions: what one declares is served, and it says so."""

from __future__ import annotations

from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.objects import Object, name_of, namespace_of, timestamp
from pytest_gpulab.cluster.resources import BUILT_IN, CUSTOM_RESOURCE_DEFINITION, Resource
from pytest_gpulab.cluster.store import Store


def serve_custom_resources(store: Store) -> None:
    """Serve the kinds that definitions declare, from now on."""

    def on_change(event: Event) -> None:
        if event.type == DELETED:
            _withdraw(store, event.object)
        else:
            _establish(store, event.object)

    store.subscribe(on_change, CUSTOM_RESOURCE_DEFINITION)


def _declared(definition: Object) -> list[Resource]:
    spec, names = definition["spec"], definition["spec"]["names"]
    return [
        Resource(
            spec["group"],
            version["name"],
            names["plural"],
            names["kind"],
            spec.get("scope") == "Namespaced",
            tuple(names.get("shortNames") or ()),
            tuple(version.get("subresources") or ()),
            tuple(names.get("categories") or ()),
            singular_name=names.get("singular", ""),
            custom=True,
        )
        for version in spec.get("versions") or []
        if version.get("served")
    ]


def _establish(store: Store, definition: Object) -> None:
    for resource in _declared(definition):
        store.resources.add(resource)
    if (definition.get("status") or {}).get("conditions"):
        return
    now = timestamp(store.clock.now())
    conditions = [
        {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now}
        for kind, reason, message in (
            ("NamesAccepted", "NoConflicts", "no conflicts found"),
            ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        )
    ]
    spec = definition["spec"]
    stored = [version["name"] for version in spec["versions"] if version.get("storage")]
    status = {"acceptedNames": spec["names"], "storedVersions": stored, "conditions": conditions}
    store.patch_status(CUSTOM_RESOURCE_DEFINITION, name_of(definition), "", status)


def _withdraw(store: Store, definition: Object) -> None:
    for declared in _declared(definition):
        resource = store.resources.at(declared.group, declared.version, declared.plural)
        if resource is None or not _came_from_definition(resource):
            continue
        for obj in store.list(resource):
            store.delete(resource, name_of(obj), namespace_of(obj))
        store.resources.remove(resource)


def _came_from_definition(resource: Resource) -> bool:
    return resource not in BUILT_IN
