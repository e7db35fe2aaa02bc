"""kill -9 of a session anywhere between its first call to AWS and its last, then reap: nothing is left.

Each session is a fork of this process that counts its requests and kills itself at one of them: before it is sent, or
when AWS has done it and the session does not know yet.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pytest_gpulab.aws.clients import Clients, make_clients
from pytest_gpulab.aws.ledger import clusters_folder, open_ledger
from pytest_gpulab.aws.lifecycle import bring_up, site_of, tear_down
from pytest_gpulab.aws.reap import reap_cluster
from pytest_gpulab.aws.stack import Clock
from tests.aws.conftest import REGION, FakeClock, make_plan
from tests.aws.test_lifecycle import everything, plant_leftovers

POINTS = 50


@pytest.fixture
def account() -> Iterator[str]:
    """The address of an empty account in another process."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.aws.moto_server"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


def session(clients: Clients) -> None:
    """Up, a load balancer and a machine as Kubernetes makes them, down."""
    time = FakeClock()
    clock = Clock(now=lambda: time.time, sleep=time.sleep)
    plan = make_plan()
    ledger = open_ledger(site_of(plan))
    bring_up(clients, plan, ledger, clock=clock)
    plant_leftovers(clients)
    tear_down(clients, ledger, clock=clock)


SERVICES = ("cloudformation", "ec2", "eks", "elbv2", "iam", "scheduler", "sts")


def watched(clients: Clients, at_request: Callable[[int], None], at_answer: Callable[[int], None]) -> Clients:
    """The clients, which now say what they are about to send and what has been answered; counted from 1."""
    count = 0

    def sent(**_: Any) -> None:
        nonlocal count
        count += 1
        at_request(count)

    def answered(**_: Any) -> None:
        at_answer(count)

    for service in SERVICES:
        events = clients(service).meta.events
        events.register("before-send", sent)
        events.register("response-received", answered)
    return clients


def in_a_fork(work: Callable[[], None]) -> int:
    """The signal that ended it, or 0. Its own failure is printed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_reap_finishes_whatever_a_killed_session_left(account, monkeypatch):
    monkeypatch.setattr("pytest_gpulab.aws.lifecycle.connect", lambda *_: "the way in")
    monkeypatch.setattr("pytest_gpulab.aws.leaks._price", lambda *_: None)  # moto has no price list
    clients = make_clients(REGION, account)
    requests = 0

    def count(number: int) -> None:
        nonlocal requests
        requests = number

    session(watched(make_clients(REGION, account), count, lambda _: None))
    assert everything(clients) == {}
    assert requests >= POINTS / 2, "too few requests for so many points"

    unused = make_clients(REGION, account)  # forks must not share connections
    for service in SERVICES:
        unused(service)
    left_something = 0  # of the kills
    for point in range(POINTS):
        number = 1 + point * requests // POINTS

        def at(n: int, number: int = number) -> None:
            if n == number:
                die()

        before, after = (at, lambda _: None) if point % 2 == 0 else (lambda _: None, at)
        assert in_a_fork(lambda b=before, a=after: session(watched(unused, b, a))) == signal.SIGKILL, point
        left_something += bool(clients("cloudformation").describe_stacks()["Stacks"])
        time = FakeClock()
        reap_cluster(clients, "lab", REGION, clock=Clock(now=lambda t=time: t.time, sleep=time.sleep))
        assert everything(clients) == {}, f"killed at request {number} of {requests}"
        assert not list(clusters_folder().glob("*"))
    assert left_something > POINTS / 2, "most kills must leave something, or reap was not tried"
