"""`gpulab reap --cluster NAME`: what a cluster left in AWS, and its removal, from its ledger or its name alone."""

from __future__ import annotations

from pytest_gpulab.aws import leaks, stack, switch
from pytest_gpulab.aws.clients import Clients, make_clients
from pytest_gpulab.aws.errors import AwsError, explained
from pytest_gpulab.aws.ledger import ClusterLedger, Site, clusters_folder
from pytest_gpulab.aws.lifecycle import find_stacks, remove_cluster, tear_down
from pytest_gpulab.aws.stack import REAL_TIME, RUN_TAG, Clock


def reap(name: str, region: str | None, *, act: bool, dead: bool = False) -> int:
    """The command: list what is left of a cluster or, with `act`, remove it. 0: nothing is left; 1: something is.

    `region` may be left out where the ledger knows it. `dead`: a session that cannot be seen from here is.
    """
    ledger = _ledger(name)
    site = ledger.site() if ledger else None
    region = region or (site.region if site else None)
    if region is None:
        raise ValueError(f"there is no ledger of the cluster {name} on this machine: say --region")
    clients = make_clients(region)
    if not act:
        left = find_left(clients, find_site(clients, name, region))
        print("\n".join(left) or f"nothing is left of {name} in {region}")
        if left:
            print("nothing was removed: repeat with --yes")
        return 1 if left else 0
    removed = reap_cluster(clients, name, region, dead=dead)
    print(f"{name}: {', '.join(removed) or 'had nothing'}; removed")
    return 0


def find_left(clients: Clients, site: Site) -> list[str]:
    """What is left of a site, one line each: its stacks, then what carries its tags, with its cost."""
    found = () if site.adopted else find_stacks(clients, site)
    stacks = [f"stack {one.name} ({one.status})" for one in found if one is not None]
    return [*stacks, *map(str, leaks.scan(clients, site))]


def reap_cluster(
    clients: Clients, name: str, region: str, *, dead: bool = False, clock: Clock = REAL_TIME
) -> list[str]:
    """Remove what is left of a cluster whose session is dead; what was removed. An adopted cluster stays.

    `dead`: a session that cannot be seen from here is.

    Raises:
        AwsError: its session lives or may live, it is in another account, or something would not go.
    """
    ledger = _ledger(name)
    site = find_site(clients, name, region)
    if ledger is None:
        return remove_cluster(clients, site, clock)
    unseen = ledger.out_of_sight()
    if unseen and not dead:
        raise AwsError(f"the cluster {name} was {unseen}: if its session is known to be dead, add --dead")
    if not unseen and ledger.owner_lives():
        raise AwsError(f"the session of the cluster {name} is alive: let it end, or stop it first")
    return tear_down(clients, ledger, clock=clock)


def find_site(clients: Clients, name: str, region: str) -> Site:
    """The site as its ledger has it; without one, as the stack's tags have it. AwsError if it is elsewhere."""
    with explained("asking AWS who is calling"):
        account = str(clients("sts").get_caller_identity()["Account"])
    ledger = _ledger(name)
    site = ledger.site() if ledger else None
    if site is None:
        found = stack.find(clients, name) or stack.find(clients, switch.guard_name(name))
        return Site(name, region, account, found.tags.get(RUN_TAG, "") if found else "", adopted=False)
    if (site.account, site.region) != (account, region):
        raise AwsError(
            f"the cluster {name} is in the account {site.account}, region {site.region}, but this is account "
            f"{account}, region {region}: sign in there, and say --region {site.region}"
        )
    return site


def _ledger(name: str) -> ClusterLedger | None:
    path = clusters_folder() / f"{name}.jsonl"
    return ClusterLedger(path) if path.exists() else None
