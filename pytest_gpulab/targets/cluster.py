"""Targets on a cluster: profiles served by a GPU pool, loaded through the public way in or from inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pytest_gpulab.engine.calibration import find_variant, variant_name
from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.run import Basis, Run
from pytest_gpulab.targets.base import LOADED_FROM, MEASURED_REPEATS, Serving
from pytest_gpulab.targets.loading import Loading

if TYPE_CHECKING:
    from pytest_gpulab.options import Options


class ClusterTarget:
    """The embedded cluster: the manifests, the API and HTTP are real, the model servers are emulated.

    What is served stays up until the session's pool is torn down, so that arms that are compared take turns without
    cold starts between them.
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
        """Whose step costs the emulated servers have, and where the load came from unless from this machine."""
        loaded = "" if self._load_from == "client" else f", loaded from {LOADED_FROM[self._load_from]}"
        return f"emulated by {find_variant(profile)[0].name} {variant_name(profile)}{loaded}"

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        """Have the profile served, and load it. TargetRefused without a calibration, and for a fleet.

        A fleet's cold starts and scaling take minutes of real time a repeat: they are `sim`'s.
        """
        if profile.fleet is not None:
            raise TargetRefused(f"the target {self.name} serves one replica a profile; a fleet is a question for sim")
        try:
            error = find_variant(profile)[1].relative_error
        except ValueError as refusal:
            raise TargetRefused(str(refusal)) from None
        served = self._serving(profile)
        return self._loading.run(
            workload,
            profile,
            seed,
            endpoint=served.endpoint,
            elsewhere=served.pods,
            target=self.name,
            basis=self.basis,
            server=self.server(profile),
            relative_error=error,
        )

    def close(self) -> None:
        """The session's pool ends what it has started."""
