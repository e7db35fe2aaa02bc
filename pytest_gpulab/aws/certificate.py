"""The certificate of a public load balancer, looked at before anything costs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import AwsError, explained


def require_certificate(clients: Clients, arn: str, *, region: str, hours: float) -> None:
    """AwsError unless ACM has it there, issued, for the name that a load balancer will have, for `hours` from now.

    Whether this machine trusts its authority shows when the load balancer answers.
    """
    with explained(f"looking for the certificate {arn} in {region}"):
        found = clients("acm").describe_certificate(CertificateArn=arn)["Certificate"]
    name = f"*.{region}.elb.amazonaws.com"
    names = sorted({found["DomainName"], *found.get("SubjectAlternativeNames", ())})
    ends = found.get("NotAfter")
    lacks = []
    if found["Status"] != "ISSUED":
        lacks.append(f"must be ISSUED, but is {found['Status']}")
    if name not in names:
        lacks.append(f"must be for {name}, as AWS names the load balancer, but is for {', '.join(names)}")
    if ends is not None and ends < datetime.now(UTC) + timedelta(hours=hours):
        lacks.append(f"must be valid for the session's {hours:g} h, but ends {ends:%Y-%m-%d %H:%M} UTC")
    if lacks:
        raise AwsError(f"the certificate {arn} {'; it '.join(lacks)}: import another into ACM")
