"""The dead-man switch: AWS deletes the cluster's stack at a deadline, unless a living session moves it forward."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from pytest_gpulab.aws import stack
from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import AwsError, error_code, explained

GRACE_S = 3600.0
"""From the last heartbeat to the deletion: a stack takes a quarter of an hour to make, and a laptop may sleep."""
_CREATE_S, _DELETE_S = 300.0, 300.0
_KEPT = ("FlexibleTimeWindow", "Target", "Name", "GroupName", "State", "ScheduleExpressionTimezone")


def arm(clients: Clients, cluster: str, tags: Mapping[str, str], deadline: float, clock: stack.Clock) -> None:
    """Make the switch, which deletes the stack `cluster` at `deadline` (Unix seconds)."""
    made = stack.create(
        clients,
        guard_name(cluster),
        stack.read_template("guard.yaml"),
        {"Cluster": cluster, "Deadline": _in_utc(deadline)},
        tags,
    )
    stack.wait_created(clients, made, deadline_s=_CREATE_S, clock=clock)


def move(clients: Clients, cluster: str, deadline: float) -> None:
    """Put the deletion off, or forward, to `deadline` (Unix seconds). AwsError if the switch is gone."""
    from botocore.exceptions import ClientError

    name = f"{cluster}-dead-man"
    with explained(f"moving the dead-man switch of {cluster}"):
        scheduler = clients("scheduler")
        try:
            now = scheduler.get_schedule(Name=name)
        except ClientError as refusal:
            if error_code(refusal) != "ResourceNotFoundException":
                raise
            raise AwsError(
                f"the dead-man switch of {cluster} is gone, so nothing would stop its costs: the run must end"
            ) from None
        kept = {key: now[key] for key in _KEPT if now.get(key) is not None}
        scheduler.update_schedule(**kept, ScheduleExpression=f"at({_in_utc(deadline)})")


def disarm(clients: Clients, stack_id: str, clock: stack.Clock) -> None:
    """Remove a switch by its stack; only when the cluster's stack is gone."""
    stack.delete(clients, stack_id)
    stack.wait_deleted(clients, stack_id, deadline_s=_DELETE_S, clock=clock)


def guard_name(cluster: str) -> str:
    """The stack of a cluster's switch."""
    return f"{cluster}-guard"


def _in_utc(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
