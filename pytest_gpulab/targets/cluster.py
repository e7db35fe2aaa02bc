"""Targets on a cluster: profiles served by a GPU pool, loaded through the public way in or from inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pytest_gpulab.cluster.cloud import SPOT_SHARE, InstanceType, machine_for
from pytest_gpulab.cluster.durations import stages_text
from pytest_gpulab.engine.calibration import costs_text, find_variant
from pytest_gpulab.engine.defaults import scheduler_config
from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.run import Basis, Run
from pytest_gpulab.targets.base import LOADED_FROM, MEASURED_REPEATS, Serving, Tariff
from pytest_gpulab.targets.fleets import loading_refusal, run_fleet
from pytest_gpulab.targets.loading import Loading

if TYPE_CHECKING:
    from pytest_gpulab.options import Options


class ClusterTarget:
    """The embedded cluster: the manifests, the API and HTTP are real, the model servers are emulated.

    What is served stays up until the session's pool is torn down, so that arms that are compared take turns without
    cold starts between them. A fleet is a fresh deployment every time: its cold starts are part of the question.
    """

    name = "cluster"
    basis: Basis = "emulated"
    max_repeats = MEASURED_REPEATS
    repeatable = False

    def __init__(
        self, serving: Serving, log_dir: Path, tell: Callable[[str], None], load_from: str = "client"
    ) -> None:
        self._serving = serving
        self._load_from = load_from
        self._loading = Loading(log_dir / "interrupted", tell)

    @classmethod
    def from_options(cls, options: Options, tell: Callable[[str], None], serving: Serving) -> Self:
        return cls(serving, options.report_dir / cls.name, tell, options.load_from)

    def server(self, profile: Profile) -> str:
        """Whose step costs and cold starts are emulated, and where the load came from unless from this machine."""
        cluster = f", {stages_text(profile.fleet.stages, profile.accelerator)}" if profile.fleet else ""
        loaded = "" if self._load_from == "client" else f", loaded from {LOADED_FROM[self._load_from]}"
        return f"emulated by {costs_text(profile, find_variant(profile)[0])}{cluster}{loaded}"

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        """Have the profile served, or its fleet deployed, and load it. TargetRefused when it cannot be emulated."""
        try:
            calibration, variant = find_variant(profile)
            scheduler_config(profile, calibration.reserved_bytes)
            machine = machine_for(profile.machine, profile.accelerator)
        except ValueError as refusal:
            raise TargetRefused(str(refusal)) from None
        if unloadable := loading_refusal(profile, self._load_from):
            raise TargetRefused(unloadable)
        load = partial(
            self._loading.run,
            workload,
            profile,
            seed,
            target=self.name,
            basis=self.basis,
            server=self.server(profile),
            relative_error=variant.relative_error,
        )
        if profile.fleet is None:
            served = self._serving.serve(profile)
            return load(endpoint=served.endpoint, elsewhere=served.pods)
        return run_fleet(load, profile, self._serving.deploy, _tariff(profile, machine))

    def close(self) -> None:
        """The session's pool ends what it has started."""


def _tariff(profile: Profile, machine: InstanceType) -> Tariff:
    """The emulated cloud's, at the profile's price."""

    def price_of(instance_type: str, capacity_type: str) -> float:
        return profile.price * machine.gpus * (SPOT_SHARE if capacity_type == "spot" else 1.0)

    return Tariff(price_of, machine.gpus)
