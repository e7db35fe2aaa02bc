"""Targets: where a workload runs on a profile. One module each, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from pytest_gpulab.errors import unknown_name
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.targets.base import LOADED_FROM, MEASURED_REPEATS, Served, Serving, Target, Tariff

if TYPE_CHECKING:
    from pytest_gpulab.options import Options
    from pytest_gpulab.run import Basis

__all__ = [
    "LOADED_FROM",
    "Kind",
    "Served",
    "Serving",
    "Target",
    "Tariff",
    "cluster_targets",
    "find_target",
    "kind_of",
    "target_names",
]


class Kind(NamedTuple):
    """What is known of a target before it is imported; its class stands in the module of its name."""

    class_name: str
    basis: Basis
    max_repeats: int
    """The most repeats a gate may pull: a look of the rule."""
    has_campaigns: bool = False
    """Whether runs take real time, so that a session spends no more of it than it was given."""
    has_cluster: bool = False
    """Whether the load can come from pods beside the model."""


_KINDS = {
    "cluster": Kind("ClusterTarget", "emulated", MEASURED_REPEATS, has_campaigns=True, has_cluster=True),
    "eks": Kind("EksTarget", "measured", MEASURED_REPEATS, has_campaigns=True, has_cluster=True),
    "endpoint": Kind("EndpointTarget", "measured", MEASURED_REPEATS, has_campaigns=True),
    "plan": Kind("Plan", "simulated", MEASURED_REPEATS, has_campaigns=True),
    "sim": Kind("Sim", "simulated", 24),
    "vllm": Kind("VllmTarget", "measured", MEASURED_REPEATS, has_campaigns=True),
}


def target_names() -> list[str]:
    """The targets that exist, sorted; not the one that forecasts are made on."""
    return sorted(_KINDS.keys() - {"plan"})


def cluster_targets() -> list[str]:
    """Those whose cluster can make the load, sorted."""
    return sorted(name for name, kind in _KINDS.items() if kind.has_cluster)


def kind_of(name: str) -> Kind:
    """What is known of the target called `name`; ValueError lists the known ones."""
    if name not in _KINDS:
        raise ValueError(unknown_name("target", name, target_names()))
    return _KINDS[name]


def _no_cluster(*_: object) -> NoReturn:
    raise TargetRefused("there is no cluster to serve on")


def find_target(
    name: str,
    options: Options,
    tell: Callable[[str], None] = lambda line: None,
    serving: Serving = Serving(_no_cluster, _no_cluster),  # noqa: B008 (it is immutable)
) -> Target:
    """The target called `name`, as `options` describe it.

    Args:
        tell: takes lines about what it does.
        serving: what the session's cluster does.

    Raises:
        ValueError: an unknown name, or an option that the target needs.
    """
    module = import_module(f"pytest_gpulab.targets.{name}")
    kind: type[Target] = getattr(module, kind_of(name).class_name)
    return kind.from_options(options, tell, serving)
