"""boto3 clients with retries and time limits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Clients = Callable[[str], Any]
"""The boto3 client of a service, such as ``clients("ec2")``; the same one each time."""

_ATTEMPTS = 8
"""Of one call, throttled ones included: with the standard mode's backoff (20 s at most) under two minutes."""
_CONNECT_S, _READ_S = 10, 30


def make_clients(region: str, endpoint_url: str | None = None) -> Clients:
    """Clients of one region with the caller's default credentials.

    Args:
        endpoint_url: in place of AWS's own, for tests.
    """
    import boto3
    from botocore.config import Config

    session = boto3.Session(region_name=region)
    config = Config(
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
    )

    @functools.cache
    def client(service: str) -> Any:
        # The price list is served from few regions only; its prices are everyone's.
        place = "us-east-1" if service == "pricing" else region
        return session.client(service, region_name=place, config=config, endpoint_url=endpoint_url)

    return client
