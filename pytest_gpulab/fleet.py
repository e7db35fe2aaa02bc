"""How a profile is deployed: replicas, their autoscaler, the capacity they run on, and what goes wrong there."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from pytest_gpulab.definition import Definition

Count = Annotated[int, Field(ge=1)]
Moment = Annotated[float, Field(ge=0, allow_inf_nan=False, description="seconds after the run's start")]


Zone = Literal["us-west-2a", "us-west-2b"]
"""Where the emulated cloud has machines."""

KILL_MARGIN_S: Final = 5
"""Seconds from the end of vLLM's drain to SIGKILL."""


class Shortage(Definition):
    """No capacity for what matches, from `start_s` to `end_s` seconds after the run's start.

    "" matches all; without `end_s` it lasts. An instance type must be the profile's own: nothing else is bought.
    """

    capacity_type: Literal["", "reserved", "spot", "on-demand"] = ""
    instance_type: str = ""
    zone: Literal["", Zone] = ""
    start_s: Moment = 0.0
    end_s: Moment | None = None

    @model_validator(mode="after")
    def _ends_after_its_start(self) -> Self:
        if self.end_s is not None and self.end_s <= self.start_s:
            raise ValueError(
                f"end_s must be after start_s, got {self.end_s:g} s after {self.start_s:g} s; leave end_s out for a "
                "shortage that lasts"
            )
        return self


class Faults(Definition):
    """What goes wrong, all of it known before and none of it before warm replicas are ready.

    Times are seconds after the run's start; for a cluster without a run, after the cluster's.
    """

    shortages: tuple[Shortage, ...] = ()
    interruptions: tuple[Moment, ...] = ()
    """When the oldest running spot instance gets its notice."""
    losses: tuple[Moment, ...] = ()
    """When the oldest running instance dies without notice."""
    pod_deletions: tuple[Moment, ...] = ()
    """When somebody deletes the oldest Ready pod."""
    never_register: bool = False
    """Instances boot, but no node joins the cluster."""
    never_allocatable: bool = False
    """Nodes join, but the device plugin never shows a GPU."""
    launch_hangs: bool = False
    """CreateFleet does not answer."""
    bad_images: tuple[str, ...] = ()
    """Images that no registry has."""
    crash_after_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Containers exit with an error so long after their start."""

    @property
    def last_s(self) -> float:
        """When the last of them begins."""
        begins = (shortage.start_s for shortage in self.shortages)
        return max((*begins, *self.interruptions, *self.losses, *self.pod_deletions), default=0.0)


NO_FAULTS: Final = Faults()

NO_VICTIM: Final = "NoVictim"
"""Reason of the Event by which an emulated cloud says that a fault found nothing to harm."""


def no_victim(fault: str, at_s: float, victim: str) -> str:
    """What a run says then: it shows nothing of what the fault would have done.

    Args:
        at_s: seconds after the run's start.
        victim: what there was none of.
    """
    return f"the {fault} at {at_s:.0f} s found no {victim}: nothing went wrong"


def too_late(fault: str, at_s: float) -> str:
    """The same of a fault that was to happen after the run."""
    return f"the {fault} at {at_s:.0f} s did not happen: the run was over before"


class Autoscaling(Definition):
    """A HorizontalPodAutoscaler on the replicas' own pressure.

    `running` scales on requests that run (the engine holds at most ``max_num_seqs`` of them), `active-pressure` on
    running and waiting together. `target` is the average per replica. `scale_down_window_s` None: no ``behavior``,
    the controller's older rules.
    """

    policy: Literal["running", "active-pressure"] = "active-pressure"
    target: Annotated[float, Field(ge=0.001, allow_inf_nan=False)] = 8.0
    """Kubernetes tells thousandths apart."""
    min_replicas: Count = 1
    max_replicas: Count = 4
    scale_down_window_s: Annotated[int, Field(ge=0, le=3600)] | None = None

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas must be at most max_replicas, got {self.min_replicas} > {self.max_replicas}; "
                "raise max_replicas"
            )
        return self

    @property
    def metric(self) -> str:
        """As the adapter names it."""
        return "vllm_requests_running" if self.policy == "running" else "vllm_requests_active"


class Fleet(Definition):
    """How a profile is deployed.

    `warm`: so many replicas are ready when the run starts; 0 starts from zero nodes, and the workload's first second
    is the moment the deployment appears. The autoscaler appears with the run too. As for any new one, the replicas it
    finds are its first recommendation, so those that traffic does not need leave after its scale-down window.
    `pre_stop_s`: how long a pod that is ending keeps serving before SIGTERM; it is killed `grace_s` after that.
    """

    autoscaling: Autoscaling | None = Autoscaling()
    replicas: Count = 1
    """Without autoscaling, which decides that itself."""
    warm: Annotated[int, Field(ge=0)] = 0
    capacity: tuple[Literal["spot", "on-demand"], ...] = Field(("spot", "on-demand"), min_length=1)
    max_gpus: Count = 16
    """At once, of each capacity type: each has a NodePool with a limit of its own."""
    consolidate_after_s: Annotated[int, Field(ge=0)] = 30
    pre_stop_s: Annotated[int, Field(ge=0)] = 0
    grace_s: Annotated[int, Field(ge=0)] = 30
    readiness_period_s: Count = 5
    stages: Literal["g4dn", "g4dn-soci", "p5en", "p5en-soci", "brief"] = "g4dn"
    """How long a cold start takes where the machines are not real: a name in `cluster.durations`.

    g4dn's unless told, whatever the accelerator; runs say whose they are where they are not its own.
    """
    faults: Faults = NO_FAULTS

    @model_validator(mode="after")
    def _one_decides_how_many(self) -> Self:
        if self.autoscaling is not None and self.replicas != 1:
            raise ValueError(
                f"replicas must be left out where an autoscaler decides how many there are, got {self.replicas}; "
                "write autoscaling=None for a fixed number, or Autoscaling(min_replicas=...) for the least"
            )
        return self

    @model_validator(mode="after")
    def _faults_hit_what_is_bought(self) -> Self:
        bought = ", ".join(self.capacity)
        if self.faults.interruptions and "spot" not in self.capacity:
            raise ValueError(
                f"interruptions need spot instances, but capacity is {bought}: nobody would notice; add 'spot', or "
                "take Faults(losses=...)"
            )
        for shortage in self.faults.shortages:
            if shortage.capacity_type not in ("", *self.capacity):
                raise ValueError(
                    f"a shortage must be of capacity that the fleet buys, which is {bought}, got one of "
                    f"{shortage.capacity_type}: nobody would notice; leave it out or change capacity"
                )
        return self

    @model_validator(mode="after")
    def _warm_replicas_can_be(self) -> Self:
        if self.autoscaling is not None and self.warm > self.autoscaling.max_replicas:
            raise ValueError(
                f"warm must be at most max_replicas, got {self.warm} > {self.autoscaling.max_replicas}: the "
                "autoscaler would take them away; raise max_replicas"
            )
        return self

    @property
    def deployed(self) -> int:
        """Replicas of the Deployment before the autoscaler has decided anything."""
        return max(self.autoscaling.min_replicas if self.autoscaling else self.replicas, self.warm)

    @property
    def drain_s(self) -> int:
        """How long after SIGTERM vLLM finishes what it has; then it still has time to end before it is killed."""
        return max(0, self.grace_s - KILL_MARGIN_S)

    @property
    def most_replicas(self) -> int:
        """As many as there can ever be at once."""
        return self.autoscaling.max_replicas if self.autoscaling else self.deployed


FROM_ZERO: Final = Fleet()
WARM_ONE: Final = Fleet(warm=1)
