"""Autoscaled serving in virtual time: the embedded cluster's controllers around simulated model servers.

Every pod whose server is up is a `Replica`; the edge sends requests to Ready endpoints; Prometheus scrapes the
replicas and the autoscaler acts on that. An hour takes about a second.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pytest_gpulab.accelerators import find_accelerator
from pytest_gpulab.cluster.clock import VirtualClock
from pytest_gpulab.cluster.cloud import GPU, NO_FAULTS, Faults
from pytest_gpulab.cluster.durations import PROFILES
from pytest_gpulab.cluster.edge import Client, Edge, LimitedClient, OpenClient
from pytest_gpulab.cluster.embedded import DeadlineExceeded, EmbeddedCluster
from pytest_gpulab.cluster.metrics import RUNNING, WAITING
from pytest_gpulab.cluster.objects import Object, name_of, uid_of
from pytest_gpulab.cluster.replica import Ledger, Replica
from pytest_gpulab.cluster.resources import DEPLOYMENT, HPA, NODE, NODE_CLAIM, NODE_POOL, POD, SERVICE
from pytest_gpulab.cluster.service import ready_pods
from pytest_gpulab.cluster.timeline import Timeline
from pytest_gpulab.engine.calibration import find_variant, variant_name
from pytest_gpulab.engine.outcome import totals
from pytest_gpulab.engine.simulation import make_plan
from pytest_gpulab.experiment import ClosedLoop, Definition, Direct, Profile, Workload, require_servable
from pytest_gpulab.run import REQUEST_DTYPE, SERVER_DTYPE, Provenance, Run

NAME: Final = "vllm"
DEADLINE_S: Final = 1800.0
"""The lab's own: for warm replicas before a run, and for zero nodes after it."""

Count = Annotated[int, Field(ge=1)]


class Autoscaling(Definition):
    """A HorizontalPodAutoscaler on the replicas' own pressure.

    `running` scales on requests that run (the engine holds at most ``max_num_seqs`` of them), `active-pressure` on
    running and waiting together. `target` is the average per replica. `scale_down_window_s` None: no ``behavior``,
    the controller's older rules.
    """

    policy: Literal["running", "active-pressure"] = "active-pressure"
    target: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    min_replicas: Count = 1
    max_replicas: Count = 4
    scale_down_window_s: Annotated[int, Field(ge=0, le=3600)] | None = None

    @property
    def metric(self) -> str:
        """As the adapter names it."""
        return "vllm_requests_running" if self.policy == "running" else "vllm_requests_active"


class Fleet(Definition):
    """How a profile is deployed.

    `warm`: so many replicas are ready when the run starts; 0 starts from zero nodes, and the workload's first second
    is the moment the deployment appears. `pre_stop_s`: how long a pod that is ending keeps serving what it has.
    """

    autoscaling: Autoscaling | None = Autoscaling()
    replicas: Count = 1
    """Without autoscaling, or before it has decided anything."""
    warm: Annotated[int, Field(ge=0)] = 0
    capacity: tuple[Literal["spot", "on-demand"], ...] = ("spot", "on-demand")
    max_gpus: Count = 16
    consolidate_after_s: Annotated[int, Field(ge=0)] = 30
    pre_stop_s: Annotated[int, Field(ge=0)] = 0
    grace_s: Annotated[int, Field(ge=0)] = 30
    readiness_period_s: Count = 5
    stages: Literal["g4dn", "g4dn-soci"] = "g4dn"
    faults: Faults = NO_FAULTS


FROM_ZERO: Final = Fleet()
WARM_ONE: Final = Fleet(warm=1)


def simulate_fleet(profile: Profile, workload: Workload, fleet: Fleet = FROM_ZERO, *, seed: int = 0) -> Run:
    """One run of `workload` on a fleet of `profile`, simulated. The same definitions and seed give the same run.

    Raises:
        ValueError: what `engine.simulate` refuses, and workloads with a closed loop, a timeout or a shared prefix.
        DeadlineExceeded: the warm replicas do not become ready.
    """
    require_servable(workload, profile)
    if isinstance(workload.arrivals, ClosedLoop) or workload.timeout_s is not None:
        raise ValueError("a fleet serves open arrivals without a timeout; leave timeout_s out and give a rate")
    return _Simulation(profile, workload, fleet, seed).run()


class _Simulation:
    """One run. Times are seconds from its start, except the clock's."""

    def __init__(self, profile: Profile, workload: Workload, fleet: Fleet, seed: int) -> None:
        self._profile, self._workload, self._fleet, self._seed = profile, workload, fleet, seed
        self._calibration, self._variant = find_variant(profile)
        self._plan = make_plan(profile, workload, self._calibration, self._variant, seed)
        self._ledger = Ledger(self._plan)
        self._clock = VirtualClock()
        self._start = self._clock.now()
        self._cluster = EmbeddedCluster(
            self._clock, seed=seed, stages=PROFILES[fleet.stages], faults=fleet.faults, read=self._read
        )
        self._timeline = Timeline(self._cluster.store, self._clock, self._start)
        self._edge = Edge()
        self._limited = not (isinstance(workload.admission, Direct) and workload.admission.max_outstanding is None)
        due = self._plan.scheduled()
        self._client: Client = (
            LimitedClient(due, self._edge, workload.admission) if self._limited else OpenClient(due, self._edge)
        )
        self._up: dict[str, Replica] = {}
        self._gone: list[tuple[Replica, float]] = []
        self._cluster.kubelets.hooks.healthy.append(self._server_up)
        self._cluster.kubelets.hooks.stopped.append(self._server_gone)

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

    def _server_gone(self, pod: Object) -> None:
        replica = self._up.pop(uid_of(pod), None)
        if replica is None:
            return
        lost = replica.kill(self._now())
        self._edge.live.remove(replica)
        if isinstance(self._client, LimitedClient):
            self._client.collect(replica)
        self._client.lost(lost, self._now())
        self._gone.append((replica, self._now()))
        self._route()

    def _route(self) -> None:
        """Requests go where the Service's endpoints are."""
        ready = ready_pods(self._cluster.store, NAME, "default")
        endpoints = [self._up[uid] for uid in ready if uid in self._up]
        if endpoints != self._edge.endpoints:
            self._edge.endpoints = endpoints
            self._client.endpoints_changed(self._now())

    # the run

    def run(self) -> Run:
        """Deploy, serve, tear down."""
        self._deploy()
        if self._fleet.warm:
            self._warm_up()
        limit = (self._workload.duration_s or 0.0) + max(self._plan.scheduled(), default=0.0) + DEADLINE_S
        while self._unfinished() and self._now() < limit:
            until = min(self._clock.next_at - self._start, limit)
            if not self._client.waits and self._now() >= (self._workload.duration_s or 0.0):
                self._edge.advance(until)
            self._client.act(until)
            self._clock.run_until(self._start + until)
            self._route()
        ended = self._ended()
        bill = self._bill(ended)
        left = self._tear_down()
        return self._evidence(ended, {**bill, "gpu_seconds_to_zero": self._billed(math.inf)[0]}, left)

    def _deploy(self) -> None:
        for capacity in self._fleet.capacity:
            self._cluster.apply(NODE_POOL, _pool(capacity, self._profile, self._fleet))
        self._cluster.apply(SERVICE, _service())
        self._cluster.apply(DEPLOYMENT, _deployment(self._fleet))
        if self._fleet.autoscaling is not None:
            self._cluster.apply(HPA, _autoscaler(self._fleet.autoscaling))

    def _warm_up(self) -> None:
        """Run time starts when the warm replicas are ready."""
        store = self._cluster.store
        self._cluster.wait(
            f"{self._fleet.warm} warm replicas",
            lambda: len(ready_pods(store, NAME, "default")) >= self._fleet.warm,
            DEADLINE_S,
            lambda: (*store.list(NODE_CLAIM), *store.list(NODE), *store.list(POD)),
        )
        self._start = self._timeline.start = self._clock.now()
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
        """The last answer, or the end of the stated duration."""
        answered = [at for at in self._ledger.last_token if at == at]
        return max([self._workload.duration_s or 0.0, *answered[-1:], max(answered, default=0.0)])

    def _tear_down(self) -> int:
        """Delete what was applied, workloads first; NodeClaims that are left at the deadline.

        The pools go too: Karpenter leaves a node that never got its GPU alone.
        """
        store = self._cluster.store
        for kind in (HPA, DEPLOYMENT, SERVICE):
            if store.find(kind, NAME, "default"):
                store.delete(kind, NAME, "default")
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

    def _billed(self, until: float) -> tuple[float, float]:
        """GPU seconds and USD from the run's start to `until`."""
        gpu_s = usd = 0.0
        for instance in self._cluster.cloud.instances.values():
            stopped = math.inf if instance.stopped is None else instance.stopped
            end = min(stopped, self._start + until, self._clock.now())
            seconds = max(0.0, end - max(instance.launched, self._start))
            gpu_s += seconds * instance.offering.type.gpus
            usd += seconds / 3600 * instance.offering.price
        return gpu_s, usd

    def _bill(self, ended: float) -> dict[str, float]:
        gpu_s, usd = self._billed(ended)
        return {"gpu_seconds": gpu_s, "cost_usd": usd}

    def _evidence(self, ended: float, bill: dict[str, float], left: int) -> Run:
        problems = (f"{left} NodeClaims were left {DEADLINE_S:.0f} s after teardown began",) if left else ()
        return Run(
            requests=self._request_table(),
            server=self._server_table(ended),
            totals={**self._totals(), **bill},
            duration_s=ended,
            provenance=Provenance(
                target="sim",
                basis="simulated",
                seed=self._seed,
                definition_hash=self._definition_hash(),
                server=f"{self._calibration.name} {variant_name(self._profile)}, {self._fleet.stages} cluster",
                relative_error=self._variant.relative_error,
            ),
            timeline=self._timeline.entries(),
            problems=problems,
        )

    def _definition_hash(self) -> str:
        parts = (self._profile, self._workload, self._fleet)
        return hashlib.sha256("".join(part.definition_hash for part in parts).encode()).hexdigest()[:16]

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

    def _replicas(self) -> list[tuple[Replica, float]]:
        """All that ever were, with the end of each."""
        return [*self._gone, *((replica, math.inf) for replica in self._up.values())]

    def _server_table(self, ended: float) -> NDArray[Any]:
        """Sums over the replicas that exist; KV usage is their mean. Counters keep what ended replicas did."""
        rows = np.zeros(math.ceil(ended), dtype=SERVER_DTYPE)
        rows["time"] = np.arange(len(rows))
        usable = (self._plan.config.num_blocks - 1) * self._plan.config.block_size
        alive = np.zeros(len(rows))
        for replica, _ in self._replicas():
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
        replicas = [replica for replica, _ in self._replicas()]
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


# --- what is applied --------------------------------------------------------------------------------------


def _pool(capacity: str, profile: Profile, fleet: Fleet) -> Object:
    """Spot is preferred, on-demand the fallback."""
    machine = profile.instance_type or find_accelerator(profile.accelerator).instance_type
    requirements = [
        {"key": "karpenter.sh/capacity-type", "operator": "In", "values": [capacity]},
        {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": [machine]},
    ]
    return {
        "metadata": {"name": f"gpu-{capacity}"},
        "spec": {
            "weight": 100 if capacity == "spot" else 10,
            "limits": {GPU: str(fleet.max_gpus)},
            "disruption": {
                "consolidationPolicy": "WhenEmpty",
                "consolidateAfter": f"{fleet.consolidate_after_s}s",
                "budgets": [{"nodes": "100%"}],
            },
            "template": {
                "metadata": {"labels": {"gpulab.dev/pool": "gpu"}},
                "spec": {
                    "nodeClassRef": {"group": "eks.amazonaws.com", "kind": "NodeClass", "name": "default"},
                    "requirements": requirements,
                    "taints": [{"key": GPU, "value": "true", "effect": "NoSchedule"}],
                },
            },
        },
    }


def _service() -> Object:
    ports = [{"port": 80, "targetPort": 8000}]
    return {"metadata": {"name": NAME}, "spec": {"selector": {"app": NAME}, "ports": ports}}


def _deployment(fleet: Fleet) -> Object:
    wanted = fleet.autoscaling.min_replicas if fleet.autoscaling else fleet.replicas
    container: dict[str, Any] = {
        "name": NAME,
        "image": "vllm/vllm-openai",
        "resources": {"limits": {GPU: "1"}, "requests": {"cpu": "2", "memory": "8Gi"}},
        "readinessProbe": {
            "httpGet": {"path": "/health", "port": 8000},
            "periodSeconds": fleet.readiness_period_s,
        },
    }
    if fleet.pre_stop_s:
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": fleet.pre_stop_s}}}
    spec = {
        "containers": [container],
        "nodeSelector": {"gpulab.dev/pool": "gpu"},
        "tolerations": [{"key": GPU, "operator": "Exists"}],
        "terminationGracePeriodSeconds": fleet.grace_s + fleet.pre_stop_s,
    }
    labels = {"app": NAME}
    return {
        "metadata": {"name": NAME},
        "spec": {
            "replicas": max(wanted, fleet.warm),
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def _autoscaler(scaling: Autoscaling) -> Object:
    target = {"type": "AverageValue", "averageValue": f"{round(scaling.target * 1000)}m"}
    spec: dict[str, Any] = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME},
        "minReplicas": scaling.min_replicas,
        "maxReplicas": scaling.max_replicas,
        "metrics": [{"type": "Pods", "pods": {"metric": {"name": scaling.metric}, "target": target}}],
    }
    if scaling.scale_down_window_s is not None:
        spec["behavior"] = {"scaleDown": {"stabilizationWindowSeconds": scaling.scale_down_window_s}}
    return {"metadata": {"name": NAME}, "spec": spec}
