"""An AWS account behind HTTP, for sessions in processes of their own: moto, and what it lacks for preflight."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.acm.models import acm_backends
from moto.core import DEFAULT_ACCOUNT_ID
from moto.core.base_backend import BackendDict
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.aws import moto_eks
from tests.aws.conftest import REGION, price_list

PRICES = {"c6a.large": 0.0765, "g4dn.xlarge": 0.526}
CERTIFICATE = f"arn:aws:acm:{REGION}:{DEFAULT_ACCOUNT_ID}:certificate/1"
G_VCPUS = {"L-DB2E81BA": 8.0, "L-3819A6DF": 8.0}
"""Quotas of G machines, on demand and spot; there is none of any other."""

_NO_BLOCKS = (
    '<DescribeCapacityBlockOfferingsResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">'
    "<requestId>1</requestId><capacityBlockOfferingSet/></DescribeCapacityBlockOfferingsResponse>"
)

Start = Callable[[str, list[tuple[str, str]]], Any]


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def account() -> Iterator[str]:
    """The address of an empty account, whose state lies in this process."""
    BackendDict.reset()
    moto_eks.install()
    plant_certificate(CERTIFICATE, f"*.{REGION}.elb.amazonaws.com")
    app = _with_the_rest(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
        BackendDict.reset()


def plant_certificate(arn: str, name: str, status: str = "ISSUED") -> None:
    """As if somebody had imported it into ACM."""
    acm = acm_backends[DEFAULT_ACCOUNT_ID][REGION]
    made = acm._certificates.pop(acm.request_certificate(name, None, [], []))
    made.arn, made.status = arn, status
    acm._certificates[arn] = made


def _with_the_rest(moto: Any) -> Any:
    """moto, with prices, quotas and Capacity Blocks answered here."""

    def answer(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        operation = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
        if operation == "GetServiceQuota":
            return _json(start, {"Quota": {"Value": G_VCPUS.get(json.loads(body)["QuotaCode"], 0.0)}})
        if operation == "GetProducts":
            return _json(start, price_list(PRICES).get_products(**{"Filters": [], **json.loads(body)}))
        if b"Action=DescribeCapacityBlockOfferings" in body:
            start("200 OK", [("Content-Type", "text/xml")])
            return [_NO_BLOCKS.encode()]
        found: Iterable[bytes] = moto(environ, start)
        return found

    return answer


def _json(start: Start, answer: Any) -> list[bytes]:
    start("200 OK", [("Content-Type", "application/x-amz-json-1.1")])
    return [json.dumps(answer).encode()]
