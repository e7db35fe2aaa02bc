"""The store against what Kubernetes promises of its objects."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pytest_gpulab.cluster import errors
from pytest_gpulab.cluster.events import DELETED
from pytest_gpulab.cluster.objects import Object, edited, owner_reference
from pytest_gpulab.cluster.resources import CONFIG_MAP, DEPLOYMENT, NAMESPACE, NODE, POD, REPLICA_SET, Resource
from pytest_gpulab.cluster.store import Store
from tests.cluster.serving import StillClock


@pytest.fixture
def clock() -> StillClock:
    return StillClock()


@pytest.fixture
def store(clock: StillClock) -> Store:
    return Store(clock)


def workload(name: str, **meta: Any) -> Object:
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}}
    spec = {"selector": {"matchLabels": labels}, "template": template}
    return {"metadata": {"name": name, **meta}, "spec": spec}


def pod(name: str, node: str = "", **meta: Any) -> Object:
    spec: Object = {"containers": [{"name": "c", "image": "i:1"}]}
    return {"metadata": {"name": name, **meta}, "spec": {**spec, "nodeName": node} if node else spec}


def config(name: str, **meta: Any) -> Object:
    return {"metadata": {"name": name, **meta}, "data": {"a": "1"}}


def test_a_new_object_gets_its_identity_from_the_clock_and_the_seed(clock: StillClock) -> None:
    first, second, other = (Store(clock, seed=seed).create(POD, pod("a"), "default") for seed in (1, 1, 2))
    assert first == second
    assert first["metadata"]["uid"] != other["metadata"]["uid"]
    assert first["metadata"]["creationTimestamp"] == "2026-01-01T00:00:00Z"
    assert first["metadata"]["generation"] == 1
    assert first["status"]["phase"] == "Pending"


def test_generated_names(store: Store) -> None:
    names = {store.create(POD, {**pod(""), "metadata": {"generateName": "a-"}}, "default")["metadata"]["name"]
             for _ in range(20)}  # fmt: skip
    assert len(names) == 20 and all(name.startswith("a-") and len(name) == 7 for name in names)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda s: s.get(POD, "x", "default"), errors.NotFound, 'pods "x" not found'),
        (lambda s: s.get(DEPLOYMENT, "x", "default"), errors.NotFound, 'deployments.apps "x" not found'),
        (lambda s: s.create(POD, pod("a"), "nowhere"), errors.NotFound, 'namespaces "nowhere" not found'),
        (lambda s: s.create(NODE, {"metadata": {}}), errors.Invalid, "metadata.name: Required value"),
        (lambda s: s.create(NAMESPACE, {"metadata": {"name": "default"}}), errors.AlreadyExists, "already exists"),
        (lambda s: s.list(POD, labels="a b"), errors.BadRequest, "unable to parse requirement"),
    ],
)
def test_refusals(store: Store, act: Any, error: type[errors.ApiError], message: str) -> None:
    with pytest.raises(error, match=message):
        act(store)


def test_an_old_version_conflicts_and_none_does_not(store: Store) -> None:
    old = store.create(CONFIG_MAP, config("a"), "default")
    store.patch(CONFIG_MAP, "a", "default", {"data": {"a": "2"}})
    with pytest.raises(errors.Conflict, match="the object has been modified"):
        store.update(CONFIG_MAP, {**old, "data": {"a": "3"}})
    meta = {"name": "a", "namespace": "default"}
    assert store.update(CONFIG_MAP, {"metadata": meta, "data": {"a": "4"}})["data"] == {"a": "4"}


def test_status_and_spec_are_written_apart(store: Store) -> None:
    made = store.create(DEPLOYMENT, {**workload("a"), "status": {"replicas": 9}}, "default")
    assert made["status"] == {}
    status = store.patch_status(DEPLOYMENT, "a", "default", {"replicas": 1})
    assert status["metadata"]["generation"] == 1
    both = store.update(
        DEPLOYMENT, {**edited(status), "status": {"replicas": 7}, "spec": {**status["spec"], "replicas": 5}}
    )
    assert (both["status"], both["spec"]["replicas"], both["metadata"]["generation"]) == ({"replicas": 1}, 5, 2)
    late = store.update_status(DEPLOYMENT, {**edited(both), "spec": {}, "status": {"replicas": 5}})
    assert (late["status"], late["spec"]) == ({"replicas": 5}, both["spec"])


def test_an_update_that_changes_nothing_is_no_change(store: Store) -> None:
    made = store.create(DEPLOYMENT, workload("a"), "default")
    assert store.update(DEPLOYMENT, edited(made)) is made
    assert store.version == int(made["metadata"]["resourceVersion"])


def test_dry_run_stores_nothing(store: Store) -> None:
    version = store.version
    assert store.create(POD, pod("a"), "default", dry_run=True)["status"]["phase"] == "Pending"
    assert store.find(POD, "a", "default") is None and store.version == version


def test_immutable_fields(store: Store) -> None:
    store.create(DEPLOYMENT, workload("a"), "default")
    with pytest.raises(errors.Invalid, match=r"spec\.selector: Invalid value: field is immutable"):
        store.patch(DEPLOYMENT, "a", "default", {"spec": {"selector": {"matchLabels": {"app": "b"}}}})


def test_finalizers_hold_an_object(store: Store) -> None:
    store.create(CONFIG_MAP, config("a", finalizers=["x/y"]), "default")
    held = store.delete(CONFIG_MAP, "a", "default")
    assert held["metadata"]["deletionTimestamp"] == "2026-01-01T00:00:00Z"
    with pytest.raises(errors.Invalid, match="no new finalizers can be added"):
        store.patch(CONFIG_MAP, "a", "default", {"metadata": {"finalizers": ["x/y", "z"]}})
    store.patch(CONFIG_MAP, "a", "default", {"metadata": {"finalizers": None}})
    assert store.find(CONFIG_MAP, "a", "default") is None


def test_a_pod_on_a_node_ends_when_its_kubelet_says_so(store: Store, clock: StillClock) -> None:
    store.create(POD, pod("free"), "default")
    store.delete(POD, "free", "default")
    assert store.find(POD, "free", "default") is None
    store.create(POD, pod("bound", "n1"), "default")
    marked = store.delete(POD, "bound", "default")
    assert marked["metadata"]["deletionTimestamp"] == "2026-01-01T00:00:30Z"
    again = store.delete(POD, "bound", "default", grace=60)
    assert again["metadata"]["deletionGracePeriodSeconds"] == 30
    shorter = store.delete(POD, "bound", "default", grace=5)
    assert shorter["metadata"]["deletionTimestamp"] == "2026-01-01T00:00:05Z"
    store.delete(POD, "bound", "default", grace=0)
    assert store.find(POD, "bound", "default") is None


def family(store: Store, **child: Any) -> None:
    """A deployment that owns a replica set that owns a pod."""
    top = store.create(DEPLOYMENT, workload("top"), "default")
    middle = store.create(REPLICA_SET, workload("middle", ownerReferences=[owner_reference(top)]), "default")
    store.create(POD, pod("low", ownerReferences=[owner_reference(middle)], **child), "default")


def test_background_deletion_takes_dependents_along(store: Store) -> None:
    family(store)
    store.delete(DEPLOYMENT, "top", "default")
    assert not store.list(DEPLOYMENT) + store.list(REPLICA_SET) + store.list(POD)


def test_foreground_deletion_ends_the_owner_last(store: Store) -> None:
    family(store, finalizers=["x/y"])
    gone: list[str] = []
    store.subscribe(lambda event: gone.append(event.object["kind"]) if event.type == DELETED else None)
    top = store.delete(DEPLOYMENT, "top", "default", propagation="Foreground")
    assert top["metadata"]["finalizers"] == ["foregroundDeletion"] and not gone
    store.patch(POD, "low", "default", {"metadata": {"finalizers": None}})
    assert gone == ["Pod", "ReplicaSet", "Deployment"]


def test_orphaning_deletion_leaves_dependents_without_the_reference(store: Store) -> None:
    family(store)
    store.delete(DEPLOYMENT, "top", "default", propagation="Orphan")
    assert "ownerReferences" not in store.get(REPLICA_SET, "middle", "default")["metadata"]
    assert store.find(POD, "low", "default")


def test_a_dependent_with_another_owner_stays(store: Store) -> None:
    one, two = (store.create(CONFIG_MAP, config(name), "default") for name in ("one", "two"))
    references = [owner_reference(one), owner_reference(two, controller=False)]
    store.create(CONFIG_MAP, config("child", ownerReferences=references), "default")
    store.delete(CONFIG_MAP, "one", "default")
    left = store.get(CONFIG_MAP, "child", "default")["metadata"]["ownerReferences"]
    assert [reference["name"] for reference in left] == ["two"]


def test_an_object_born_after_its_owner_died_is_collected(store: Store) -> None:
    owner = store.create(CONFIG_MAP, config("owner"), "default")
    store.delete(CONFIG_MAP, "owner", "default")
    store.create(CONFIG_MAP, config("late", ownerReferences=[owner_reference(owner)]), "default")
    assert store.find(CONFIG_MAP, "late", "default") is None


def test_a_namespace_ends_when_it_is_empty(store: Store) -> None:
    store.create(NAMESPACE, {"metadata": {"name": "lab"}})
    store.create(CONFIG_MAP, config("held", finalizers=["x/y"]), "lab")
    store.create(CONFIG_MAP, config("free"), "lab")
    assert store.delete(NAMESPACE, "lab")["status"]["phase"] == "Terminating"
    assert [obj["metadata"]["name"] for obj in store.list(CONFIG_MAP, "lab")] == ["held"]
    with pytest.raises(errors.Forbidden, match="because it is being terminated"):
        store.create(CONFIG_MAP, config("new"), "lab")
    store.patch(CONFIG_MAP, "held", "lab", {"metadata": {"finalizers": None}})
    assert store.find(NAMESPACE, "lab") is None


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("app=a", "a"),
        ("app!=a", "bc"),
        ("app in (a, b)", "ab"),
        ("app notin (a,b)", "c"),
        ("gpu", "b"),
        ("!gpu,app", "a"),
        ("app==a,gpu", ""),
        ("", "abc"),
    ],
)
def test_label_selectors(store: Store, selector: str, expected: str) -> None:
    for name, labels in {"a": {"app": "a"}, "b": {"app": "b", "gpu": ""}, "c": {}}.items():
        store.create(CONFIG_MAP, config(name, labels=labels), "default")
    assert "".join(obj["metadata"]["name"] for obj in store.list(CONFIG_MAP, labels=selector)) == expected


def test_field_selectors(store: Store) -> None:
    store.create(POD, pod("a", "n1"), "default")
    store.create(POD, pod("b"), "default")
    found = store.list(POD, "default", fields="spec.nodeName!=,status.phase=Pending")
    assert [obj["metadata"]["name"] for obj in found] == ["a"]


def test_a_watch_that_starts_before_the_log_is_expired(clock: StillClock) -> None:
    store = Store(clock, history=3)
    start = store.version
    for name in "abcd":
        store.create(CONFIG_MAP, config(name), "default")
    with pytest.raises(errors.Expired, match="too old resource version"):
        store.watch(CONFIG_MAP, start)
    assert len(store.watch(CONFIG_MAP, start + 1).drain()) == 3


def test_listeners_hear_everything_in_order_even_what_they_cause(store: Store) -> None:
    heard: list[tuple[str, int]] = []

    def react(event: Any) -> None:
        heard.append(("first", event.version))
        if event.object["metadata"]["name"] == "a":
            store.create(CONFIG_MAP, config("b"), "default")

    store.subscribe(react, CONFIG_MAP)
    stop = store.subscribe(lambda event: heard.append(("second", event.version)))
    start = store.version
    store.create(CONFIG_MAP, config("a"), "default")
    assert heard == [("first", start + 1), ("second", start + 1), ("first", start + 2), ("second", start + 2)]
    stop()
    store.create(CONFIG_MAP, config("c"), "default")
    assert heard[-1] == ("first", start + 3)


KINDS: tuple[Resource, ...] = (CONFIG_MAP, REPLICA_SET, POD)
NAMES = st.sampled_from("abc")
SPACES = st.sampled_from(["default", "lab"])


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of writes: versions grow, watches replay the state, nobody is orphaned, finalizers hold."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(StillClock(), seed=3)
        self.version = self.store.version
        self.seen: list[int] = []
        self.images: dict[int, dict[str, Object]] = {}
        self.store.subscribe(lambda event: self.seen.append(event.version))
        self.watch = {kind: self.store.watch(kind) for kind in KINDS}
        self.replayed: dict[Resource, dict[str, Object]] = {kind: {} for kind in KINDS}

    def objects(self) -> list[tuple[Resource, Object]]:
        return [(kind, obj) for kind in KINDS for obj in self.store.list(kind)]

    @rule()
    def make_namespace(self) -> None:
        if self.store.find(NAMESPACE, "lab") is None:
            self.store.create(NAMESPACE, {"metadata": {"name": "lab"}})

    @rule()
    def end_namespace(self) -> None:
        if self.store.find(NAMESPACE, "lab"):
            self.store.delete(NAMESPACE, "lab")

    @rule(
        kind=st.sampled_from(KINDS),
        name=NAMES,
        space=SPACES,
        held=st.booleans(),
        owned=st.integers(0, 3),
        node=st.booleans(),
    )
    def create(self, kind: Resource, name: str, space: str, held: bool, owned: int, node: bool) -> None:
        owners = [obj for _, obj in self.objects() if obj["metadata"]["namespace"] == space][:owned]
        meta: Object = {"finalizers": ["x/y"]} if held else {}
        if owners:
            meta["ownerReferences"] = [owner_reference(owner, controller=False) for owner in owners]
        body = {CONFIG_MAP: config, REPLICA_SET: workload, POD: pod}[kind](name, **meta)
        if kind is POD and node:
            body["spec"]["nodeName"] = "n1"
        taken = self.store.find(kind, name, space)
        try:
            self.store.create(kind, body, space)
        except errors.AlreadyExists:
            assert taken
        except (errors.NotFound, errors.Forbidden):
            lab = self.store.find(NAMESPACE, space)
            assert lab is None or lab["metadata"].get("deletionTimestamp")

    @precondition(lambda self: self.objects())
    @rule(data=st.data(), value=st.integers(0, 3))
    def change(self, data: st.DataObject, value: int) -> None:
        kind, obj = data.draw(st.sampled_from(self.objects()))
        before = edited(obj)
        meta = obj["metadata"]
        self.store.patch(kind, meta["name"], meta["namespace"], {"metadata": {"labels": {"v": str(value)}}})
        assert obj == before, "a write changed an object that was handed out"
        if self.store.find(kind, meta["name"], meta["namespace"]) is not obj:
            with pytest.raises(errors.Conflict):
                self.store.update(kind, obj)

    @precondition(lambda self: self.objects())
    @rule(
        data=st.data(), how=st.sampled_from(["Background", "Foreground", "Orphan"]), grace=st.sampled_from([None, 0])
    )
    def delete(self, data: st.DataObject, how: str, grace: int | None) -> None:
        kind, obj = data.draw(st.sampled_from(self.objects()))
        meta = obj["metadata"]
        self.store.delete(kind, meta["name"], meta["namespace"], propagation=how, grace=grace)
        if "x/y" in meta.get("finalizers", []):
            assert self.store.get(kind, meta["name"], meta["namespace"])["metadata"]["deletionTimestamp"]

    @precondition(lambda self: self.objects())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        kind, obj = data.draw(st.sampled_from(self.objects()))
        meta = obj["metadata"]
        left = [item for item in meta.get("finalizers", []) if item != "x/y"]
        self.store.patch(kind, meta["name"], meta["namespace"], {"metadata": {"finalizers": left or None}})

    @invariant()
    def versions_strictly_increase(self) -> None:
        assert self.seen == sorted(set(self.seen))
        assert not self.seen or self.seen[-1] == self.store.version

    @invariant()
    def a_watch_from_any_version_replays_the_state(self) -> None:
        for kind in KINDS:
            state = {obj["metadata"]["uid"]: obj for obj in self.store.list(kind)}
            for event in self.watch[kind].drain():
                _play(self.replayed[kind], event.type, event.object)
            assert self.replayed[kind] == state
        self.images[self.store.version] = {obj["metadata"]["uid"]: obj for obj in self.store.list(POD)}
        for version, image in self.images.items():
            later = dict(image)
            for event in self.store.events_since(POD, version):
                _play(later, event.type, event.object)
            assert later == self.images[self.store.version]

    @invariant()
    def nobody_is_orphaned_and_nothing_waits_for_nothing(self) -> None:
        alive = {obj["metadata"]["uid"] for _, obj in self.objects()}
        for _, obj in self.objects():
            meta = obj["metadata"]
            owners = [reference["uid"] for reference in meta.get("ownerReferences", [])]
            assert not owners or meta.get("deletionTimestamp") or alive & set(owners)
            assert self.store.find(NAMESPACE, meta["namespace"])
            if meta.get("deletionTimestamp"):
                assert meta.get("finalizers") or meta.get("deletionGracePeriodSeconds")
        lab = self.store.find(NAMESPACE, "lab")
        if lab and lab["metadata"].get("deletionTimestamp"):
            assert any(obj["metadata"]["namespace"] == "lab" for _, obj in self.objects())


def _play(state: dict[str, Object], kind: str, obj: Object) -> None:
    uid = obj["metadata"]["uid"]
    if kind == DELETED:
        del state[uid]
    else:
        assert (uid in state) == (kind == "MODIFIED")
        state[uid] = obj


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
