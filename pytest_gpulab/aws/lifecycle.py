"""A cluster's life: up, and down to nothing. Whatever kills a session in between, `tear_down` finishes it."""

from __future__ import annotations

import time
from collections.abc import Callable

from pytest_gpulab.aws import leaks, stack, switch
from pytest_gpulab.aws.auth import connect, write_kubeconfig
from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.cluster import Cluster, find_cluster, require_usable
from pytest_gpulab.aws.errors import AwsError
from pytest_gpulab.aws.ledger import ClusterLedger, Site
from pytest_gpulab.aws.preflight import Plan
from pytest_gpulab.aws.stack import CLUSTER_TAG, REAL_TIME, RUN_TAG, Clock, StackError
from pytest_gpulab.kube import teardown
from pytest_gpulab.kube.client import Kube, KubeError
from pytest_gpulab.kube.ledger import Ledger, ledgers
from pytest_gpulab.kube.state import state_folder

MANAGED_TAG = "app.kubernetes.io/managed-by"
CREATE_S, DELETE_S, GONE_S, CONNECT_S = 2400.0, 2400.0, 600.0, 300.0
"""Seconds for the cluster's stack to be made (a quarter of an hour is usual), to be deleted, for AWS to stop showing
what it deleted, and for a new cluster's API to let the caller in."""
_POLL_S = 5.0


def site_of(plan: Plan) -> Site:
    """Where the plan's cluster will be."""
    wanted = plan.request
    return Site(wanted.name, wanted.region, plan.identity.account, wanted.run, wanted.adopt)


def bring_up(clients: Clients, plan: Plan, ledger: ClusterLedger, *, clock: Clock = REAL_TIME) -> Kube:
    """The switch, then the cluster, or the adopted cluster as it is; a connection to it.

    The ledger must have been opened for the plan's site. Whatever is raised, `tear_down` removes what was made.

    Raises:
        AwsError: refused, failed, or not in time; with AWS's reason.
        KubeError: the API server does not answer.
    """
    if not plan.request.adopt:
        make_cluster(clients, plan, clock)
    cluster = require_usable(clients, plan.request.name)
    write_kubeconfig(cluster, plan.request.region, ledger.kubeconfig)
    return enter(clients, cluster, ledger, clock)


def enter(clients: Clients, cluster: Cluster, ledger: ClusterLedger, clock: Clock = REAL_TIME) -> Kube:
    """A connection. A new cluster's name and access entries take a while to be known to all of its API servers."""
    end = clock.now() + CONNECT_S
    while True:
        try:
            return connect(clients, cluster, ledger.folder)
        except KubeError:
            if clock.now() >= end:
                raise
            clock.sleep(_POLL_S)


def make_cluster(clients: Clients, plan: Plan, clock: Clock) -> None:
    """The two stacks, each taken up where an earlier attempt of the same run left it."""
    wanted = plan.request
    tags = {CLUSTER_TAG: wanted.name, RUN_TAG: wanted.run, MANAGED_TAG: "gpulab"}
    switch.arm(clients, wanted.name, tags, time.time() + switch.GRACE_S, clock)
    made = stack.create(
        clients,
        wanted.name,
        stack.read_template("cluster.yaml"),
        {
            "Zones": ",".join(plan.zones),
            "ClientCidrs": ",".join(wanted.client_cidrs),
            "AdminArn": plan.identity.principal_arn,
            "ModelBucket": wanted.model_bucket,
        },
        tags,
    )
    stack.wait_created(clients, made, deadline_s=CREATE_S, clock=clock)


def tear_down(
    clients: Clients, ledger: ClusterLedger, *, drained: Callable[[], None] = lambda: None, clock: Clock = REAL_TIME
) -> list[str]:
    """Remove what the ledger's site made, then the ledger; what was removed.

    Adopted clusters stay. The order: what the runs made in the cluster, the cluster's stack, what Kubernetes left
    outside of it, the switch. Can be called again wherever it was cut off. `drained` is called while the cluster is
    still there but the runs' machines are not.

    Raises:
        AwsError: something is left; the ledger stays, and so does the switch while the stack does.
    """
    site = ledger.site()
    if site is None:  # killed before the first line: nothing was made
        ledger.remove()
        return []
    removed, problems = _drain(ledger)
    drained()
    if site.adopted:
        if problems:
            raise AwsError(f"the adopted cluster {site.name} still has of this run: {'; '.join(problems)}")
        _require_nothing(clients, site, clock)
    else:
        removed += remove_cluster(clients, site, clock)
        for run in _runs(ledger):  # what could not be drained went with its cluster
            run.remove()
    ledger.remove()
    return removed


def remove_cluster(clients: Clients, site: Site, clock: Clock = REAL_TIME) -> list[str]:
    """Delete the cluster's stack, what is left around it, and last its switch; what was removed.

    Raises:
        AwsError: something is left, or is not the site's; the switch stays armed while the stack is there.
    """
    cluster, guard = find_stacks(clients, site)
    if cluster is not None:
        _delete_stack(clients, site, cluster.id, clock)
    _require_nothing(clients, site, clock)
    if guard is not None:
        switch.disarm(clients, guard.id, clock)
    return [f"stack {one.name}" for one in (cluster, guard) if one is not None]


def find_stacks(clients: Clients, site: Site) -> tuple[stack.Stack | None, stack.Stack | None]:
    """The stacks of the site's cluster and of its switch. AwsError if what has the name is not the site's."""
    found = [stack.find(clients, name) for name in (site.name, switch.guard_name(site.name))]
    cluster, guard = (_require_ours(one, site) for one in found)
    if cluster is None and find_cluster(clients, site.name) is not None:
        raise AwsError(
            f"no stack of the lab made the EKS cluster {site.name}, so nothing of it is removed. What a run left in "
            f"a cluster that it adopted has the label {RUN_TAG}; the machine with the ledger can reap it"
        )
    return cluster, guard


def _require_nothing(clients: Clients, site: Site, clock: Clock) -> None:
    leaks.sweep(clients, site, deadline_s=GONE_S, clock=clock)
    leaks.require_none(clients, site, deadline_s=GONE_S, clock=clock)


def _delete_stack(clients: Clients, site: Site, stack_id: str, clock: Clock) -> None:
    """Delete it; where something that no stack owns holds it, remove that and try once more."""
    stack.delete(clients, stack_id)
    try:
        stack.wait_deleted(clients, stack_id, deadline_s=DELETE_S, clock=clock)
    except StackError as held:
        if refused := leaks.sweep(clients, site, deadline_s=GONE_S, clock=clock):
            raise StackError(f"{held} Also: {'; '.join(refused)}", held.retained) from None
        stack.delete(clients, stack_id)
        stack.wait_deleted(clients, stack_id, deadline_s=DELETE_S, clock=clock)


def _require_ours(found: stack.Stack | None, site: Site) -> stack.Stack | None:
    """The stack, if there is one. One of the name that is not the site's is never touched."""
    for tag, value in {CLUSTER_TAG: site.name, RUN_TAG: site.run}.items():
        if found is not None and found.tags.get(tag) != value:
            raise AwsError(
                f"the stack {found.name} must have the tag {tag}={value}, but has {found.tags.get(tag, 'none')}: it "
                "is not this run's, and stays"
            )
    return found


def _drain(ledger: ClusterLedger) -> tuple[list[str], list[str]]:
    """Take down what runs made in the cluster; what went and what did not."""
    removed: list[str] = []
    problems: list[str] = []
    for run in _runs(ledger):
        ended = teardown.tear_down(run)
        removed += ended.removed
        problems += ended.problems
    return removed, problems


def _runs(ledger: ClusterLedger) -> list[Ledger]:
    """The ledgers of runs in this cluster."""
    every = ((run, run.connection()) for run in ledgers(state_folder()))
    return [run for run, connection in every if connection is not None and connection[0] == ledger.kubeconfig]
