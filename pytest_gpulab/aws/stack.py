"""CloudFormation stacks: create, describe, delete, and wait with a deadline.

Each function can be called again after a crash: a create that finds its own stack goes on with it, a delete that
finds none is done. Failures name the resources that failed and AWS's reason, from the stack's events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import AwsError, DeadlineError, error_code, explained

RUN_TAG = "gpulab.dev/run"
CLUSTER_TAG = "gpulab.dev/cluster"

_POLL_S = 10.0


class StackError(AwsError):
    """A stack failed; `retained` are the resources that AWS could not delete, as 'NAME (TYPE, ID)'."""

    def __init__(self, message: str, retained: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.retained = retained


@dataclass(frozen=True)
class Stack:
    """What CloudFormation says of a stack."""

    id: str
    name: str
    status: str
    reason: str
    tags: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Clock:
    """Time and waiting, seconds; tests hand in their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


REAL_TIME = Clock()


def read_template(name: str) -> str:
    """The text of ``cluster.yaml`` or ``guard.yaml``."""
    return files("pytest_gpulab.aws").joinpath(name).read_text(encoding="utf-8")


def create(clients: Clients, name: str, template: str, parameters: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """Ask for the stack; its id. A stack of the same name and run is taken for this one, made by an earlier attempt.

    Raises:
        AwsError: refused, or the name is another run's.
    """
    from botocore.exceptions import ClientError

    with explained(f"creating the stack {name}"):
        try:
            answer = clients("cloudformation").create_stack(
                StackName=name,
                TemplateBody=template,
                Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
                Capabilities=["CAPABILITY_IAM"],
                # What is left of a failed creation is the teardown's to delete, with its reason still to be seen.
                OnFailure="DO_NOTHING",
                Tags=[{"Key": key, "Value": value} for key, value in tags.items()],
            )
        except ClientError as refusal:
            if error_code(refusal) != "AlreadyExistsException":
                raise
            return _own(clients, name, tags[RUN_TAG]).id
    return str(answer["StackId"])


def find(clients: Clients, name: str) -> Stack | None:
    """The stack by name or id; None if there is none, or it was deleted."""
    from botocore.exceptions import ClientError

    with explained(f"looking for the stack {name}"):
        try:
            answer = clients("cloudformation").describe_stacks(StackName=name)
        except ClientError as refusal:
            # The code of a stack that does not exist is ValidationError, which others share.
            if "does not exist" in str(refusal):
                return None
            raise
    found = _stack(answer["Stacks"][0])
    return None if found.status == "DELETE_COMPLETE" else found


def wait_created(clients: Clients, stack_id: str, *, deadline_s: float, clock: Clock = REAL_TIME) -> Stack:
    """Wait until the stack is complete.

    Raises:
        StackError: it failed, or is being deleted.
        DeadlineError: it was not complete after `deadline_s`.
    """
    end = clock.now() + deadline_s
    seen = None
    while True:
        stack = find(clients, stack_id)
        if stack is None and seen is not None:
            raise StackError(f"the stack {seen.name} is gone: somebody, or its dead-man switch, deleted it")
        seen = stack
        if stack is not None:
            if stack.status == "CREATE_COMPLETE":
                return stack
            if stack.status != "CREATE_IN_PROGRESS":
                raise StackError(f"the stack {stack.name} is {stack.status}: {_failures(clients, stack)}")
        if clock.now() >= end:
            raise DeadlineError(_late(clients, stack_id, deadline_s))
        clock.sleep(_POLL_S)


def delete(clients: Clients, name: str) -> None:
    """Ask for the stack's deletion; nothing if there is none."""
    with explained(f"deleting the stack {name}"):
        clients("cloudformation").delete_stack(StackName=name)


def wait_deleted(clients: Clients, stack_id: str, *, deadline_s: float, clock: Clock = REAL_TIME) -> None:
    """Wait until the stack is gone.

    Raises:
        StackError: AWS could not delete all of it; `retained` says what is left.
        DeadlineError: it was there after `deadline_s`.
    """
    end = clock.now() + deadline_s
    while (stack := find(clients, stack_id)) is not None:
        if stack.status == "DELETE_FAILED":
            retained = retained_resources(clients, stack_id)
            raise StackError(
                f"the stack {stack.name} could not be deleted: {_failures(clients, stack)}. "
                f"Left behind: {', '.join(retained) or 'nothing that AWS names'}. "
                "Remove what holds them, then reap again.",
                retained,
            )
        if clock.now() >= end:
            raise DeadlineError(_late(clients, stack_id, deadline_s))
        clock.sleep(_POLL_S)


def retained_resources(clients: Clients, stack_id: str) -> tuple[str, ...]:
    """What the stack still has, as 'NAME (TYPE, ID)'."""
    return tuple(
        f"{one['LogicalResourceId']} ({one['ResourceType']}, {one.get('PhysicalResourceId', 'no id')})"
        for one in _resources(clients, stack_id)
        if one["ResourceStatus"] != "DELETE_COMPLETE"
    )


def _own(clients: Clients, name: str, run: str) -> Stack:
    stack = find(clients, name)
    if stack is None:
        raise AwsError(f"the stack {name} existed a moment ago and is gone: repeat the command")
    owner = stack.tags.get(RUN_TAG, "no run")
    if owner != run:
        raise AwsError(
            f"the stack {name} belongs to {owner}, not to {run}: it is left alone. "
            f"Choose another name, or adopt the cluster with --gpulab-cluster {name}."
        )
    return stack


def _stack(answer: Mapping[str, Any]) -> Stack:
    return Stack(
        id=answer["StackId"],
        name=answer["StackName"],
        status=answer["StackStatus"],
        reason=answer.get("StackStatusReason", ""),
        tags={tag["Key"]: tag["Value"] for tag in answer.get("Tags", ())},
        outputs={output["OutputKey"]: output["OutputValue"] for output in answer.get("Outputs", ())},
    )


def _failures(clients: Clients, stack: Stack) -> str:
    """The resources that failed first, each with AWS's reason."""
    with explained(f"reading the events of the stack {stack.name}"):
        pages = clients("cloudformation").get_paginator("describe_stack_events").paginate(StackName=stack.id)
        newest_first = [event for page in pages for event in page["StackEvents"]]
    failed = [
        f"{event['LogicalResourceId']} ({event['ResourceType']}): {event.get('ResourceStatusReason', 'no reason')}"
        for event in reversed(newest_first)
        if event["ResourceStatus"].endswith("_FAILED") and not _is_consequence(event, stack)
    ]
    return "; ".join(dict.fromkeys(failed)) or stack.reason or "AWS gives no reason"


def _is_consequence(event: Mapping[str, Any], stack: Stack) -> bool:
    """Whether the event only repeats another's failure: the stack's own, and what was cancelled."""
    return event.get("PhysicalResourceId") == stack.id or "cancelled" in event.get("ResourceStatusReason", "")


def _late(clients: Clients, stack_id: str, deadline_s: float) -> str:
    stack = find(clients, stack_id)
    if stack is None:
        return f"AWS did not show the stack {stack_id} within {deadline_s:.0f} s"
    waiting = [
        f"{one['LogicalResourceId']} ({one['ResourceType']}, {one['ResourceStatus']})"
        for one in _resources(clients, stack_id)
        if one["ResourceStatus"].endswith("_IN_PROGRESS")
    ]
    return (
        f"the stack {stack.name} was still {stack.status} after {deadline_s:.0f} s; "
        f"waiting for: {', '.join(waiting) or 'nothing that AWS names'}"
    )


def _resources(clients: Clients, stack_id: str) -> list[dict[str, Any]]:
    with explained(f"listing the resources of the stack {stack_id}"):
        pages = clients("cloudformation").get_paginator("list_stack_resources").paginate(StackName=stack_id)
        return [resource for page in pages for resource in page["StackResourceSummaries"]]
