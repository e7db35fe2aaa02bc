"""What every target is to the Lab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, TypeAlias

from pytest_gpulab.aws.billing import Bill, PriceOf
from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.run import Basis, Run

if TYPE_CHECKING:
    from pytest_gpulab.kube.fleet import FleetRun, Observe
    from pytest_gpulab.load.local import Load
    from pytest_gpulab.load.share import Share
    from pytest_gpulab.options import Options

MEASURED_REPEATS = 12
"""The most repeats of a gate on measured targets: their time costs money."""


LOADED_FROM = {"client": "the client machine", "cluster": "inside the cluster"}
"""Where the load of a served profile may be made, by the option's value."""


class Served(NamedTuple):
    """A profile that answers on the session's cluster."""

    endpoint: Endpoint
    bill: Callable[[float, float], Bill] | None = None
    """What the cluster's GPU machines have cost between two moments (Unix seconds); None where nobody pays."""
    prices: str = ""
    """Of these machines, with their source and date."""
    pods: Callable[[Sequence[Share]], Load] | None = None
    """Has shares sent from inside the cluster; None: the load comes from this machine."""


class Tariff(NamedTuple):
    """What a fleet's machines cost, all of them of one type."""

    price_of: PriceOf
    gpus: int
    """Of one machine."""
    prices: str = ""
    """With their source and date; empty where nobody pays."""


Deploying: TypeAlias = "Callable[[Profile, Observe], AbstractContextManager[FleetRun]]"
"""Has a profile's fleet deployed on the session's cluster while a run lasts, from zero GPU nodes and back to zero."""


class Serving(NamedTuple):
    """What the session's cluster does for a target."""

    serve: Callable[[Profile], Served]
    """Has a profile served, or finds it served there already."""
    deploy: Deploying
    tariff: Callable[[], Tariff] | None = None
    """Of its machines, where somebody pays for them."""


class Target(Protocol):
    """Turns a workload, a profile and a seed into a Run."""

    @property
    def name(self) -> str: ...

    @property
    def basis(self) -> Basis: ...

    @property
    def max_repeats(self) -> int:
        """The most repeats a gate may pull: a look of the rule."""

    @property
    def repeatable(self) -> bool:
        """Whether an equal schedule gives an equal Run, so that a repeat with the same arrivals tells nothing."""

    @classmethod
    def from_options(cls, options: Options, tell: Callable[[str], None], serving: Serving) -> Self:
        """The target as the session's options describe it; nothing is started.

        `tell` takes lines for the user; `serving` is for targets on a cluster.

        ValueError: an option that it needs is missing or wrong.
        """

    def server(self, profile: Profile) -> str:
        """What would serve `profile` here, as in `Provenance.server`; empty when nothing here can."""

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        """One execution. TargetRefused when this target cannot serve `profile`."""

    def close(self) -> None:
        """End everything that `run` has started."""
