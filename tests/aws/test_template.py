"""The templates: valid, and with no more rights than AWS forces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cfnlint.api import lint
from cfnlint.decode import decode

from pytest_gpulab.aws import stack

FOLDER = Path(stack.__file__).parent
TEMPLATES = ("cluster.yaml", "guard.yaml")

# EC2's Describe actions have no resource-level permissions (service authorization reference of EC2).
FORCED_EVERYTHING = "ec2:Describe"


def parsed(name: str) -> dict[str, Any]:
    template, problems = decode(str(FOLDER / name))
    assert not problems
    return template


def statements(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each statement of each role's own policies, with the role's name."""
    for role, resource in parsed(name)["Resources"].items():
        for policy in resource.get("Properties", {}).get("Policies", ()):
            for statement in policy["PolicyDocument"]["Statement"]:
                yield role, statement


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def text(resource: Any) -> str:
    """A resource as written: a string, or what an intrinsic function is given."""
    return resource if isinstance(resource, str) else str(next(iter(resource.values())))


@pytest.mark.parametrize("name", TEMPLATES)
def test_cfn_lint_is_silent_in_regions_with_gpus(name):
    assert lint((FOLDER / name).read_text(encoding="utf-8"), regions=["us-east-1", "us-west-2"]) == []


def test_cfn_lint_would_say_something():
    broken = (FOLDER / "guard.yaml").read_text(encoding="utf-8").replace("FlexibleTimeWindow", "FlexibelTimeWindow")
    assert lint(broken, regions=["us-west-2"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_action_is_a_wildcard(name):
    actions = [action for _, statement in statements(name) for action in listed(statement["Action"])]
    assert actions
    assert not [action for action in actions if "*" in action]


@pytest.mark.parametrize("name", TEMPLATES)
def test_everything_is_a_resource_only_where_aws_knows_no_other(name):
    for _, statement in statements(name):
        if any(text(resource) == "*" for resource in listed(statement["Resource"])):
            assert all(action.startswith(FORCED_EVERYTHING) for action in listed(statement["Action"])), statement


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_wildcard_in_a_name_is_held_by_a_condition_or_by_the_clusters_name(name):
    for role, statement in statements(name):
        for resource in map(text, listed(statement["Resource"])):
            if "*" in resource and resource != "*":
                own = any(part in resource for part in ("${Cluster}", "${ModelBucket}"))
                assert own or "Condition" in statement, (role, resource)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_wildcard_is_justified_by_a_comment_above_its_statement(name):
    """A comment stands within the policy that has one, before the wildcard."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if ("!Sub arn:" in line and "*" in line) or line.strip() == 'Resource: "*"':
            above = lines[:number]
            policy = max(i for i, one in enumerate(above) if "PolicyName:" in one)
            commented = [one for one in [lines[policy - 1], *above[policy:]] if one.strip().startswith("#")]
            assert commented, f"{name}:{number + 1}: {line.strip()}"


def test_the_switch_can_delete_and_nothing_else():
    actions = {action for _, statement in statements("guard.yaml") for action in listed(statement["Action"])}
    verbs = {action.split(":")[1] for action in actions}
    harmless = ("Delete", "Describe", "Detach", "Disassociate", "Get", "List", "Release")
    assert {verb for verb in verbs if not verb.startswith(harmless)} == {"PassRole"}


def test_the_kubernetes_api_has_no_open_default():
    parameters = parsed("cluster.yaml")["Parameters"]
    assert "Default" not in parameters["ClientCidrs"]
    cluster = parsed("cluster.yaml")["Resources"]["Cluster"]["Properties"]
    assert cluster["ResourcesVpcConfig"]["PublicAccessCidrs"] == {"Ref": "ClientCidrs"}
    assert cluster["AccessConfig"]["BootstrapClusterCreatorAdminPermissions"] is False


def test_private_subnets_go_out_through_the_nat_gateway():
    """moto does not associate route tables, so the template itself is read."""
    resources = parsed("cluster.yaml")["Resources"]
    tables = {
        one["Properties"]["SubnetId"]["Ref"]: one["Properties"]["RouteTableId"]["Ref"]
        for one in resources.values()
        if one["Type"] == "AWS::EC2::SubnetRouteTableAssociation"
    }
    ways_out = {
        one["Properties"]["RouteTableId"]["Ref"]: set(one["Properties"]) & {"NatGatewayId", "GatewayId"}
        for one in resources.values()
        if one["Type"] == "AWS::EC2::Route"
    }
    nodes = [one["Ref"] for one in resources["Cluster"]["Properties"]["ResourcesVpcConfig"]["SubnetIds"]]
    assert [ways_out[tables[subnet]] for subnet in nodes] == [{"NatGatewayId"}] * 3
    gateway = resources["NatGateway"]["Properties"]["SubnetId"]["Ref"]
    assert ways_out[tables[gateway]] == {"GatewayId"}
