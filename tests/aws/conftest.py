"""An AWS account in this process (moto), and what moto lacks as stubs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from moto import mock_aws
from moto.core import DEFAULT_ACCOUNT_ID

from pytest_gpulab.aws.clients import Clients, make_clients
from pytest_gpulab.aws.identity import Identity
from pytest_gpulab.aws.preflight import Plan, Request
from pytest_gpulab.aws.stack import Clock
from tests.aws import moto_eks

REGION = "us-west-2"
ACCOUNT = DEFAULT_ACCOUNT_ID
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYPLANTEDSECRET"
SESSION_TOKEN = "IQoJb3JpZ2luX2PLANTEDTOKEN"


def _plant(patch: pytest.MonkeyPatch) -> None:
    """Planted credentials, no profile of the developer's."""
    for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_ENDPOINT_URL"):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTEDKEYID0000")
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_SESSION_TOKEN", SESSION_TOKEN)
    patch.setenv("AWS_CONFIG_FILE", os.devnull)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ledgers lie in a folder of the test's; botocore's backoff takes no time."""
    _plant(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _: None)


@pytest.fixture(scope="session")
def _made() -> Iterator[Clients]:
    """Clients take a while to make."""
    with pytest.MonkeyPatch.context() as patch:
        _plant(patch)
        yield make_clients(REGION)


@pytest.fixture
def clients(_made: Clients) -> Iterator[Clients]:
    """An empty account."""
    moto_eks.install()
    with mock_aws(config={"core": {"mock_credentials": False}}):  # the planted ones are to be used
        yield _made


class FakeClock:
    """Time passes only by waiting."""

    def __init__(self) -> None:
        self.time = 0.0

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock() -> Clock:
    fake = FakeClock()
    return Clock(now=lambda: fake.time, sleep=fake.sleep)


@pytest.fixture
def plan() -> Plan:
    """A cluster called lab, as preflight would plan it."""
    return make_plan()


def make_plan(name: str = "lab", *, adopt: bool = False, run: str = "run-1") -> Plan:
    request = Request(
        name=name,
        run=run,
        region=REGION,
        needs=(),
        hours=2.0,
        budget_usd=20.0,
        allowed_accounts=frozenset({ACCOUNT}),
        client_cidrs=("203.0.113.7/32",),
        adopt=adopt,
    )
    arn = f"arn:aws:iam::{ACCOUNT}:role/researcher"
    zones = (f"{REGION}a", f"{REGION}b", f"{REGION}c")
    return Plan(request, Identity(ACCOUNT, arn, arn), zones, (), ())


Injection = Callable[..., Any]


class _Body:
    """What urllib3 would have read."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self._body


@pytest.fixture
def refuse() -> Iterator[Callable[..., Callable[[], None]]]:
    """AWS refuses the next `times` calls of an operation; what is returned takes that back."""
    registered: list[tuple[Any, str, Any]] = []

    def refuse(
        client: Any, operation: str, code: str, message: str = "no", times: int = 10_000
    ) -> Callable[[], None]:
        left = times

        def answer(request: Any, **_: Any) -> Any:
            nonlocal left
            if left == 0:
                return None
            left -= 1
            body = f"<ErrorResponse><Error><Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>"
            return AWSResponse(request.url, 400, {"content-type": "text/xml"}, _Body(body.encode()))

        def accept() -> None:
            nonlocal left
            left = 0

        event = f"before-send.{client.meta.service_model.service_id.hyphenize()}.{operation}"
        client.meta.events.register_first(event, answer)
        registered.append((client, event, answer))
        return accept

    yield refuse
    for client, event, answer in registered:
        client.meta.events.unregister(event, answer)


class Stub:
    """A client whose operations answer what they are told; every other is an error."""

    def __init__(self, **operations: Callable[..., Any]) -> None:
        self.__dict__.update(operations)


def price_list(usd: dict[str, float]) -> Stub:
    """The Pricing API of a world with these on-demand prices by instance type."""

    def get_products(*, ServiceCode: str, Filters: list[dict[str, str]]) -> Any:
        wanted = {one["Field"]: one["Value"] for one in Filters}
        if wanted["instanceType"] not in usd:
            return {"PriceList": []}
        price = {"unit": "Hrs", "pricePerUnit": {"USD": f"{usd[wanted['instanceType']]:.10f}"}}
        reserved = {"unit": "Hrs", "pricePerUnit": {"USD": "0.0000000000"}}
        product = {
            "publicationDate": "2026-11-20T18:05:11Z",
            "terms": {
                "OnDemand": {"a": {"priceDimensions": {"r": reserved}}, "b": {"priceDimensions": {"d": price}}}
            },
        }
        return {"PriceList": [json.dumps(product)]}

    return Stub(get_products=get_products)


def spot_history(usd: dict[str, float]) -> dict[str, Any]:
    """EC2's answer: a price by zone, all of the same moment."""
    moment = datetime(2026, 11, 23, 10, 0, tzinfo=UTC)
    return {
        "SpotPriceHistory": [
            {"AvailabilityZone": zone, "SpotPrice": f"{price:.6f}", "Timestamp": moment}
            for zone, price in usd.items()
        ]
    }
