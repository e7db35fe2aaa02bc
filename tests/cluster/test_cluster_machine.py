"""The embedded cluster under arbitrary operations: what must hold at every moment, and at the end."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pytest_gpulab.cluster.objects import at, is_deleting, name_of, uid_of
from pytest_gpulab.cluster.quantity import amounts, pod_requests
from pytest_gpulab.cluster.recorder import last_events
from pytest_gpulab.cluster.resources import DEPLOYMENT, EVENT, HPA, NODE, NODE_CLAIM, NODE_POOL, POD
from pytest_gpulab.cluster.scheduler import is_terminal
from pytest_gpulab.fleet import Faults, Shortage
from tests.cluster.scene import cluster, hpa, pool

GPU = "nvidia.com/gpu"
LIMIT = 4
LEAST, MOST = 1, 6


class ClusterMachine(RuleBasedStateMachine):
    """Load, scaling, lost machines and shortages in any order."""

    @initialize(
        seed=st.integers(0, 1000),
        shortages=st.lists(
            st.builds(
                Shortage,
                capacity_type=st.sampled_from(["", "spot"]),
                start_s=st.floats(0, 1999),
                end_s=st.floats(2000, 4000),
            ),
            max_size=2,
        ),
        policy=st.sampled_from(["WhenEmpty", "WhenEmptyOrUnderutilized"]),
    )
    def start(self, seed, shortages, policy):
        self.load = 0.0
        self.made = cluster(seed=seed, faults=Faults(shortages=tuple(shortages)), read=self.read)
        for name, capacity in (("gpu-spot", "spot"), ("gpu-on-demand", "on-demand")):
            changed = pool(name, capacity, gpus=LIMIT)
            changed["spec"]["disruption"]["consolidationPolicy"] = policy
            self.made.apply(NODE_POOL, changed)
        self.made.apply(HPA, hpa(least=LEAST, most=MOST))

    def read(self, pod):
        return {"vllm:num_requests_running": self.load} if self.made.kubelets.serving(pod) else None

    @rule(load=st.floats(0, 50))
    def offer(self, load):
        self.load = load

    @rule(seconds=st.floats(0.1, 900))
    def pass_time(self, seconds):
        self.made.clock.run_until(self.made.clock.now() + seconds)

    @rule()
    def delete_a_pod(self):
        for pod in self.made.store.list(POD)[:1]:
            self.made.store.delete(POD, name_of(pod), "default")

    @rule()
    def delete_a_node_claim(self):
        for claim in self.made.store.list(NODE_CLAIM)[:1]:
            self.made.store.delete(NODE_CLAIM, name_of(claim))

    @rule()
    def interrupt(self):
        self.made.cloud._interrupt_oldest()

    @rule()
    def lose(self):
        self.made.cloud._lose_oldest()

    @rule()
    def restart(self):
        stamp = str(self.made.clock.now())
        template = {"metadata": {"annotations": {"restartedAt": stamp}}}
        self.made.store.patch(DEPLOYMENT, "vllm", "default", {"spec": {"template": template}})

    @invariant()
    def replicas_stay_within_the_autoscalers_bounds(self):
        if hasattr(self, "made"):
            assert LEAST <= self.made.store.get(DEPLOYMENT, "vllm", "default")["spec"]["replicas"] <= MOST

    @invariant()
    def no_node_is_oversubscribed(self):
        if not hasattr(self, "made"):
            return
        pods = [pod for pod in self.made.store.list(POD) if not is_terminal(pod)]
        for node in self.made.store.list(NODE):
            there = [pod_requests(p["spec"])[GPU] for p in pods if p["spec"].get("nodeName") == name_of(node)]
            assert sum(there) <= amounts(at(node, "status.allocatable")).get(GPU, 0)

    @invariant()
    def pools_stay_within_their_limits(self):
        if not hasattr(self, "made"):
            return
        for found in self.made.store.list(NODE_POOL):
            labels = f"karpenter.sh/nodepool={name_of(found)}"
            assert len(self.made.store.list(NODE_CLAIM, labels=labels)) <= LIMIT

    @invariant()
    def machines_are_known_or_gone(self):
        if not hasattr(self, "made"):
            return
        known = {at(claim, "status.providerID") for claim in self.made.store.list(NODE_CLAIM)}
        for instance in self.made.cloud.instances.values():
            assert instance.stopped is not None or instance.provider_id in known

    def teardown(self):
        if not hasattr(self, "made"):
            return
        made = self.made
        made.clock.run_until(made.clock.now() + 2000)
        for pod in made.store.list(POD):
            waits = not pod["spec"].get("nodeName") and not is_deleting(pod)
            assert not waits or last_events(made.store, pod), "every pod is placed, or says why not"
        wanted = made.store.get(DEPLOYMENT, "vllm", "default")["spec"]["replicas"]
        if made.clock.now() - made.cloud._start > 6000:
            assert sum(bool(p["spec"].get("nodeName")) for p in made.store.list(POD)) >= wanted, "8 GPUs are enough"
        for kind in (HPA, DEPLOYMENT):
            made.store.delete(kind, "vllm", "default")
        made.clock.run_until(made.clock.now() + 1800)
        assert not made.store.list(POD)
        assert not made.store.list(NODE_CLAIM)
        assert not made.store.list(NODE)
        assert all(instance.gone is not None for instance in made.cloud.instances.values())
        about = {event["involvedObject"]["uid"] for event in made.store.list(EVENT)}
        assert all(uid_of(pod) in about for pod in made.store.list(POD))


ClusterMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestClusterMachine = ClusterMachine.TestCase
