"""``python -m pytest_gpulab.load.pod``: one pod of an Indexed Job, which sends its share from inside the cluster.

Its environment says everything: ``GPULAB_LOAD_SHARE`` names the share's file, ``JOB_COMPLETION_INDEX`` says which of
the shards it is, ``GPULAB_LOAD_SERVICE`` names the model's Service, whose address Kubernetes has put beside it, and
``GPULAB_API_KEY`` is the key. Before it says ``ready`` it has seen the model listed, on the way that it is going to
send, and that it can read answers in time on this machine; then it goes on as `shard` does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.load.headroom import keeps_up
from pytest_gpulab.load.local import chunk_rate_of
from pytest_gpulab.load.shard import send
from pytest_gpulab.load.share import Share
from pytest_gpulab.load.wire import share_from_line

BEYOND_HEADROOM = 3
"""Exit status of a pod that cannot read its share of the answers in time."""

_ANSWER_S = 60.0
"""Until the Service leads to the model: rules of the network may come a moment after the pod."""
_TIMEOUT_S = 5.0
_POLL_S = 0.5


def main() -> int:
    """Send the share; 1 when the model cannot be reached or the start came too late."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the first process of a container has no other way to end
    share = share_of(os.environ)
    if (refusal := _unreachable(share.endpoint)) is not None:
        print(f"{share.endpoint.url}/v1/models must list {share.endpoint.model}: {refusal}", flush=True)
        return 1
    if not keeps_up(asked := chunk_rate_of(share)):
        print(f"this pod cannot read {asked:,.0f} tokens/s in time: use more pods or a larger machine", flush=True)
        return BEYOND_HEADROOM
    return send(share)


def share_of(environment: Mapping[str, str]) -> Share:
    """This pod's share: of what is written, at the Service's address, with the key."""
    line = Path(environment["GPULAB_LOAD_SHARE"]).read_text(encoding="utf-8")
    share = share_from_line(line, index=int(environment["JOB_COMPLETION_INDEX"]))
    url = service_url(environment, environment["GPULAB_LOAD_SERVICE"])
    return replace(share, endpoint=replace(share.endpoint, url=url, api_key=environment.get("GPULAB_API_KEY")))


def service_url(environment: Mapping[str, str], service: str) -> str:
    """Where a Service of the namespace is, by the variables that every pod of the namespace gets of it."""
    name = service.upper().replace("-", "_")
    host, port = environment[f"{name}_SERVICE_HOST"], environment[f"{name}_SERVICE_PORT"]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _unreachable(endpoint: Endpoint) -> str | None:
    """Why the model is not listed; None as soon as it is."""
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            with endpoint.ask("/v1/models", _TIMEOUT_S) as answer:
                listed = [entry["id"] for entry in json.load(answer)["data"]]
            if endpoint.model in listed:
                return None
            refusal = f"it lists {', '.join(listed)}"
        except (OSError, ValueError) as wrong:
            refusal = str(wrong)
        if time.monotonic() > deadline:
            return refusal
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main())
