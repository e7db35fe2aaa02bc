"""The work queue of the controllers."""

from __future__ import annotations

from pytest_gpulab.cluster.clock import EPOCH, VirtualClock
from pytest_gpulab.cluster.errors import Conflict
from pytest_gpulab.cluster.manager import Manager, ref_of
from pytest_gpulab.cluster.resources import CONFIG_MAP
from pytest_gpulab.cluster.store import Store


class Recording:
    """Notes when it was asked for what; the first calls fail."""

    watches = (CONFIG_MAP,)

    def __init__(self, clock, failures=0, again=None):
        self.clock, self.failures, self.again, self.calls = clock, failures, again, []

    def refs(self, event):
        return (ref_of(event),)

    def reconcile(self, ref):
        self.calls.append((round(self.clock.now() - EPOCH, 6), ref[0]))
        if self.failures:
            self.failures -= 1
            raise Conflict("the object has been modified")
        return self.again


def running(failures=0, again=None, existing=()):
    clock = VirtualClock()
    store = Store(clock)
    for name in existing:
        store.create(CONFIG_MAP, {"metadata": {"name": name}}, "default")
    controller, manager = Recording(clock, failures, again), Manager(store, clock)
    manager.add(controller)
    return clock, store, controller, manager


def test_what_exists_is_reconciled_first_and_changes_once():
    clock, store, controller, _ = running(existing=["a"])
    store.create(CONFIG_MAP, {"metadata": {"name": "b"}}, "default")
    store.patch(CONFIG_MAP, "b", "default", {"data": {"x": "1"}})
    clock.run_until(EPOCH + 1)
    assert controller.calls == [(0.0, "a"), (0.0, "b")]


def test_refusals_of_the_api_are_tried_again_with_backoff():
    clock, _, controller, _ = running(failures=4, existing=["a"])
    clock.run_until(EPOCH + 1)
    assert [at for at, _ in controller.calls] == [0.0, 0.005, 0.015, 0.035, 0.075]


def test_a_controller_says_when_to_look_again_and_a_change_is_sooner():
    clock, store, controller, manager = running(again=10.0, existing=["a"])
    clock.run_until(EPOCH + 4)
    store.patch(CONFIG_MAP, "a", "default", {"data": {"x": "1"}})
    clock.run_until(EPOCH + 20)
    assert [at for at, _ in controller.calls] == [0.0, 4.0, 14.0]
    manager.stop()
    clock.run_until(EPOCH + 100)
    assert len(controller.calls) == 3
