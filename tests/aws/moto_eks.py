"""What moto lacks of CloudFormation: EKS and Scheduler resources that really exist, and stacks that can fail.

moto skips unknown types and calls the stack complete, and lets a failing one escape as an HTTP error. Here a failure
leaves events and a status, as AWS does with OnFailure=DO_NOTHING, a VPC in use cannot be deleted, and what the stack
made of the network is deleted with it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from moto.cloudformation.models import CloudFormationBackend, Stack
from moto.core.common_models import CloudFormationModel
from moto.ec2.models import ec2_backends
from moto.ec2.models.nat_gateways import NatGatewayBackend
from moto.eks.models import Cluster, eks_backends
from moto.elbv2.models import elbv2_backends
from moto.scheduler.models import scheduler_backends


class _Resource:
    """A CloudFormation resource kept in another backend under `physical_resource_id`.

    No model itself: moto knows the direct subclasses of CloudFormationModel only.
    """

    TYPE = ""
    NAME = ""

    def __init__(self, physical_resource_id: str) -> None:
        self.physical_resource_id = physical_resource_id

    @classmethod
    def cloudformation_type(cls) -> str:
        return cls.TYPE

    @classmethod
    def cloudformation_name_type(cls) -> str:
        return cls.NAME

    @classmethod
    def has_cfn_attr(cls, attr: str) -> bool:
        return attr == "Arn"


class EksCluster(_Resource, CloudFormationModel):
    """AWS::EKS::Cluster: what the template says is what DescribeCluster answers."""

    TYPE, NAME = "AWS::EKS::Cluster", "Name"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.name)
        self.cluster = cluster

    def get_cfn_attribute(self, name: str) -> str:
        return {"Arn": self.cluster.arn}[name]

    @classmethod
    def create_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str, **_: Any
    ) -> EksCluster:
        wanted = cloudformation_json["Properties"]
        network = wanted["ResourcesVpcConfig"]
        cluster = eks_backends[account_id][region_name].create_cluster(
            name=wanted["Name"],
            role_arn=wanted["RoleArn"],
            resources_vpc_config={
                "subnetIds": network["SubnetIds"],
                "publicAccessCidrs": network["PublicAccessCidrs"],
                "clusterSecurityGroupId": "sg-of-the-cluster",
            },
            kubernetes_network_config=_camel(wanted["KubernetesNetworkConfig"]),
        )
        for attribute, property_name in (
            ("compute_config", "ComputeConfig"),
            ("storage_config", "StorageConfig"),
            ("access_config", "AccessConfig"),
        ):
            setattr(cluster, attribute, _camel(wanted[property_name]))
        if API_SERVER:
            cluster.endpoint = API_SERVER["endpoint"]
            cluster.certificate_authority = {"data": API_SERVER["authority"]}
        return cls(cluster)

    @classmethod
    def delete_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str
    ) -> None:
        """Auto Mode takes its instances along (EKS user guide, 'Delete a cluster')."""
        eks_backends[account_id][region_name].delete_cluster(resource_name)
        ec2 = ec2_backends[account_id][region_name]
        tag = {"key": "eks:eks-cluster-name", "value": resource_name}
        owned = [one.id for one in ec2.all_instances() if tag in one.get_tags()]
        if owned:
            ec2.terminate_instances(owned)


class _OfCluster(_Resource):
    """What exists within a cluster, in this process only: moto's EKS does not know it."""

    existing: ClassVar[dict[str, dict[str, Any]]]

    @classmethod
    def create_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str, **_: Any
    ) -> _OfCluster:
        wanted = cloudformation_json["Properties"]
        assert wanted["ClusterName"] in eks_backends[account_id][region_name].clusters
        cls.existing[resource_name] = wanted
        return cls(resource_name)

    @classmethod
    def delete_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str
    ) -> None:
        del cls.existing[resource_name]


class AccessEntry(_OfCluster, CloudFormationModel):
    """AWS::EKS::AccessEntry."""

    TYPE = "AWS::EKS::AccessEntry"
    existing: ClassVar[dict[str, dict[str, Any]]] = {}


class PodIdentityAssociation(_OfCluster, CloudFormationModel):
    """AWS::EKS::PodIdentityAssociation."""

    TYPE = "AWS::EKS::PodIdentityAssociation"
    existing: ClassVar[dict[str, dict[str, Any]]] = {}


class Schedule(_Resource, CloudFormationModel):
    """AWS::Scheduler::Schedule."""

    TYPE, NAME = "AWS::Scheduler::Schedule", "Name"

    @classmethod
    def create_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str, **_: Any
    ) -> Schedule:
        wanted = cloudformation_json["Properties"]
        scheduler_backends[account_id][region_name].create_schedule(
            name=wanted["Name"],
            schedule_expression=wanted["ScheduleExpression"],
            flexible_time_window=wanted["FlexibleTimeWindow"],
            target=wanted["Target"],
            **dict.fromkeys(("description", "end_date", "group_name", "kms_key_arn", "start_date", "state")),
            schedule_expression_timezone="UTC",
            action_after_completion=None,
        )
        return cls(wanted["Name"])

    @classmethod
    def delete_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str
    ) -> None:
        scheduler_backends[account_id][region_name].delete_schedule(None, resource_name)


API_SERVER: dict[str, str] = {}
"""Where new clusters answer, as `endpoint` and `authority` (base64), if anywhere."""
FAIL_CREATION: dict[str, str] = {}
"""AWS's reason by the type of a resource that is to fail."""


def install() -> None:
    """Make stacks fail as AWS's do, and forget what another account had."""
    for kind in (AccessEntry, PodIdentityAssociation):
        kind.existing.clear()
    FAIL_CREATION.clear()
    API_SERVER.clear()
    NatGatewayBackend.describe_nat_gateways = _tagged_gateways
    Stack.create_resources = _create_resources
    Stack.delete = _delete
    CloudFormationBackend.delete_stack = _delete_stack


_every_gateway = NatGatewayBackend.describe_nat_gateways


def _tagged_gateways(ec2: Any, filters: Any, nat_gateway_ids: Any) -> Any:
    """moto ignores filters by tag."""
    tags = {name[4:]: values for name, values in (filters or {}).items() if name.startswith("tag:")}
    others = {name: values for name, values in (filters or {}).items() if not name.startswith("tag:")}
    return [
        one
        for one in _every_gateway(ec2, others, nat_gateway_ids)
        if all(one.get_filter_value(f"tag:{key}") in values for key, values in tags.items())
    ]


def _create_resources(stack: Stack) -> None:
    stack.status = "CREATE_IN_PROGRESS"
    refused = [
        (name, one["Type"], FAIL_CREATION[one["Type"]])
        for name, one in stack.template_dict["Resources"].items()
        if one["Type"] in FAIL_CREATION
    ]
    if refused:
        for name, kind, reason in refused:
            _event(stack, "CREATE_FAILED", name, kind, reason)
        stack.status = "CREATE_FAILED"
        stack.status_reason = "The following resource(s) failed to create"
        return
    stack.resource_map.create(stack.template_dict)
    stack.mark_creation_complete()


_forget_stack = CloudFormationBackend.delete_stack


def _delete_stack(cloudformation: CloudFormationBackend, name_or_stack_id: str) -> None:
    """A stack that something holds stays, as DELETE_FAILED."""
    for stack in list(cloudformation.stacks.values()):
        if name_or_stack_id in (stack.name, stack.stack_id):
            held = _held(stack)
            for name, kind, reason in held:
                _event(stack, "DELETE_FAILED", name, kind, reason)
            if held:
                stack.status = "DELETE_FAILED"
                return
    _forget_stack(cloudformation, name_or_stack_id)


def _delete(stack: Stack) -> None:
    _delete_network(stack)
    stack.resource_map.delete()
    stack.status = "DELETE_COMPLETE"


def _delete_network(stack: Stack) -> None:
    """What moto's CloudFormation makes and forgets to delete."""
    ec2 = ec2_backends[stack.account_id][stack.region_name]

    def made(kind: str) -> list[Any]:
        return [
            stack.resource_map._parsed_resources[name]
            for name, one in stack.template_dict["Resources"].items()
            if one["Type"] == kind and name in stack.resource_map._parsed_resources
        ]

    for endpoint in made("AWS::EC2::VPCEndpoint"):
        ec2.vpc_end_points.pop(endpoint.id)
    for gateway in made("AWS::EC2::NatGateway"):
        ec2.delete_nat_gateway(gateway.id)
        ec2.enis.pop(gateway._eni.id, None)
    for address in made("AWS::EC2::EIP"):
        ec2.disassociate_address(association_id=address.association_id)
        ec2.release_address(allocation_id=address.allocation_id)
    for table in made("AWS::EC2::RouteTable"):
        for association in list(table._associations):
            ec2.disassociate_route_table(association)
        ec2.delete_route_table(table.id)
    for gateway in made("AWS::EC2::InternetGateway"):
        ec2.detach_internet_gateway(gateway.id, gateway.vpc.id)
        ec2.delete_internet_gateway(gateway.id)


def _held(stack: Stack) -> list[tuple[str, str, str]]:
    """A VPC with a load balancer, an interface or a group of somebody else's in it."""
    vpc = stack.resource_map._parsed_resources.get("Vpc")
    if vpc is None:
        return []
    ec2 = ec2_backends[stack.account_id][stack.region_name]
    groups = [one for one in ec2.describe_security_groups() if one.vpc_id == vpc.id and one.name != "default"]
    balancers = elbv2_backends[stack.account_id][stack.region_name].load_balancers.values()
    if groups or any(one.vpc_id == vpc.id for one in balancers):
        reason = f"The vpc '{vpc.id}' has dependencies and cannot be deleted. (Service: Ec2, Status Code: 400)"
        return [("Vpc", "AWS::EC2::VPC", reason)]
    return []


def _event(stack: Stack, status: str, name: str, kind: str, reason: str) -> None:
    stack._add_stack_event(status, reason, None)
    stack.events[-1].logical_resource_id = name
    stack.events[-1].resource_type = kind
    stack.events[-1].physical_resource_id = f"physical-{name}"


def _camel(config: Any) -> Any:
    """CloudFormation's names as the API spells them."""
    if isinstance(config, dict):
        return {key[0].lower() + key[1:]: _camel(value) for key, value in config.items()}
    return config
