"""Autoscaled serving in virtual time: the embedded cluster's controllers around simulated model servers.

Every pod whose server is up is a `Replica`; the edge sends requests to Ready endpoints; Prometheus scrapes the
replicas and the autoscaler acts on that. An hour takes about half a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.cluster.clock import VirtualClock
from pytest_gpulab.cluster.cloud import Offering, catalog, machine_for
from pytest_gpulab.cluster.conditions import is_true
from pytest_gpulab.cluster.durations import PROFILES, stages_text
from pytest_gpulab.cluster.edge import Client, Edge, LimitedClient, OpenClient
from pytest_gpulab.cluster.embedded import DeadlineExceeded, EmbeddedCluster
from pytest_gpulab.cluster.metrics import RUNNING, WAITING
from pytest_gpulab.cluster.objects import Object, name_of, uid_of
from pytest_gpulab.cluster.replica import Ledger, Replica
from pytest_gpulab.cluster.resources import DEPLOYMENT, HPA, NODE, NODE_CLAIM, NODE_POOL, POD, Resource, Resources
from pytest_gpulab.cluster.service import ready_pods
from pytest_gpulab.cluster.timeline import Timeline
from pytest_gpulab.engine.calibration import costs_text, find_variant
from pytest_gpulab.engine.jumping import NeedsStepping
from pytest_gpulab.engine.outcome import totals
from pytest_gpulab.engine.scheduler import EngineRefused
from pytest_gpulab.engine.simulation import definition_hash, make_plan
from pytest_gpulab.experiment import ClosedLoop, Direct, Profile, Workload, require_servable
from pytest_gpulab.fleet import NO_FAULTS, Fleet, too_late
from pytest_gpulab.render import NAMESPACE, documents, gpu_capacity, serving_name, serving_objects
from pytest_gpulab.run import REQUEST_DTYPE, SERVER_DTYPE, Provenance, Run, end_of_run, offered_problems

RUN: Final = "virtual"
"""Labels what is applied; nobody else sees it."""
DEADLINE_S: Final = 1800.0
"""The lab's own: for warm replicas before a run, and for zero nodes after it."""
_KINDS: Final = Resources()


class FleetRefused(ValueError):
    """This cannot be simulated as a fleet; the message says why and what to do."""


def simulate_fleet(profile: Profile, workload: Workload, *, seed: int = 0) -> Run:
    """One run of `workload` on `profile` as its fleet deploys it. The same definitions and seed give the same run.

    Raises:
        ValueError: the profile has no fleet, and what `engine.simulate` refuses.
        FleetRefused: workloads with a closed loop or a timeout, engine arguments that need the exact scheduler or
            that no engine starts with, and warm replicas that do not become ready.
    """
    if profile.fleet is None:
        raise ValueError("a fleet must be given, got a profile without; write profile.on(Fleet(...))")
    require_servable(workload, profile)
    if isinstance(workload.arrivals, ClosedLoop) or workload.timeout_s is not None:
        raise FleetRefused("a fleet serves open arrivals without a timeout; leave timeout_s out and give a rate")
    try:
        return _Simulation(profile, workload, profile.fleet, seed).run()
    except (EngineRefused, NeedsStepping, DeadlineExceeded) as refusal:
        raise FleetRefused(str(refusal)) from refusal


class _Simulation:
    """One run. Times are seconds from its start, except the clock's."""

    def __init__(self, profile: Profile, workload: Workload, fleet: Fleet, seed: int) -> None:
        self._profile, self._workload, self._fleet, self._seed = profile, workload, fleet, seed
        self._calibration, self._variant = find_variant(profile)
        self._plan = make_plan(profile, workload, self._calibration, self._variant, seed)
        self._ledger = Ledger(self._plan)
        self._name = serving_name(profile)
        objects = serving_objects(profile, fleet, run=RUN, api_key=RUN)
        self._autoscaler = [obj for obj in objects if obj["kind"] == HPA.kind]
        self._serving = [obj for obj in objects if obj["kind"] != HPA.kind]
        self._clock = VirtualClock()
        self._start = self._clock.now()
        self._cluster = EmbeddedCluster(
            self._clock,
            seed=seed,
            stages=PROFILES[fleet.stages],
            offerings=_offerings(profile),
            faults=NO_FAULTS if fleet.warm else fleet.faults,
            read=self._read,
        )
        self._timeline = Timeline(self._cluster.store, self._clock, self._start)
        self._edge = Edge()
        self._limited = not (isinstance(workload.admission, Direct) and workload.admission.max_outstanding is None)
        due = self._plan.scheduled()
        self._client: Client = (
            LimitedClient(due, self._edge, workload.admission) if self._limited else OpenClient(due, self._edge)
        )
        self._up: dict[str, Replica] = {}
        self._gone: list[Replica] = []
        self._drained_by: dict[str, float] = {}
        self._lost_at = 0.0
        self._missed: list[str] = []
        self._cluster.cloud.on_miss.append(self._missed.append)
        hooks = self._cluster.kubelets.hooks
        hooks.healthy.append(self._server_up)
        hooks.terminated.append(self._server_told_to_end)
        hooks.stopped.append(self._server_gone)
        hooks.drains = self._drains

    # what the cluster asks

    def _now(self) -> float:
        return self._clock.now() - self._start

    def _read(self, pod: Object) -> dict[str, float] | None:
        """/metrics of a pod."""
        replica = self._up.get(uid_of(pod))
        if replica is None:
            return None
        replica.advance(self._now())
        return {RUNNING: replica.running, WAITING: replica.waiting}

    def _server_up(self, pod: Object) -> None:
        replica = Replica(self._plan, self._ledger, self._now(), report=self._limited)
        self._up[uid_of(pod)] = replica
        self._edge.live.append(replica)

    def _server_told_to_end(self, pod: Object) -> None:
        self._drained_by[uid_of(pod)] = self._now() + self._fleet.drain_s

    def _drains(self, pod: Object) -> bool:
        """Whether its server still finishes what it has, as vLLM does for its ``--shutdown-timeout``."""
        replica = self._up.get(uid_of(pod))
        if replica is None or self._now() >= self._drained_by[uid_of(pod)]:
            return False
        replica.advance(self._now())
        return replica.busy

    def _server_gone(self, pod: Object) -> None:
        replica = self._up.pop(uid_of(pod), None)
        if replica is None:
            return
        lost = replica.kill(self._now())
        self._lost_at = self._now() if lost else self._lost_at
        self._edge.live.remove(replica)
        if isinstance(self._client, LimitedClient):
            self._client.collect(replica)
        self._client.lost(lost, self._now())
        self._gone.append(replica)
        self._route()

    def _route(self) -> None:
        """Requests go where the Service's endpoints are."""
        endpoints = [self._up.get(uid) for uid in self._ready_pods()]
        if endpoints != self._edge.endpoints:
            self._edge.endpoints = endpoints
            self._client.endpoints_changed(self._now())

    # the run

    def run(self) -> Run:
        """Deploy, serve, tear down."""
        self._deploy()
        if self._fleet.warm:
            self._warm_up()
        self._scale()
        limit = (self._workload.duration_s or 0.0) + max(self._plan.scheduled(), default=0.0) + DEADLINE_S
        while self._unfinished() and self._now() < limit:
            until = min(self._clock.next_at - self._start, limit)
            if not self._client.waits and self._now() >= (self._workload.duration_s or 0.0):
                self._edge.advance(until)
            self._client.act(until)
            self._clock.run_until(self._start + until)
            self._route()
        ended, problems = self._ended(), [*self._missed, *self._still_to_come()]
        left = self._tear_down()
        if left:
            problems.append(f"{left} NodeClaims were left {DEADLINE_S:.0f} s after teardown began")
        return self._evidence(ended, problems)

    def _deploy(self) -> None:
        """Apply the manifests that a real cluster gets; an autoscaled Deployment does not say how many at first."""
        capacity = gpu_capacity(self._fleet, [self._profile.machine], run=RUN)
        self._apply(*documents("00-namespace"), *capacity, *self._serving)
        self._cluster.store.patch(DEPLOYMENT, self._name, NAMESPACE, {"spec": {"replicas": self._fleet.deployed}})

    def _scale(self) -> None:
        """From now on the replicas are the autoscaler's business, if there is one.

        Not before the run: it would see idle replicas next to those that are still loading, and take these away.
        """
        self._apply(*self._autoscaler)

    def _apply(self, *objects: Object) -> None:
        for obj in objects:
            self._cluster.apply(_kind_of(obj), obj)

    def _ready_pods(self) -> list[str]:
        return ready_pods(self._cluster.store, self._name, NAMESPACE)

    def _warm_up(self) -> None:
        """Run time starts when the warm replicas are ready. Nothing goes wrong before, so they come if they may."""
        fleet = self._fleet
        self._cluster.wait(
            f"{fleet.warm} warm replicas must get ready, with max_gpus={fleet.max_gpus}: raise it or lower warm",
            lambda: len(self._ready_pods()) >= fleet.warm,
            DEADLINE_S,
            lambda: tuple(pod for pod in self._cluster.store.list(POD) if not is_true(pod, "Ready")),
        )
        self._start = self._timeline.start = self._clock.now()
        self._cluster.suffer(self._fleet.faults)
        for uid in list(self._up):
            self._edge.live.remove(self._up[uid])
            self._up[uid] = Replica(self._plan, self._ledger, 0.0, report=self._limited)
            self._edge.live.append(self._up[uid])
        self._route()

    def _unfinished(self) -> bool:
        return (
            self._now() < (self._workload.duration_s or 0.0)
            or self._client.waits
            or any(replica.busy for replica in self._edge.live)
        )

    def _ended(self) -> float:
        """When the last request was answered or lost with its server, or arrived, or the stated duration ends."""
        answered = (at for at in self._ledger.last_token if at == at)
        last = max(answered, default=0.0)
        return end_of_run(self._plan.schedule, max(last, self._lost_at), self._workload.duration_s)

    def _still_to_come(self) -> Iterator[str]:
        """Faults that the run was too short for."""
        faults = self._fleet.faults
        for fault, moments in (
            ("interruption", faults.interruptions),
            ("loss", faults.losses),
            ("pod deletion", faults.pod_deletions),
        ):
            yield from (too_late(fault, moment) for moment in moments if moment > self._now())

    def _tear_down(self) -> int:
        """Delete what was applied, workloads first; NodeClaims that are left at the deadline.

        The pools go too: Karpenter leaves a node that never got its GPU alone.
        """
        store = self._cluster.store
        for obj in reversed([*self._serving, *self._autoscaler]):
            store.delete(_kind_of(obj), name_of(obj), NAMESPACE)
        for pool in store.list(NODE_POOL):
            store.delete(NODE_POOL, name_of(pool))
        try:
            self._cluster.wait(
                "zero GPU nodes",
                lambda: not store.list(NODE) and not store.list(NODE_CLAIM),
                DEADLINE_S,
                lambda: (*store.list(NODE_CLAIM), *store.list(NODE)),
            )
        except DeadlineExceeded:
            return len(store.list(NODE_CLAIM))
        return 0

    # what remains of it

    def _bill(self) -> dict[str, float]:
        """What the machines cost from the run's start to the end of the last one, and how long they were of use."""
        gpu_s = usd = 0.0
        for instance in self._cluster.cloud.instances.values():
            end = self._clock.now() if instance.stopped is None else instance.stopped
            seconds = max(0.0, end - max(instance.launched, self._start))
            gpu_s += seconds * instance.offering.type.gpus
            usd += seconds / 3600 * instance.offering.price
        busy = sum(sample[0] > 0 for replica in self._replicas() for sample in replica.samples)
        return {"gpu_seconds": gpu_s, "gpu_busy_seconds": float(busy), "cost_usd": usd}

    def _evidence(self, ended: float, problems: list[str]) -> Run:
        stages = stages_text(self._fleet.stages, self._profile.accelerator)
        requests = self._request_table()
        return Run(
            requests=requests,
            server=self._server_table(ended),
            totals={**self._totals(), **self._bill()},
            duration_s=ended,
            provenance=Provenance(
                target="sim",
                basis="simulated",
                seed=self._seed,
                definition_hash=definition_hash(self._profile, self._workload),
                server=f"{costs_text(self._profile, self._calibration)}, {stages}",
                relative_error=self._variant.relative_error,
            ),
            timeline=self._timeline.entries(),
            problems=(*offered_problems(requests), *problems),
        )

    def _request_table(self) -> NDArray[Any]:
        schedule = self._plan.schedule
        table = np.empty(len(schedule), dtype=REQUEST_DTYPE)
        table["scheduled"] = schedule["scheduled"]
        table["sent"] = self._client.sent
        table["first_token"] = self._ledger.first_token
        table["last_token"] = self._ledger.last_token
        table["prompt_tokens"] = schedule["prompt_tokens"]
        table["ok"] = ~np.isnan(table["last_token"])
        table["output_tokens"] = np.where(table["ok"], schedule["output_tokens"], 0)
        return table

    def _replicas(self) -> list[Replica]:
        """All that ever were."""
        return [*self._gone, *self._up.values()]

    def _server_table(self, ended: float) -> NDArray[Any]:
        """Sums over the replicas that exist; KV usage is their mean. Counters keep what ended replicas did."""
        rows = np.zeros(math.ceil(ended), dtype=SERVER_DTYPE)
        rows["time"] = np.arange(len(rows))
        usable = (self._plan.config.num_blocks - 1) * self._plan.config.block_size
        alive = np.zeros(len(rows))
        for replica in self._replicas():
            first = replica.first_sample
            samples = np.array(replica.samples[max(0, -first) :], dtype="f8").reshape(-1, 5)
            first = max(0, first)
            here = slice(first, min(first + len(samples), len(rows)))
            if here.start >= here.stop:
                continue
            samples = samples[: here.stop - here.start]
            rows["num_requests_running"][here] += samples[:, 0].astype("i4")
            rows["num_requests_waiting"][here] += samples[:, 1].astype("i4")
            rows["kv_cache_usage"][here] += samples[:, 2] / usable
            rows["prompt_tokens_total"][here] += samples[:, 3].astype("i8")
            rows["prompt_tokens_total"][here.stop :] += int(samples[-1, 3])
            rows["generation_tokens_total"][here] += samples[:, 4].astype("i8")
            rows["generation_tokens_total"][here.stop :] += int(samples[-1, 4])
            alive[here] += 1
        rows["kv_cache_usage"] /= np.maximum(alive, 1)
        return rows

    def _totals(self) -> dict[str, float]:
        replicas = self._replicas()
        prompted = sum(replica.tokens[0] for replica in replicas)
        return totals(
            queue_time_s=sum(replica.queue_time for replica in replicas),
            finished=sum(at == at for at in self._ledger.last_token),
            prompt_tokens=prompted,
            generation_tokens=sum(replica.tokens[1] for replica in replicas),
            preemptions=0,
            prefix_queries=prompted if self._plan.config.enable_prefix_caching else 0,
            prefix_hits=0,
        )


def _kind_of(obj: Object) -> Resource:
    kind = _KINDS.of(obj["apiVersion"], obj["kind"])
    assert kind is not None, f"{obj['kind']} is in no table of the embedded cluster"
    return kind


def _offerings(profile: Profile) -> tuple[Offering, ...]:
    """The profile's machine at the profile's price. FleetRefused when the emulated cloud does not sell it."""
    try:
        machine = machine_for(profile.machine, profile.accelerator)
    except ValueError as refusal:
        raise FleetRefused(str(refusal)) from None
    return catalog([replace(machine, price=profile.price * machine.gpus)])
