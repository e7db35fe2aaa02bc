"""The policy of the caller: it allows each call that a session makes, what its stacks need, and little else.

What a session calls is recorded on the wire. What CloudFormation calls for each type of resource is in AWS's own
schemas of them, which cfn-lint carries.
"""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import cfnlint
import pytest
from cfnlint.api import lint

from pytest_gpulab.aws import auth, stack
from pytest_gpulab.aws.certificate import require_certificate
from pytest_gpulab.aws.clients import Clients, make_clients
from pytest_gpulab.aws.guard import make_guard
from pytest_gpulab.aws.ledger import open_ledger
from pytest_gpulab.aws.lifecycle import bring_up, site_of, tear_down
from pytest_gpulab.aws.preflight import Request, preflight
from pytest_gpulab.aws.reap import find_left, find_site, reap_cluster
from pytest_gpulab.aws.stack import Clock
from pytest_gpulab.aws.supply import Need
from tests.aws import moto_eks
from tests.aws.account import CERTIFICATE, account
from tests.aws.conftest import ACCOUNT, REGION
from tests.aws.test_lifecycle import plant_leftovers
from tests.aws.test_template import TEMPLATES, listed, parsed

FOLDER = Path(stack.__file__).parent
POLICY = json.loads((FOLDER / "caller-policy.json").read_text(encoding="utf-8"))
STATEMENTS = {one["Sid"]: one for one in POLICY["Statement"]}
SERVICES = ("acm", "cloudformation", "ec2", "eks", "elbv2", "iam", "pricing", "scheduler", "service-quotas", "sts")
NAME = "gpulab-20261125-120000-abcdef"
"""As a session names its cluster."""

NOT_NEEDED = {
    "ec2:AcceptAddressTransfer": "no address comes from another account",
    "ec2:AssociateAddress": "the address belongs to the NAT gateway, not to an instance",
    "ec2:AttachVpnGateway": "the gateway is of the internet",
    "ec2:CreateVpcEncryptionControl": "not in the template",
    "ec2:DescribeVpcEncryptionControls": "not in the template",
    "ec2:DetachVpnGateway": "the gateway is of the internet",
    "ec2:DeleteTags": "no tag is taken away",
    "iam:UntagRole": "no tag is taken away",
    "kms:CreateGrant": "the cluster has no key of the caller's",
    "kms:DescribeKey": "the cluster has no key of the caller's",
    "vpc-lattice:CreateServiceNetworkVpcEndpointAssociation": "the endpoint is a gateway",
    "vpc-lattice:DescribeServiceNetworkVpcEndpointAssociation": "the endpoint is a gateway",
    "vpce:AllowMultiRegion": "the endpoint is of its own region",
}
"""What handlers of the templates' types may call, and do not for what the templates say."""


def actions() -> set[str]:
    return {action for one in POLICY["Statement"] for action in listed(one["Action"])}


def resource_types() -> set[str]:
    return {resource["Type"] for name in TEMPLATES for resource in parsed(name)["Resources"].values()}


@cache
def handlers(kind: str) -> dict[str, Any]:
    """What CloudFormation calls for a type, by what it does with it."""
    schemas = Path(cfnlint.__file__).parent / "data" / "schemas"
    place = json.loads((schemas / "providers" / f"{REGION}.json").read_text())[kind]
    found: dict[str, Any] = json.loads((schemas / "resources" / f"{place}.json").read_text())["handlers"]
    return found


def called_by_cloudformation(*doings: str) -> set[str]:
    return {
        action for kind in resource_types() for doing in doings for action in handlers(kind)[doing]["permissions"]
    }


# --- what a session calls -------------------------------------------------------------------------------------------


Call = tuple[str, str, dict[str, Any]]
"""Service, operation and parameters."""


def recorded(url: str, calls: list[Call]) -> Clients:
    """Clients that write down what they call."""
    clients = make_clients(REGION, url)

    def write_down(params: dict[str, Any], model: Any, **_: Any) -> None:
        calls.append((model.service_model.signing_name, model.name, params))

    for service in SERVICES:
        clients(service).meta.events.register("provide-client-params", write_down)
    return clients


def live_and_die(clients: Clients, clock: Clock, plant: Callable[[], None]) -> None:
    """Everything that a session, its guard and reap may ask of AWS; `plant` is what Kubernetes does meanwhile."""
    needs = (Need("g4dn.xlarge", 1), Need("p5.48xlarge", 1, ("on-demand",)))
    wanted = Request(
        name=NAME,
        run="run-1",
        region=REGION,
        needs=needs,
        hours=1.0,
        budget_usd=50.0,
        allowed_accounts=frozenset({ACCOUNT}),
        client_cidrs=("203.0.113.7/32",),
    )
    plan = preflight(clients, wanted)
    require_certificate(clients, CERTIFICATE, region=REGION, hours=1.0)
    ledger = open_ledger(site_of(plan))
    bring_up(clients, plan, ledger, clock=clock)
    auth.make_token(clients, NAME)
    make_guard(clients, plan, time.time()).heartbeat(SimpleNamespace(list=lambda *_, **__: []))
    preflight(clients, Request(**{**vars(wanted), "adopt": True}))
    plant()
    find_left(clients, find_site(clients, NAME, REGION))
    tear_down(clients, ledger, clock=clock)
    moto_eks.FAIL_CREATION["AWS::EKS::Cluster"] = "no"
    ledger = open_ledger(site_of(plan))
    with pytest.raises(stack.StackError):
        bring_up(clients, plan, ledger, clock=clock)
    stack._late(clients, NAME, 1.0)
    moto_eks.FAIL_CREATION.clear()
    ledger.remove()
    reap_cluster(clients, NAME, REGION, clock=clock)


def arn_of(service: str, params: dict[str, Any]) -> str | None:
    """What a call is about, where its parameters name it."""
    named = params.get("StackName") or params.get("name") or params.get("Name")
    if named is None or service not in ("cloudformation", "eks", "scheduler"):
        return None
    name = str(named).removeprefix(f"arn:aws:cloudformation:{REGION}:{ACCOUNT}:stack/").partition("/")[0]
    kinds = {"cloudformation": f"stack/{name}/id", "eks": f"cluster/{name}", "scheduler": f"schedule/default/{name}"}
    return f"arn:aws:{service}:{REGION}:{ACCOUNT}:{kinds[service]}"


def directly(action: str, about: str | None) -> bool:
    """Whether the caller itself, not CloudFormation for it, may do it."""
    return any(
        action in listed(one["Action"])
        and "aws:CalledVia" not in json.dumps(one)
        and (about is None or any(fnmatchcase(about, pattern) for pattern in listed(one["Resource"])))
        for one in POLICY["Statement"]
    )


@pytest.mark.slow
def test_every_call_is_allowed_and_nothing_is_that_nobody_calls(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_gpulab.aws.lifecycle.connect", lambda *_: "the way in")
    calls: list[Call] = []
    with account() as url:
        live_and_die(recorded(url, calls), clock, lambda: plant_leftovers(make_clients(REGION, url), NAME))
    made = {(f"{service}:{operation}", arn_of(service, params)) for service, operation, params in calls}
    assert len({action for action, _ in made}) > 30, "the path is not whole"
    assert [call for call in sorted(made, key=str) if not directly(*call)] == []
    known = {action for action, _ in made} | mentioned() | called_by_cloudformation("create", "read", "delete")
    assert actions() - known == {"cloudformation:TagResource"}, "which CreateStack needs where it is given tags"


def mentioned() -> set[str]:
    """Actions of the operations that the package's source names, wherever it runs them."""
    found = set()
    words = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
    for service in SERVICES:
        client = boto3.client(service, region_name="us-east-1")
        operations = client.meta.method_to_api_mapping
        prefix = client.meta.service_model.signing_name
        found |= {f"{prefix}:{operations[word]}" for word in words & set(operations)}
    return found


def test_every_operation_in_the_source_is_allowed() -> None:
    """Also those that no test happens to run. A word that several services know may be meant for one of them only."""
    allowed = {action.partition(":")[2] for action in actions()}
    assert {action for action in mentioned() if action.partition(":")[2] not in allowed} == set()
    assert len(mentioned()) > 25


# --- what CloudFormation calls for it -------------------------------------------------------------------------------


def test_cloudformation_may_make_and_delete_what_the_templates_hold() -> None:
    needed = called_by_cloudformation("create", "read", "delete")
    assert len(needed) > 60
    assert needed - actions() - NOT_NEEDED.keys() == set()
    assert set(NOT_NEEDED) <= needed, "nothing is excused that nobody asks for"
    assert not actions() & NOT_NEEDED.keys()


def test_the_switch_may_do_what_deleting_the_clusters_stack_takes() -> None:
    """It works when nobody looks: a right that is missing there goes on costing."""
    kinds = {resource["Type"] for resource in parsed("cluster.yaml")["Resources"].values()}
    needed = {action for kind in kinds for action in handlers(kind)["delete"]["permissions"]}
    own = {
        action
        for policy in parsed("guard.yaml")["Resources"]["DeletionRole"]["Properties"]["Policies"]
        for statement in policy["PolicyDocument"]["Statement"]
        for action in listed(statement["Action"])
    }
    tagging = {"ec2:CreateTags", "iam:TagRole"}
    assert needed - own - tagging - NOT_NEEDED.keys() == set()


@pytest.mark.parametrize("name", TEMPLATES)
def test_roles_and_their_managed_policies_are_those_of_the_templates(name: str) -> None:
    resources = parsed(name)["Resources"]
    roles = {key: one["Properties"] for key, one in resources.items() if one["Type"] == "AWS::IAM::Role"}
    owner = NAME if name == "cluster.yaml" else f"{NAME}-guard"
    for key, properties in roles.items():
        arn = f"arn:aws:iam::{ACCOUNT}:role/{owner}-{key}-1A2B3C4D5E6F"
        assert fnmatchcase(arn, STATEMENTS["RolesByStack"]["Resource"])
        for managed in properties.get("ManagedPolicyArns", ()):
            attach = STATEMENTS["ManagedPoliciesByStack"]
            assert any(fnmatchcase(arn, pattern) for pattern in attach["Resource"])
            policy = managed["Fn::Sub"].replace("${AWS::Partition}", "aws")
            assert policy in attach["Condition"]["ArnEquals"]["iam:PolicyARN"]


# --- and little else ------------------------------------------------------------------------------------------------


def test_it_is_a_policy_as_iam_knows_it_and_fits_into_one() -> None:
    """cfn-lint knows every action that there is; IAM counts no white space, and takes 6,144 characters."""

    def problems(policy: Any) -> list[Any]:
        made = {"Type": "AWS::IAM::ManagedPolicy", "Properties": {"PolicyDocument": policy}}
        return lint(json.dumps({"Resources": {"Policy": made}}), regions=[REGION])

    assert problems(POLICY) == []
    invented = {**STATEMENTS["Look"], "Action": "ec2:DescribeNothingAtAll"}
    assert problems({**POLICY, "Statement": [invented]}), "it would say something"
    assert len(re.sub(r"\s", "", json.dumps(POLICY))) <= 6144


def test_no_action_is_a_wildcard_and_everything_may_only_be_looked_at() -> None:
    assert not [action for action in actions() if "*" in action]
    for one in POLICY["Statement"]:
        if "*" in listed(one["Resource"]):
            assert all(re.match(r"[a-z0-9]+:(Describe|Get)", action) for action in listed(one["Action"])), one["Sid"]


def test_what_changes_anything_is_held_by_the_clusters_name_a_tag_or_cloudformation() -> None:
    for one in POLICY["Statement"]:
        if all(re.match(r"[a-z0-9]+:(Describe|Get|List)", action) for action in listed(one["Action"])):
            continue
        named = all("gpulab-" in resource for resource in listed(one["Resource"]))
        held = json.dumps(one.get("Condition", {}))
        assert named or any(word in held for word in ("aws:CalledVia", "aws:ResourceTag/", "AWSServiceName")), one[
            "Sid"
        ]


def test_roles_go_only_to_the_services_that_wear_them() -> None:
    passing = [one for one in POLICY["Statement"] if "iam:PassRole" in listed(one["Action"])]
    assert len(passing) == 2
    for one in passing:
        assert all("gpulab-" in resource for resource in listed(one["Resource"]))
        assert one["Condition"]["StringEquals"]["iam:PassedToService"]
