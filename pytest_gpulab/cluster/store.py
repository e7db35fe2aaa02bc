"""The cluster's objects: what etcd, the API server's registry and the garbage collector do, in one place and at once.

Contract of the dictionaries: an object that the store returned, or that was handed to it, is shared and must never be
changed. To write, build a new object (`objects.edited`, `objects.merged`) or send a patch. So reads cost nothing.

Invariants: `version` grows with every change and is the changed object's resourceVersion; an event is logged for each
change; no object outlives all its owners; nothing is in a namespace that does not exist; time comes from the clock,
names and uids from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Protocol
from uuid import UUID

from pytest_gpulab.cluster import errors
from pytest_gpulab.cluster.defaults import on_create, with_defaults
from pytest_gpulab.cluster.events import ADDED, DELETED, MODIFIED, Event, EventLog, Listener, Watch
from pytest_gpulab.cluster.objects import Object, at, is_deleting, merged, name_of, owners, timestamp, uid_of
from pytest_gpulab.cluster.resources import NAMESPACE, POD, Resource, Resources
from pytest_gpulab.cluster.selectors import field_selector, label_selector

FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"
_NAME_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_SET_ONCE = ("uid", "creationTimestamp", "name", "namespace", "selfLink", "generation")
_SET_BY_DELETE = ("deletionTimestamp", "deletionGracePeriodSeconds")


Objects = list[Object]
Pairs = list[tuple[Resource, Object]]
Events = list[Event]


class Clock(Protocol):
    """Virtual or real time."""

    def now(self) -> float:
        """Seconds since an epoch."""


class Store:
    """All objects of one cluster. Not for several threads."""

    def __init__(
        self,
        clock: Clock,
        *,
        seed: int = 0,
        history: int = 2000,
        namespaces: Iterable[str] = ("default", "kube-system"),
    ) -> None:
        self.clock = clock
        self.resources = Resources()
        self.version = 1000
        """The resourceVersion of the last change."""
        self._random = Random(seed)
        self._objects: dict[Resource, dict[str, dict[str, Object]]] = {}
        self._places: dict[str, tuple[Resource, str, str]] = {}
        self._dependents: dict[str, dict[str, None]] = {}
        self._population: dict[str, int] = {}
        self._log = EventLog(history)
        for name in namespaces:
            self.create(NAMESPACE, {"metadata": {"name": name}})

    # reading

    def find(self, resource: Resource, name: str, namespace: str = "") -> Object | None:
        """The object, None when there is none."""
        return self._objects.get(resource, {}).get(namespace, {}).get(name)

    def get(self, resource: Resource, name: str, namespace: str = "") -> Object:
        """The object; `NotFound` when there is none."""
        found = self.find(resource, name, namespace)
        if found is None:
            raise errors.not_found(resource, name)
        return found

    def list(self, resource: Resource, namespace: str = "", *, labels: str = "", fields: str = "") -> Objects:
        """The objects of a kind, of one namespace or all, in the order of their creation within a namespace."""
        spaces = self._objects.get(resource, {})
        chosen = [spaces.get(namespace, {})] if namespace else spaces.values()
        found = [obj for space in chosen for obj in space.values()]
        if labels:
            matches = label_selector(labels)
            found = [obj for obj in found if matches(obj["metadata"].get("labels") or {})]
        if fields:
            fits = field_selector(fields)
            found = [obj for obj in found if fits(obj)]
        return found

    def by_uid(self, uid: str) -> tuple[Resource, Object] | None:
        """The object with this uid and its kind."""
        place = self._places.get(uid)
        return (place[0], self.get(*place)) if place else None

    def dependents(self, owner: Object) -> Pairs:
        """The objects with an owner reference to this one, oldest first."""
        found = [self.by_uid(uid) for uid in self._dependents.get(uid_of(owner), ())]
        return [pair for pair in found if pair]

    # listening

    def subscribe(self, listener: Listener, *kinds: Resource) -> Callable[[], None]:
        """Call `listener` after each later change (of these kinds), in order. Returns the way to stop."""
        return self._log.subscribe(listener, *kinds)

    def watch(self, resource: Resource, since: int | None = None, wake: Callable[[], None] | None = None) -> Watch:
        """A queue of the kind's changes after version `since` (default: from now on). May raise `Expired`."""
        return Watch(self._log, resource, self.version if since is None else since, wake)

    def events_since(self, resource: Resource, version: int) -> Events:
        """The kind's changes after a version. May raise `Expired`."""
        return self._log.since(resource, version)

    # writing

    def create(self, resource: Resource, obj: Object, namespace: str = "", *, dry_run: bool = False) -> Object:
        """Add an object; its namespace is its own, or the argument. Returns it as stored."""
        new = self._new(resource, obj, namespace)
        if dry_run:
            return new
        stored = self._commit(resource, None, new)
        if owners(stored) and not self._has_owner(stored):
            self._delete_background(resource, stored)
        self._log.tell()
        return stored

    def update(self, resource: Resource, obj: Object, *, dry_run: bool = False) -> Object:
        """Replace an object. With a resourceVersion in it, `Conflict` unless that is still the current one.

        Status stays as it is where the kind has a status subresource. An update that changes nothing is no change.
        """
        old = self.get(resource, name_of(obj), obj["metadata"].get("namespace", ""))
        self._check_preconditions(resource, old, obj["metadata"])
        new = with_defaults(resource, obj)
        if resource.has_status:
            new = {key: value for key, value in new.items() if key != "status"}
            if "status" in old:
                new["status"] = old["status"]
        self._check_immutable(resource, old, new)
        return self._replace(resource, old, new, dry_run)

    def update_status(self, resource: Resource, obj: Object, *, dry_run: bool = False) -> Object:
        """Replace an object's status and nothing else."""
        old = self.get(resource, name_of(obj), obj["metadata"].get("namespace", ""))
        self._check_preconditions(resource, old, obj["metadata"])
        new = {**old, "status": obj.get("status") or {}}
        managed = obj["metadata"].get("managedFields")
        if managed:
            new["metadata"] = {**old["metadata"], "managedFields": managed}
        return self._replace(resource, old, new, dry_run)

    def patch(self, resource: Resource, name: str, namespace: str, patch: Object) -> Object:
        """Lay a merge patch over an object (status aside). A resourceVersion in the patch is a precondition."""
        return self.update(resource, self._patched(resource, name, namespace, patch))

    def patch_status(self, resource: Resource, name: str, namespace: str, status: Object) -> Object:
        """Lay a merge patch over an object's status."""
        return self.update_status(resource, self._patched(resource, name, namespace, {"status": status}))

    def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str = "",
        *,
        propagation: str = "Background",
        grace: int | None = None,
        preconditions: Object | None = None,
        dry_run: bool = False,
    ) -> Object:
        """Delete an object, now or when its finalizers, its dependents, its contents or its kubelet let it go.

        `propagation` is Background, Foreground or Orphan. A pod on a node is only marked; its kubelet ends it with
        `grace=0`. Returns the object's last state.
        """
        obj = self.get(resource, name, namespace)
        self._check_preconditions(resource, obj, preconditions or {})
        if dry_run:
            return obj
        if resource is NAMESPACE:
            obj = self._terminate_namespace(obj)
        elif propagation == "Foreground":
            obj = self._delete_foreground(resource, obj)
        elif propagation == "Orphan":
            obj = self._delete_orphaning(resource, obj)
        else:
            obj = self._delete_background(resource, obj, grace)
        self._log.tell()
        return obj

    def generated_name(self, prefix: str) -> str:
        """A free name as `generateName` gives it."""
        return prefix + "".join(self._random.choices(_NAME_LETTERS, k=5))

    # one object's life

    def _new(self, resource: Resource, obj: Object, namespace: str) -> Object:
        meta = dict(obj.get("metadata") or {})
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = self.generated_name(meta["generateName"])
        name = meta.get("name")
        if not name:
            raise errors.invalid(
                resource,
                "",
                errors.Cause(
                    "metadata.name", "Required value: name or generateName is required", "FieldValueRequired"
                ),
            )
        if resource.namespaced:
            meta["namespace"] = meta.get("namespace") or namespace
            self._check_namespace(resource, name, meta["namespace"])
        else:
            meta.pop("namespace", None)
        if self.find(resource, name, meta.get("namespace", "")) is not None:
            raise errors.already_exists(resource, name)
        for field in (*_SET_BY_DELETE, "resourceVersion", "selfLink"):
            meta.pop(field, None)
        meta["uid"] = str(UUID(int=self._random.getrandbits(128), version=4))
        meta["creationTimestamp"] = timestamp(self.clock.now())
        if "spec" in obj:
            meta["generation"] = 1
        new = {**obj, "apiVersion": resource.api_version, "kind": resource.kind, "metadata": meta}
        if resource.has_status and not self._keeps_first_status(resource):
            new.pop("status", None)
        return on_create(resource, with_defaults(resource, new))

    @staticmethod
    def _keeps_first_status(resource: Resource) -> bool:
        """A kubelet registers its node with a status; all others start without one."""
        return resource.kind == "Node"

    def _check_namespace(self, resource: Resource, name: str, namespace: str) -> None:
        space = self.get(NAMESPACE, namespace)
        if is_deleting(space):
            raise errors.Forbidden(
                f'{resource.qualified} "{name}" is forbidden: unable to create new content in namespace {namespace}'
                " because it is being terminated",
                **errors.about(resource, name),
                causes=[{"reason": "NamespaceTerminating", "message": f"namespace {namespace} is being terminated"}],
            )

    def _check_preconditions(self, resource: Resource, old: Object, wanted: Object) -> None:
        meta = old["metadata"]
        if wanted.get("resourceVersion") not in (None, "", meta["resourceVersion"]):
            raise errors.modified(resource, meta["name"])
        if wanted.get("uid") not in (None, "", meta["uid"]):
            raise errors.conflict(
                resource,
                meta["name"],
                f"Precondition failed: UID in precondition: {wanted['uid']}, UID in object meta: {meta['uid']}",
            )

    def _check_immutable(self, resource: Resource, old: Object, new: Object) -> None:
        for path in resource.immutable:
            if at(old, path) != at(new, path):
                why = "Invalid value: field is immutable"
                raise errors.invalid(resource, name_of(old), errors.Cause(path, why))
        if is_deleting(old):
            had = old["metadata"].get("finalizers") or []
            added = [item for item in new["metadata"].get("finalizers") or [] if item not in had]
            if added:
                why = "Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers"
                cause = errors.Cause("metadata.finalizers", f"{why} {added}", "FieldValueForbidden")
                raise errors.invalid(resource, name_of(old), cause)

    def _replace(self, resource: Resource, old: Object, obj: Object, dry_run: bool) -> Object:
        new = {**obj, "apiVersion": old["apiVersion"], "kind": old["kind"], "metadata": _kept_metadata(old, obj)}
        if new == old:
            return old
        if _spec_changed(old, new) and "generation" in old["metadata"]:
            new["metadata"]["generation"] = old["metadata"]["generation"] + 1
        if dry_run:
            return new
        stored = self._commit(resource, old, new)
        if is_deleting(stored) and resource is not NAMESPACE:
            self._finish(resource, stored)
        self._log.tell()
        return stored

    def _patched(self, resource: Resource, name: str, namespace: str, patch: Object) -> Object:
        patched: Object = merged(self.get(resource, name, namespace), patch)
        if "resourceVersion" not in patch.get("metadata", {}):
            meta = {key: value for key, value in patched["metadata"].items() if key != "resourceVersion"}
            patched["metadata"] = meta
        return patched

    def _commit(self, resource: Resource, old: Object | None, new: Object) -> Object:
        """Store an object under the next version and log it."""
        self.version += 1
        meta = new["metadata"]
        new = {**new, "metadata": {**meta, "resourceVersion": str(self.version)}}
        namespace, name, uid = meta.get("namespace", ""), meta["name"], meta["uid"]
        self._objects.setdefault(resource, {}).setdefault(namespace, {})[name] = new
        if old is None:
            self._places[uid] = (resource, name, namespace)
            self._population[namespace] = self._population.get(namespace, 0) + 1
        if old is None or owners(old) != owners(new):
            self._index_owners(uid, owners(old) if old else [], owners(new))
        self._log.append(Event(self.version, MODIFIED if old else ADDED, resource, new, old))
        return new

    def _index_owners(self, uid: str, before: Iterable[Object], after: Iterable[Object]) -> None:
        for reference in before:
            self._dependents.get(reference["uid"], {}).pop(uid, None)
        for reference in after:
            self._dependents.setdefault(reference["uid"], {})[uid] = None

    # deletion

    def _delete_background(self, resource: Resource, obj: Object, grace: int | None = None) -> Object:
        if resource is POD and (seconds := _grace_seconds(obj, grace)):
            return self._mark(resource, obj, seconds)
        return self._finish(resource, self._mark(resource, obj, 0) if _must_wait(obj) else obj, grace_over=True)

    def _delete_foreground(self, resource: Resource, obj: Object) -> Object:
        obj = self._mark(resource, obj, 0, FOREGROUND)
        for kind, dependent in self._each_dependent(obj):
            if not is_deleting(dependent) and self._only_owner(dependent, obj):
                follow = self._delete_foreground if self.dependents(dependent) else self._delete_background
                follow(kind, dependent)
        left = self.by_uid(uid_of(obj))
        return self._finish(resource, left[1]) if left else obj

    def _delete_orphaning(self, resource: Resource, obj: Object) -> Object:
        for kind, dependent in self._each_dependent(obj):
            self._disown(kind, dependent, obj)
        return self._delete_background(resource, obj)

    def _mark(self, resource: Resource, obj: Object, seconds: int, finalizer: str = "") -> Object:
        """Set the deletion timestamp; a second deletion can only shorten the grace period."""
        meta = obj["metadata"]
        finalizers = list(meta.get("finalizers") or [])
        if finalizer and finalizer not in finalizers:
            finalizers.append(finalizer)
        due = timestamp(self.clock.now() + seconds)
        marked = {**meta, **({"finalizers": finalizers} if finalizers else {})}
        if not is_deleting(obj) or seconds < meta.get("deletionGracePeriodSeconds", 0):
            marked |= {"deletionTimestamp": due, "deletionGracePeriodSeconds": seconds}
        if not is_deleting(obj) and "generation" in meta:
            marked["generation"] = meta["generation"] + 1
        return obj if marked == meta else self._commit(resource, obj, {**obj, "metadata": marked})

    def _finish(self, resource: Resource, obj: Object, *, grace_over: bool = False) -> Object:
        """Remove a deleted object if nothing holds it any more."""
        meta = obj["metadata"]
        waiting = meta.get("finalizers") or []
        if FOREGROUND in waiting and not self._blocked(obj):
            waiting = [item for item in waiting if item != FOREGROUND]
            released = merged(obj, {"metadata": {"finalizers": waiting or None}})
            obj = self._commit(resource, obj, released)
        if waiting or (meta.get("deletionGracePeriodSeconds") and not grace_over):
            return obj
        return self._remove(resource, obj)

    def _blocked(self, owner: Object) -> bool:
        """Whether a dependent that blocks its owner's foreground deletion is left."""
        uid = uid_of(owner)
        return any(
            reference.get("uid") == uid and reference.get("blockOwnerDeletion")
            for _, dependent in self.dependents(owner)
            for reference in owners(dependent)
        )

    def _remove(self, resource: Resource, obj: Object) -> Object:
        meta = obj["metadata"]
        namespace, name, uid = meta.get("namespace", ""), meta["name"], meta["uid"]
        del self._objects[resource][namespace][name]
        del self._places[uid]
        self._population[namespace] -= 1
        self._index_owners(uid, owners(obj), [])
        self.version += 1
        gone = {**obj, "metadata": {**meta, "resourceVersion": str(self.version)}}
        self._log.append(Event(self.version, DELETED, resource, gone, obj))
        self._release_dependents(gone)
        self._release_owners(gone)
        self._release_namespace(namespace)
        return gone

    def _release_dependents(self, owner: Object) -> None:
        """Delete what nobody else owns, and drop the reference from the rest."""
        for kind, dependent in self._each_dependent(owner):
            if self._has_owner(dependent):
                self._disown(kind, dependent, owner)
            elif not is_deleting(dependent):
                self._delete_background(kind, dependent)
        self._dependents.pop(uid_of(owner), None)

    def _release_owners(self, dependent: Object) -> None:
        """Let go the owners whose foreground deletion waited for this object."""
        for reference in owners(dependent):
            found = self.by_uid(reference["uid"])
            if found and is_deleting(found[1]):
                self._finish(*found)

    def _each_dependent(self, owner: Object) -> Iterator[tuple[Resource, Object]]:
        """The dependents one after the other, each as it is by then; what deleting one took along is left out."""
        for uid in list(self._dependents.get(uid_of(owner), ())):
            if found := self.by_uid(uid):
                yield found

    def _has_owner(self, obj: Object) -> bool:
        return any(reference["uid"] in self._places for reference in owners(obj))

    def _only_owner(self, dependent: Object, owner: Object) -> bool:
        """Whether every owner of the dependent that exists is this one or being deleted in the foreground too."""
        found = [self.by_uid(reference["uid"]) for reference in owners(dependent)]
        others = [pair[1] for pair in found if pair and uid_of(pair[1]) != uid_of(owner)]
        return all(FOREGROUND in (other["metadata"].get("finalizers") or []) for other in others)

    def _disown(self, resource: Resource, dependent: Object, owner: Object) -> None:
        left = [reference for reference in owners(dependent) if reference["uid"] != uid_of(owner)]
        patch = {"metadata": {"ownerReferences": left or None}}
        self._commit(resource, dependent, merged(dependent, patch))

    # namespaces

    def _terminate_namespace(self, space: Object) -> Object:
        if not is_deleting(space):
            now = timestamp(self.clock.now())
            patch = {"metadata": {"deletionTimestamp": now}, "status": {"phase": "Terminating"}}
            space = self._commit(NAMESPACE, space, merged(space, patch))
        name = name_of(space)
        for resource in [kind for kind in self._objects if kind.namespaced]:
            for obj in self.list(resource, name):
                current = self.by_uid(uid_of(obj))
                if current and not is_deleting(current[1]):
                    self._delete_background(resource, current[1])
        self._release_namespace(name)
        return self.find(NAMESPACE, name) or space

    def _release_namespace(self, name: str) -> None:
        """Remove a terminating namespace once it is empty and has no finalizers of its own."""
        space = self.find(NAMESPACE, name) if name else None
        if space is None or not is_deleting(space) or self._population.get(name):
            return
        if not space["metadata"].get("finalizers"):
            self._remove(NAMESPACE, space)


def _must_wait(obj: Object) -> bool:
    return bool(obj["metadata"].get("finalizers"))


def _grace_seconds(pod: Object, wanted: int | None) -> int:
    """How long a pod may take to end: nothing when no kubelet runs it."""
    if not pod["spec"].get("nodeName") or at(pod, "status.phase") in ("Succeeded", "Failed"):
        return 0
    default: int = pod["spec"].get("terminationGracePeriodSeconds", 30)
    seconds = default if wanted is None else wanted
    running: int = pod["metadata"].get("deletionGracePeriodSeconds", seconds)
    return min(seconds, running)


def _kept_metadata(old: Object, new: Object) -> Object:
    """The new metadata, with what clients cannot change as it was."""
    before, meta = old["metadata"], dict(new["metadata"])
    for field in (*_SET_ONCE, *_SET_BY_DELETE, "resourceVersion"):
        if field in before:
            meta[field] = before[field]
        else:
            meta.pop(field, None)
    return {key: value for key, value in meta.items() if value not in (None, {}, [])}


def _spec_changed(old: Object, new: Object) -> bool:
    """Whether anything but metadata and status differs."""
    fields = (old.keys() | new.keys()) - {"metadata", "status"}
    return any(old.get(field) != new.get(field) for field in fields)
