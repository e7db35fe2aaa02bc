"""A cluster's life against moto: up, adopted, down, and every way in which that can be cut off."""

from __future__ import annotations

import ast
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends

from pytest_gpulab.aws import leaks, stack, switch
from pytest_gpulab.aws.cluster import find_cluster, machines_of, require_usable
from pytest_gpulab.aws.errors import AwsError, CredentialsError, DeadlineError
from pytest_gpulab.aws.ledger import ClusterLedger, clusters_folder, open_ledger
from pytest_gpulab.aws.lifecycle import bring_up, make_cluster, site_of, tear_down
from pytest_gpulab.aws.reap import find_left, find_site, reap, reap_cluster
from pytest_gpulab.aws.stack import CLUSTER_TAG, RUN_TAG, StackError
from pytest_gpulab.cli import main
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.process import Process
from pytest_gpulab.kube.state import ledger_path
from pytest_gpulab.kube.teardown import Teardown
from tests.aws import moto_eks
from tests.aws.conftest import REGION, SECRET, SESSION_TOKEN, make_plan


@pytest.fixture(autouse=True)
def _no_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    """moto's clusters have no API server: the way in is tested by test_auth."""
    monkeypatch.setattr("pytest_gpulab.aws.lifecycle.connect", lambda *_: "the way in")


def everything(clients: Any) -> dict[str, int]:
    """What exists in the account and region that a lab could have made, counted by AWS's own answers."""
    ec2 = clients("ec2")
    running = [
        one
        for reservation in ec2.describe_instances()["Reservations"]
        for one in reservation["Instances"]
        if one["State"]["Name"] != "terminated"
    ]
    own_vpcs = [one["VpcId"] for one in ec2.describe_vpcs()["Vpcs"] if not one["IsDefault"]]
    gateways = [one for one in ec2.describe_nat_gateways()["NatGateways"] if one["State"] != "deleted"]
    found = {
        "stacks": clients("cloudformation").describe_stacks()["Stacks"],
        "clusters": clients("eks").list_clusters()["clusters"],
        "access entries": list(moto_eks.AccessEntry.existing),
        "schedules": clients("scheduler").list_schedules()["Schedules"],
        "roles": clients("iam").list_roles()["Roles"],
        "VPCs": own_vpcs,
        "NAT gateways": gateways,
        "addresses": ec2.describe_addresses()["Addresses"],
        "instances": running,
        "volumes": ec2.describe_volumes()["Volumes"],
        "load balancers": clients("elbv2").describe_load_balancers()["LoadBalancers"],
        "target groups": clients("elbv2").describe_target_groups()["TargetGroups"],
    }
    return {name: len(one) for name, one in found.items() if one}


def test_up_and_down(clients, plan, clock):
    ledger = open_ledger(site_of(plan))
    assert bring_up(clients, plan, ledger, clock=clock) == "the way in"

    cluster = find_cluster(clients, "lab")
    assert cluster["computeConfig"] == {
        "enabled": True,
        "nodePools": ["general-purpose", "system"],
        "nodeRoleArn": cluster["computeConfig"]["nodeRoleArn"],
    }
    assert cluster["resourcesVpcConfig"]["publicAccessCidrs"] == ["203.0.113.7/32"]
    assert len(machines_of(cluster).subnets) == 3
    (entry,) = moto_eks.AccessEntry.existing.values()
    assert entry["PrincipalArn"] == plan.identity.principal_arn
    tags = stack.find(clients, "lab").tags
    assert (tags[CLUSTER_TAG], tags[RUN_TAG]) == ("lab", "run-1")

    removed = tear_down(clients, ledger, clock=clock)
    assert removed == ["stack lab", "stack lab-guard"]
    assert everything(clients) == {}
    assert not ledger.path.exists()


def test_nodes_are_in_three_zones_without_public_addresses(clients, plan, clock):
    make_cluster(clients, plan, clock)
    ids = find_cluster(clients, "lab")["resourcesVpcConfig"]["subnetIds"]
    subnets = clients("ec2").describe_subnets(SubnetIds=ids)["Subnets"]
    assert {one["AvailabilityZone"] for one in subnets} == set(plan.zones)
    assert not any(one["MapPublicIpOnLaunch"] for one in subnets)


def test_pods_read_weights_from_the_bucket_and_nothing_else(clients, plan, clock):
    plan = replace(plan, request=replace(plan.request, model_bucket="weights"))
    ledger = open_ledger(site_of(plan))
    bring_up(clients, plan, ledger, clock=clock)
    (association,) = moto_eks.PodIdentityAssociation.existing.values()
    assert (association["Namespace"], association["ServiceAccount"]) == ("gpulab", "vllm")
    role = association["RoleArn"].rsplit("/", 1)[-1]
    policy = clients("iam").get_role_policy(RoleName=role, PolicyName="read-model-weights")["PolicyDocument"]
    statements = ast.literal_eval(policy)["Statement"]  # moto keeps a template's policy as Python wrote it
    allowed = {one["Action"]: one["Resource"] for one in statements}
    assert allowed == {"s3:ListBucket": "arn:aws:s3:::weights", "s3:GetObject": "arn:aws:s3:::weights/*"}
    tear_down(clients, ledger, clock=clock)
    assert everything(clients) == {}
    assert moto_eks.PodIdentityAssociation.existing == {}


def test_the_switch_is_armed_before_the_cluster_and_deletes_its_stack(clients, plan, clock):
    moto_eks.FAIL_CREATION["AWS::EKS::Cluster"] = "no"
    with pytest.raises(StackError):
        make_cluster(clients, plan, clock)
    schedule = clients("scheduler").get_schedule(Name="lab-dead-man")
    assert schedule["Target"]["Arn"] == "arn:aws:scheduler:::aws-sdk:cloudformation:deleteStack"
    assert '"StackName": "lab"' in schedule["Target"]["Input"]
    assert "DeletionRole" in schedule["Target"]["Input"]


def test_a_heartbeat_moves_the_switch(clients, plan, clock):
    make_cluster(clients, plan, clock)
    switch.move(clients, "lab", 1_800_000_000.0)
    # 1.8e9 s after the epoch, from any calendar.
    schedule = clients("scheduler").get_schedule(Name="lab-dead-man")
    assert schedule["ScheduleExpression"] == "at(2027-01-15T08:00:00)"
    assert '"StackName": "lab"' in schedule["Target"]["Input"]


def test_a_heartbeat_without_a_switch_ends_the_run(clients, plan, clock):
    make_cluster(clients, plan, clock)
    clients("scheduler").delete_schedule(Name="lab-dead-man")
    with pytest.raises(AwsError, match="the run must end"):
        switch.move(clients, "lab", 1_800_000_000.0)


def test_an_adopted_cluster_is_never_deleted(clients, plan, clock):
    make_cluster(clients, plan, clock)
    before = everything(clients)
    adopted = make_plan(adopt=True, run="run-2")
    ledger = open_ledger(site_of(adopted))
    assert bring_up(clients, adopted, ledger, clock=clock) == "the way in"
    assert tear_down(clients, ledger, clock=clock) == []
    assert everything(clients) == before
    assert not ledger.path.exists()


def test_what_has_drifted_is_not_adopted(clients, plan, clock):
    make_cluster(clients, plan, clock)
    from moto.eks.models import eks_backends

    cluster = eks_backends[DEFAULT_ACCOUNT_ID][REGION].clusters["lab"]
    cluster.compute_config = {"enabled": False}
    cluster.access_config = {"authenticationMode": "CONFIG_MAP"}
    with pytest.raises(AwsError, match=r"compute must be enabled; its authentication mode must be API.*CONFIG_MAP"):
        require_usable(clients, "lab")


def test_what_kubernetes_left_in_the_network_is_swept(clients, plan, clock):
    """The controllers died with the cluster: load balancer, group and volume stay, and hold the VPC."""
    ledger = open_ledger(site_of(plan))
    bring_up(clients, plan, ledger, clock=clock)
    plant_leftovers(clients)
    tear_down(clients, ledger, clock=clock)
    assert everything(clients) == {}


def plant_leftovers(clients: Any, name: str = "lab") -> None:
    """What Auto Mode makes outside of the stack, tagged as it tags."""
    ec2, elb = clients("ec2"), clients("elbv2")
    subnets = find_cluster(clients, name)["resourcesVpcConfig"]["subnetIds"]
    vpc = ec2.describe_subnets(SubnetIds=subnets[:1])["Subnets"][0]["VpcId"]
    tag = {"Key": "eks:eks-cluster-name", "Value": name}

    def specification(kind: str) -> list[dict[str, Any]]:
        return [{"ResourceType": kind, "Tags": [tag]}]

    group = ec2.create_security_group(
        GroupName="k8s-alb", Description="of the ALB", VpcId=vpc, TagSpecifications=specification("security-group")
    )["GroupId"]
    elb.create_load_balancer(Name="k8s-alb", Subnets=subnets, SecurityGroups=[group], Tags=[tag])
    elb.create_target_group(Name="k8s-target", Protocol="HTTP", Port=8000, VpcId=vpc, Tags=[tag])
    ec2.create_volume(Size=20, AvailabilityZone=f"{REGION}a", TagSpecifications=specification("volume"))
    ec2.run_instances(
        ImageId=next(iter(ec2_backends[DEFAULT_ACCOUNT_ID][REGION].amis)),
        InstanceType="g4dn.xlarge",
        SubnetId=subnets[0],
        MinCount=1,
        MaxCount=1,
        TagSpecifications=specification("instance"),
    )


def test_the_scan_lists_what_is_left_and_its_cost(clients, plan, clock):
    make_cluster(clients, plan, clock)
    plant_leftovers(clients)
    found = {leak.kind: leak for leak in leaks.scan(clients, site_of(plan))}
    assert {"instance", "load balancer", "target group", "volume", "security group", "NAT gateway"} <= set(found)
    # moto has no price list: an instance is shown all the same.
    assert found["instance"].usd_per_hour is None
    assert found["load balancer"].usd_per_hour == 0.0225
    assert found["volume"].usd_per_hour == pytest.approx(20 * 0.08 / 730)
    with pytest.raises(leaks.LeakError, match=r"(?s)resources are left.*load balancer .*0\.0225 USD/h"):
        leaks.require_none(clients, site_of(plan), deadline_s=60, clock=clock)


def test_a_load_balancer_that_goes_while_one_looks_hides_no_other(clients, plan, clock, monkeypatch):
    """Listed a moment ago and gone since: AWS then tells no tags of the others that were asked about with it."""
    make_cluster(clients, plan, clock)
    plant_leftovers(clients)
    elb = clients("elbv2")
    balancer = elb.describe_load_balancers()["LoadBalancers"][0]
    gone = balancer["LoadBalancerArn"].replace("k8s-alb", "gone")
    pages = [{"LoadBalancers": [{"LoadBalancerArn": gone}, balancer]}]
    paginator = elb.get_paginator

    def listed(operation: str) -> Any:
        stale = SimpleNamespace(paginate=lambda: pages)
        return stale if operation == "describe_load_balancers" else paginator(operation)

    def described(ResourceArns: list[str]) -> Any:  # moto forgives
        if gone in ResourceArns:
            raise ClientError({"Error": {"Code": "LoadBalancerNotFound", "Message": "gone"}}, "DescribeTags")
        return describe_tags(ResourceArns=ResourceArns)

    describe_tags = elb.describe_tags
    monkeypatch.setattr(elb, "describe_tags", described)
    monkeypatch.setattr(elb, "get_paginator", listed)
    found = [leak.id for leak in leaks.scan(clients, site_of(plan)) if leak.kind == "load balancer"]
    assert found == [balancer["LoadBalancerArn"]]


def test_a_load_balancer_that_lets_go_late_is_waited_for(clients, plan, clock, refuse):
    ledger = open_ledger(site_of(plan))
    bring_up(clients, plan, ledger, clock=clock)
    plant_leftovers(clients)
    refuse(
        clients("ec2"), "DeleteSecurityGroup", "DependencyViolation", "resource sg has a dependent object", times=3
    )
    tear_down(clients, ledger, clock=clock)
    assert everything(clients) == {}


def test_of_an_adopted_cluster_only_the_runs_own_things_are_swept(clients, plan, clock):
    make_cluster(clients, plan, clock)
    ec2 = clients("ec2")
    tags = [{"Key": RUN_TAG, "Value": "run-2"}]
    ec2.create_volume(
        Size=20, AvailabilityZone=f"{REGION}a", TagSpecifications=[{"ResourceType": "volume", "Tags": tags}]
    )
    kept = ec2.create_volume(Size=20, AvailabilityZone=f"{REGION}a")["VolumeId"]
    tear_down(clients, open_ledger(site_of(make_plan(adopt=True, run="run-2"))), clock=clock)
    assert [volume["VolumeId"] for volume in ec2.describe_volumes()["Volumes"]] == [kept]


def test_another_clusters_resources_are_nobodys_leak(clients, plan, clock):
    make_cluster(clients, make_plan("other"), clock)
    plant_leftovers(clients, "other")
    assert leaks.scan(clients, site_of(plan)) == []


class TestFaults:
    """Each ends in an error that says what to do, and in a ledger from which reap finishes."""

    @pytest.fixture(autouse=True)
    def _dead_session(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ClusterLedger, "owner_lives", lambda _: False)

    @pytest.fixture
    def ledger(self, plan) -> ClusterLedger:
        return open_ledger(site_of(plan))

    def finishes(self, clients, clock, ledger) -> None:
        reap_cluster(clients, "lab", REGION, clock=clock)
        assert everything(clients) == {}
        assert not ledger.path.exists()

    def test_a_resource_that_fails(self, clients, plan, clock, ledger):
        reason = "User: arn:aws:sts::1:assumed-role/r/s is not authorized to perform: eks:CreateCluster"
        moto_eks.FAIL_CREATION["AWS::EKS::Cluster"] = reason
        with pytest.raises(
            StackError, match=r"lab is CREATE_FAILED: Cluster \(AWS::EKS::Cluster\): .*eks:CreateCluster"
        ):
            bring_up(clients, plan, ledger, clock=clock)
        moto_eks.FAIL_CREATION.clear()
        self.finishes(clients, clock, ledger)

    def test_a_clock_that_is_wrong(self, clients, plan, clock, ledger, refuse):
        said = "Signature expired: 20261125T200000Z is now earlier than 20261125T201500Z (20261125T202000Z - 5 min.)"
        accept = refuse(clients("cloudformation"), "CreateStack", "SignatureDoesNotMatch", said)
        with pytest.raises(AwsError, match=r"This machine's clock must agree with AWS's"):
            bring_up(clients, plan, ledger, clock=clock)
        accept()
        self.finishes(clients, clock, ledger)

    @pytest.mark.parametrize("operation", ["CreateStack", "DescribeStacks"])
    def test_access_denied(self, clients, plan, clock, ledger, operation, refuse):
        accept = refuse(clients("cloudformation"), operation, "AccessDenied", "not allowed to")
        with pytest.raises(AwsError, match=r"lab-guard.*: AWS said AccessDenied: not allowed to\..*docs/eks\.md"):
            bring_up(clients, plan, ledger, clock=clock)
        accept()
        self.finishes(clients, clock, ledger)

    def test_an_expired_token_in_mid_way(self, clients, plan, clock, ledger, refuse):
        cloudformation = clients("cloudformation")
        make_cluster(clients, plan, clock)
        accept = refuse(cloudformation, "DeleteStack", "ExpiredToken", "The security token is expired")
        with pytest.raises(CredentialsError, match="sign in, then repeat"):
            tear_down(clients, ledger, clock=clock)
        assert ledger.path.exists()
        accept()
        self.finishes(clients, clock, ledger)

    def test_throttling_is_waited_out(self, clients, plan, clock, ledger, refuse):
        refuse(clients("cloudformation"), "CreateStack", "Throttling", "Rate exceeded", times=5)
        bring_up(clients, plan, ledger, clock=clock)
        self.finishes(clients, clock, ledger)

    def test_throttling_that_does_not_end(self, clients, plan, clock, ledger, refuse):
        accept = refuse(clients("cloudformation"), "CreateStack", "Throttling", "Rate exceeded")
        with pytest.raises(AwsError, match="through every retry"):
            bring_up(clients, plan, ledger, clock=clock)
        accept()
        self.finishes(clients, clock, ledger)

    def test_a_stack_that_aws_does_not_show_yet(self, clients, plan, clock, ledger, refuse):
        refuse(
            clients("cloudformation"),
            "DescribeStacks",
            "ValidationError",
            "Stack with id lab does not exist",
            times=2,
        )
        bring_up(clients, plan, ledger, clock=clock)
        self.finishes(clients, clock, ledger)

    def test_a_stack_that_is_not_ready_in_time(self, clients, plan, clock, monkeypatch, ledger):
        monkeypatch.setattr("moto.cloudformation.models.Stack.mark_creation_complete", lambda _: None)
        with pytest.raises(DeadlineError, match="lab-guard was still CREATE_IN_PROGRESS after 300 s"):
            bring_up(clients, plan, ledger, clock=clock)
        self.finishes(clients, clock, ledger)

    def test_a_stack_that_cannot_be_deleted(self, clients, plan, clock, ledger):
        bring_up(clients, plan, ledger, clock=clock)
        ec2 = clients("ec2")
        (vpc,) = [one["VpcId"] for one in ec2.describe_vpcs()["Vpcs"] if not one["IsDefault"]]
        foreign = ec2.create_security_group(GroupName="somebody's", Description="not ours", VpcId=vpc)["GroupId"]
        with pytest.raises(StackError, match=r"(?s)Vpc \(AWS::EC2::VPC\): .*has dependencies.*Left behind: .*Vpc \("):
            tear_down(clients, ledger, clock=clock)
        assert clients("scheduler").get_schedule(Name="lab-dead-man")  # armed while the stack is there
        ec2.delete_security_group(GroupId=foreign)
        self.finishes(clients, clock, ledger)

    def test_a_stack_of_somebody_elses_is_left_alone(self, clients, plan, clock, ledger):
        make_cluster(clients, make_plan(run="run-of-a-colleague"), clock)
        before = everything(clients)
        with pytest.raises(AwsError, match="lab-guard belongs to run-of-a-colleague, not to run-1"):
            bring_up(clients, plan, ledger, clock=clock)
        with pytest.raises(AwsError, match=r"gpulab.dev/run=run-1, but has run-of-a-colleague"):
            tear_down(clients, ledger, clock=clock)
        assert everything(clients) == before


def test_reap_needs_nothing_but_the_name(clients, plan, clock):
    """The machine with the ledger is lost."""
    make_cluster(clients, plan, clock)
    plant_leftovers(clients)
    site = find_site(clients, "lab", REGION)
    assert site.run == "run-1"
    listed = find_left(clients, site)
    assert listed[:2] == ["stack lab (CREATE_COMPLETE)", "stack lab-guard (CREATE_COMPLETE)"]
    assert any(line.startswith("load balancer") for line in listed)
    assert find_cluster(clients, "lab") is not None  # looking removes nothing
    reap_cluster(clients, "lab", REGION, clock=clock)
    assert everything(clients) == {}
    assert find_left(clients, site) == []


def test_reap_leaves_a_cluster_alone_that_no_stack_of_the_lab_made(clients, plan, clock):
    """Somebody's own, as one adopts it: there is no ledger of it here, and its machines carry its name."""
    make_cluster(clients, make_plan("other"), clock)  # for its network
    subnets = find_cluster(clients, "other")["resourcesVpcConfig"]["subnetIds"]
    role = clients("iam").create_role(RoleName="theirs", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    clients("eks").create_cluster(name="theirs", roleArn=role, resourcesVpcConfig={"subnetIds": subnets})
    plant_leftovers(clients, "theirs")
    before = everything(clients)
    with pytest.raises(
        AwsError, match="no stack of the lab made the EKS cluster theirs, so nothing of it is removed"
    ):
        reap_cluster(clients, "theirs", REGION, clock=clock)
    assert everything(clients) == before
    with pytest.raises(AwsError, match="no stack of the lab"):  # nor is it shown as something left
        find_left(clients, find_site(clients, "theirs", REGION))


def test_reap_after_the_switch_has_fired(clients, plan, clock, monkeypatch):
    ledger = open_ledger(site_of(plan))
    bring_up(clients, plan, ledger, clock=clock)
    clients("cloudformation").delete_stack(StackName="lab")
    monkeypatch.setattr(ClusterLedger, "owner_lives", lambda _: False)
    reap_cluster(clients, "lab", REGION, clock=clock)
    assert everything(clients) == {}
    assert not ledger.path.exists()


def test_a_living_sessions_cluster_is_not_reaped(clients, plan, clock):
    ledger = open_ledger(site_of(plan))
    bring_up(clients, plan, ledger, clock=clock)
    with pytest.raises(AwsError, match="is alive"):
        reap_cluster(clients, "lab", REGION, clock=clock)
    assert find_cluster(clients, "lab") is not None


def test_a_cluster_of_a_machine_that_cannot_be_seen_is_reaped_when_told(clients, plan, clock, capsys, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("pytest_gpulab.kube.process.here", lambda: "another-boot/1")
        elsewhere.setattr("socket.gethostname", lambda: "laptop")
        ledger = open_ledger(site_of(plan))
    make_cluster(clients, plan, clock)
    with pytest.raises(AwsError, match=r"lab was begun on laptop, which cannot be seen from here: .* add --dead"):
        reap_cluster(clients, "lab", REGION, clock=clock)
    assert main(["reap"]) == 1
    assert "lab: begun on laptop, which cannot be seen from here" in capsys.readouterr().out
    assert find_cluster(clients, "lab") is not None
    reap_cluster(clients, "lab", REGION, dead=True, clock=clock)
    assert everything(clients) == {}
    assert not ledger.path.exists()


def test_reap_in_the_wrong_region_says_where(clients, plan):
    open_ledger(site_of(plan))
    with pytest.raises(AwsError, match="--region us-west-2"):
        reap_cluster(clients, "lab", "eu-north-1")


def test_two_sessions_cannot_have_one_cluster(plan):
    open_ledger(site_of(plan))
    with pytest.raises(FileExistsError, match="gpulab reap --cluster lab --region us-west-2"):
        open_ledger(site_of(plan))


def test_no_secret_on_disk_or_in_the_logs(clients, plan, clock, caplog, refuse):
    caplog.set_level("INFO")
    ledger = open_ledger(site_of(plan))
    bring_up(clients, plan, ledger, clock=clock)
    accept = refuse(clients("cloudformation"), "DeleteStack", "ExpiredToken", "expired")
    with pytest.raises(CredentialsError) as error:
        tear_down(clients, ledger, clock=clock)
    accept()
    written = [path.read_bytes() for path in clusters_folder().rglob("*") if path.is_file()]
    assert len(written) == 2  # the ledger and the kubeconfig
    said = [caplog.text.encode(), str(error.value).encode()]
    for planted in (SECRET, SESSION_TOKEN, os.environ["AWS_ACCESS_KEY_ID"], "k8s-aws-v1."):
        assert not any(planted.encode() in text for text in [*written, *said])
    assert oct(ledger.path.stat().st_mode)[-3:] == "600"
    assert isinstance(ledger.kubeconfig, Path)


class TestRuns:
    """What runs made in the cluster goes first, by the teardown of kube/."""

    @pytest.fixture
    def ledger(self, clients, plan, clock) -> ClusterLedger:
        make_cluster(clients, plan, clock)
        return open_ledger(site_of(plan))

    @pytest.fixture
    def run(self, ledger) -> Ledger:
        run = Ledger.create(ledger_path("run-1"), Process.of(os.getpid()))
        run.cluster(ledger.kubeconfig, 1.0)
        return run

    def test_runs_end_before_their_cluster(self, clients, clock, ledger, run, monkeypatch):
        order = []

        def drain(one: Ledger) -> Teardown:
            order.append((one.run, find_cluster(clients, "lab") is not None))
            one.remove()
            return Teardown(removed=["Deployment gpulab/vllm"])

        monkeypatch.setattr("pytest_gpulab.kube.teardown.tear_down", drain)
        elsewhere = Ledger.create(ledger_path("run-of-another-cluster"), Process.of(os.getpid()))
        elsewhere.cluster(Path("/somewhere/else"), 1.0)
        removed = tear_down(clients, ledger, clock=clock)
        assert order == [("run-1", True)]
        assert removed == ["Deployment gpulab/vllm", "stack lab", "stack lab-guard"]
        assert elsewhere.path.exists()

    def test_what_cannot_be_drained_goes_with_its_cluster(self, clients, clock, ledger, run, monkeypatch):
        stuck = Teardown(problems=["no answer from the API server"])
        monkeypatch.setattr("pytest_gpulab.kube.teardown.tear_down", lambda _: stuck)
        tear_down(clients, ledger, clock=clock)
        assert everything(clients) == {}
        assert not run.path.exists()

    def test_what_cannot_be_drained_from_an_adopted_cluster_is_said(self, clients, plan, clock, monkeypatch):
        make_cluster(clients, plan, clock)
        ledger = open_ledger(site_of(make_plan(adopt=True, run="run-2")))
        run = Ledger.create(ledger_path("run-2"), Process.of(os.getpid()))
        run.cluster(ledger.kubeconfig, 1.0)
        stuck = Teardown(problems=["NodePool gpu-spot is still there"])
        monkeypatch.setattr("pytest_gpulab.kube.teardown.tear_down", lambda _: stuck)
        with pytest.raises(AwsError, match="lab still has of this run: NodePool gpu-spot is still there"):
            tear_down(clients, ledger, clock=clock)
        assert ledger.path.exists() and run.path.exists()
        assert find_cluster(clients, "lab") is not None


def test_a_session_killed_before_its_first_line_leaves_nothing(clients, clock):
    ledger = ClusterLedger.create(clusters_folder() / "lab.jsonl", Process(pid=1, started=0.0))
    reap_cluster(clients, "lab", REGION, clock=clock)
    assert not ledger.path.exists()


def test_the_reap_command_shows_first_and_acts_when_told(clients, plan, clock, capsys, monkeypatch):
    monkeypatch.setattr("pytest_gpulab.aws.reap.make_clients", lambda _: clients)
    with pytest.raises(ValueError, match="say --region"):
        reap("lab", None, act=False)
    make_cluster(clients, plan, clock)
    open_ledger(site_of(plan))
    monkeypatch.setattr(ClusterLedger, "owner_lives", lambda _: False)
    assert reap("lab", None, act=False) == 1
    shown = capsys.readouterr().out
    assert "stack lab (CREATE_COMPLETE)" in shown and "NAT gateway" in shown and "repeat with --yes" in shown
    assert reap("lab", None, act=True) == 0
    assert everything(clients) == {}
    assert reap("lab", REGION, act=False) == 0
    assert "nothing is left of lab" in capsys.readouterr().out
