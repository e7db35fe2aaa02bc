"""Orders to the emulated cloud, which come through the API as everything else does: a ConfigMap.

A real cluster has no such cloud: there nobody reads it, and nobody should apply it.
"""

from __future__ import annotations

from typing import Any, Final

from pytest_gpulab.cluster.durations import PROFILES
from pytest_gpulab.cluster.embedded import EmbeddedCluster
from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.objects import Object, name_of
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import CONFIG_MAP
from pytest_gpulab.fleet import NO_VICTIM, Faults
from pytest_gpulab.render import NAMESPACE

NAME: Final = "emulated-cloud"


def orders(stages: str, faults: Faults) -> dict[str, Any]:
    """The ConfigMap: how long things take (a name in `cluster.durations`), and what goes wrong from now on."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": NAME, "namespace": NAMESPACE},
        "data": {"stages": stages, "faults": faults.model_dump_json()},
    }


def obey(cluster: EmbeddedCluster) -> None:
    """From now on the cluster does what such a ConfigMap says, whenever it changes; Events say what it cannot do."""
    events = Recorder(cluster.store, cluster.clock, NAME)

    def missed(text: str) -> None:
        if (told := cluster.store.find(CONFIG_MAP, NAME, NAMESPACE)) is not None:
            events.warning(told, NO_VICTIM, text)

    cluster.cloud.on_miss.append(missed)

    def heard(event: Event) -> None:
        if name_of(event.object) != NAME or event.type == DELETED:
            return
        try:
            _carry_out(cluster, event.object.get("data") or {})
        except (KeyError, ValueError) as error:
            events.warning(event.object, "InvalidOrders", str(error))

    cluster.store.subscribe(heard, CONFIG_MAP)


def _carry_out(cluster: EmbeddedCluster, data: Object) -> None:
    """KeyError, ValueError: no such stages, or no such faults. What was sold out before is forgotten."""
    faults = Faults.model_validate_json(data["faults"])
    cluster.durations.stages = PROFILES[data["stages"]]
    cluster.unavailable.until.clear()
    cluster.suffer(faults)
