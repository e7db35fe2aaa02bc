"""What a long run keeps in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.load.golden import golden_server

SCRIPT = """
import json, resource, sys
from tests.load.loads import load, requests

def peak_bytes(count):
    run = load(sys.argv[1], requests(count, rate=400.0))
    assert len(run.requests) == count and run.requests["ok"].mean() > 0.9, run
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

print(json.dumps([peak_bytes(1000), peak_bytes(11_000)]))
"""


@pytest.mark.slow
def test_a_request_costs_less_than_2_kb():
    """By the peak of the whole process: a run of 1,000 requests, then one of 10,000 more."""
    with golden_server(delay_s=0.001, interval_s=0.0005) as url:
        done = subprocess.run([sys.executable, "-c", SCRIPT, url], stdout=subprocess.PIPE, check=True, timeout=300)
    few, many = json.loads(done.stdout)
    assert (many - few) / 10_000 < 2048
