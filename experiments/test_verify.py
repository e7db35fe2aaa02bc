"""The quick path, end to end: from zero GPU nodes to a public /v1 that answers, and back to zero.

Everything is real but the machines: the manifests, the Kubernetes API and its client, HTTP, the clock. The embedded
cluster's controllers run `cluster_speed` times as fast as real ones; requests take the time they take.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

import pytest

from pytest_gpulab import Fleet, Profile

pytestmark = pytest.mark.verify


def ask(endpoint, path, body=None, key=None):
    """Status and text of a request through the public way; a POST when there is a body."""
    headers = {"Authorization": f"Bearer {key or endpoint.api_key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps({"model": endpoint.model, **body}).encode()
    request = urllib.request.Request(endpoint.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


def events(stream):
    """The JSON of each server-sent event, and whether the stream was brought to its end."""
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    return [json.loads(line) for line in lines[:-1]], lines[-1] == "[DONE]"


def test_from_zero_to_an_answer_and_back(gpu_pool, serving, profile: Profile, cluster_speed, record_property, capsys):
    """A GPU node appears when it is needed, serves vLLM's API in public, and is gone when it is not."""
    from pytest_gpulab.kube.nodes import gpu_capacity, gpu_nodes
    from pytest_gpulab.kube.serving import withdraw
    from pytest_gpulab.render import serving_name

    seconds = {}
    autoscaled = profile.on(Fleet())
    start = time.monotonic()
    assert gpu_capacity(gpu_pool.kube) == []

    endpoint = serving(autoscaled)
    seconds["ready"] = time.monotonic() - start
    assert len(gpu_nodes(gpu_pool.kube)) == 1

    status, models = ask(endpoint, "/v1/models")
    assert status == 200
    assert [model["id"] for model in json.loads(models)["data"]] == [profile.model]

    status, completion = ask(endpoint, "/v1/completions", {"prompt": "The sky is", "max_tokens": 8})
    assert status == 200
    assert json.loads(completion)["usage"]["completion_tokens"] == 8

    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": True}
    status, stream = ask(endpoint, "/v1/chat/completions", chat)
    chunks, ended = events(stream)
    assert status == 200 and ended
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    assert ask(endpoint, "/v1/models", key="wrong")[0] == 401
    assert [ask(endpoint, path)[0] for path in ("/metrics", "/health", "/tokenize", "/")] == [404] * 4
    seconds["answered"] = time.monotonic() - start

    withdraw(gpu_pool, serving_name(autoscaled))
    assert gpu_capacity(gpu_pool.kube) == []
    seconds["zero again"] = time.monotonic() - start

    for stage, passed in seconds.items():
        record_property(f"seconds until {stage}", round(passed, 2))
    with capsys.disabled():
        stages = ", ".join(f"{stage} {passed:.1f} s" for stage, passed in seconds.items())
        print(f"\nthe cluster's controllers ran at {cluster_speed:g} times real time: {stages}")
