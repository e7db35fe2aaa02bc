"""The certificate of a public load balancer: what is wrong with it is said before anything is made."""

from __future__ import annotations

import pytest

from pytest_gpulab.aws.certificate import require_certificate
from pytest_gpulab.aws.errors import AwsError
from tests.aws.account import CERTIFICATE, plant_certificate
from tests.aws.conftest import REGION

NAME = f"*.{REGION}.elb.amazonaws.com"


def test_one_for_the_load_balancers_of_the_region_will_do(clients):
    plant_certificate(CERTIFICATE, NAME)
    require_certificate(clients, CERTIFICATE, region=REGION, hours=4.0)


@pytest.mark.parametrize(
    ("name", "status", "hours", "said"),
    [
        ("models.example.org", "ISSUED", 4.0, r"must be for \*\.us-west-2\.elb.*, but is for models\.example\.org"),
        ("*.eu-north-1.elb.amazonaws.com", "ISSUED", 4.0, r"must be for \*\.us-west-2"),
        (NAME, "EXPIRED", 4.0, "must be ISSUED, but is EXPIRED"),
        (NAME, "ISSUED", 24 * 366 * 10, "must be valid for the session's 87840 h, but ends"),
        ("models.example.org", "EXPIRED", 4.0, "must be ISSUED, but is EXPIRED; it must be for"),
    ],
)
def test_what_is_wrong_with_it_is_said(clients, name, status, hours, said):
    plant_certificate(CERTIFICATE, name, status)
    with pytest.raises(AwsError, match=said):
        require_certificate(clients, CERTIFICATE, region=REGION, hours=hours)


def test_one_that_is_not_there(clients):
    with pytest.raises(AwsError, match=r"looking for the certificate .* in us-west-2: AWS said ResourceNotFound"):
        require_certificate(clients, CERTIFICATE, region=REGION, hours=4.0)
