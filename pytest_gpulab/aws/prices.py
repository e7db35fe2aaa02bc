"""What things cost in USD an hour, each price with where it comes from and of which day."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import explained


@dataclass(frozen=True)
class Price:
    """USD an hour; `date` is ISO 8601, of the price and not of the question."""

    usd_per_hour: float
    source: str
    date: str

    def __str__(self) -> str:
        return f"{self.usd_per_hour:.4g} USD/h ({self.source}, {self.date})"


_LIST = "list price, us-west-2"
_LIST_DATE = "2026-09"
CLUSTER = Price(0.10, _LIST, _LIST_DATE)
"""The control plane, version in standard support (aws.amazon.com/eks/pricing)."""
NAT_GATEWAY = Price(0.045, _LIST, _LIST_DATE)
"""Without the 0.045 USD for each GB that it passes on (aws.amazon.com/vpc/pricing)."""
PUBLIC_ADDRESS = Price(0.005, _LIST, _LIST_DATE)
"""(aws.amazon.com/vpc/pricing)"""
LOAD_BALANCER = Price(0.0225, _LIST, _LIST_DATE)
"""An ALB without its capacity units (aws.amazon.com/elasticloadbalancing/pricing)."""
AUTO_MODE_SHARE = 0.12
"""Auto Mode's fee, about this share of the instance's on-demand price, for spot instances too
(aws.amazon.com/eks/pricing)."""
VOLUME_USD_PER_GB_HOUR = 0.08 / 730
"""gp3 (aws.amazon.com/ebs/pricing)."""


def on_demand_price(clients: Clients, instance_type: str, region: str) -> Price | None:
    """Of a Linux instance on shared hardware, from the Pricing API; None if it has no price there."""
    wanted = {
        "instanceType": instance_type,
        "regionCode": region,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
        "marketoption": "OnDemand",
    }
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    with explained(f"asking for the price of {instance_type}"):
        answer = clients("pricing").get_products(ServiceCode="AmazonEC2", Filters=filters)
    for text in answer["PriceList"]:
        product = json.loads(text)
        for term in product["terms"].get("OnDemand", {}).values():
            for dimension in term["priceDimensions"].values():
                if dimension["unit"] == "Hrs" and float(dimension["pricePerUnit"]["USD"]) > 0:
                    date = product["publicationDate"][:10]
                    return Price(float(dimension["pricePerUnit"]["USD"]), "Pricing API", date)
    return None


def spot_price(clients: Clients, instance_type: str, zones: Collection[str]) -> Price | None:
    """The highest that a Linux instance costs now in one of `zones`; None if none of them sells any."""
    with explained(f"asking for the spot price of {instance_type}"):
        answer = clients("ec2").describe_spot_price_history(
            InstanceTypes=[instance_type],
            ProductDescriptions=["Linux/UNIX"],
            StartTime=datetime.now(UTC),
        )
    prices = [
        Price(float(one["SpotPrice"]), f"Spot API, {one['AvailabilityZone']}", one["Timestamp"].date().isoformat())
        for one in answer["SpotPriceHistory"]
        if one["AvailabilityZone"] in zones
    ]
    return max(prices, key=lambda price: price.usd_per_hour, default=None)
