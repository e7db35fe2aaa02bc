"""Who is calling, and whether they may."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import AwsError, explained


@dataclass(frozen=True)
class Identity:
    """A caller: 12 digits of account, the ARN that STS names, and the ARN that an access entry needs."""

    account: str
    arn: str
    principal_arn: str


def identify(clients: Clients, allowed_accounts: Collection[str]) -> Identity:
    """The caller; AwsError unless the account is one of `allowed_accounts` (there is no default: name it)."""
    with explained("asking AWS who is calling"):
        answer = clients("sts").get_caller_identity()
    account, arn = answer["Account"], answer["Arn"]
    if account not in allowed_accounts:
        raise AwsError(
            f"the caller {arn} is in the account {account}, which is not one of those allowed: "
            f"{', '.join(sorted(allowed_accounts)) or 'none'}. Sign in to the right account, or allow this one."
        )
    return Identity(account, arn, _principal(clients, arn))


def _principal(clients: Clients, arn: str) -> str:
    """The role of a session. STS leaves its path out, so IAM is asked."""
    kind, _, rest = arn.partition(":assumed-role/")
    if not rest:
        return arn
    role = rest.split("/")[0]
    with explained(f"looking for the role {role} of {kind}"):
        return str(clients("iam").get_role(RoleName=role)["Role"]["Arn"])
