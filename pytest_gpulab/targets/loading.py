"""What measured targets share: the client's own limits are known before it measures anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.run import Basis, Run

if TYPE_CHECKING:
    from pytest_gpulab.load import Headroom
    from pytest_gpulab.load.local import Load
    from pytest_gpulab.load.servers import Servers
    from pytest_gpulab.load.share import Share


class Loading:
    """Sends workloads; measures the client's headroom once, before the first.

    Args:
        interrupted_to: folder for what there was of a run that Ctrl-C ended.
        tell: takes a line for the user.
    """

    def __init__(self, interrupted_to: Path, tell: Callable[[str], None]) -> None:
        self._interrupted_to = interrupted_to
        self._tell = tell

    @cached_property
    def headroom(self) -> Headroom:
        """What this client can do on this machine, measured when it is first asked for: no server may be busy."""
        from pytest_gpulab.load import measure_headroom

        self._tell("measuring what this client can send and read")
        found = measure_headroom()
        self._tell(f"one process of this client reads {found.chunks_per_s:,.0f} tokens/s in time")
        return found

    def run(
        self,
        workload: Workload,
        profile: Profile,
        seed: int,
        *,
        endpoint: Endpoint,
        target: str,
        server: str,
        basis: Basis = "measured",
        relative_error: float = 0.0,
        elsewhere: Callable[[Sequence[Share]], Load] | None = None,
        servers: Servers | None = None,
    ) -> Run:
        """A Run of `workload` on `endpoint`. TargetRefused when it is beyond what the client can do.

        `elsewhere` sends from another place, which knows its limits; None: this machine does, within its headroom.
        """
        from pytest_gpulab.load import BeyondHeadroom, run_load

        try:
            return run_load(
                workload,
                endpoint=endpoint,
                profile=profile,
                seed=seed,
                target=target,
                basis=basis,
                server=server,
                relative_error=relative_error,
                progress=self._tell,
                headroom=None if elsewhere else self.headroom,
                elsewhere=elsewhere,
                interrupted_to=self._interrupted_to,
                servers=servers,
            )
        except BeyondHeadroom as refusal:
            raise TargetRefused(str(refusal)) from None
