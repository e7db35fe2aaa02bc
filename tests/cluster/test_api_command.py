"""`gpulab cluster` as a process of its own, and the shipped schemas."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from kubernetes import client, config

from pytest_gpulab.cluster.api.schemas import SHIPPED, compact, schemas


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "kubeconfig"
    words = [sys.executable, "-m", "pytest_gpulab", "cluster", "--kubeconfig", str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "is up" in process.stdout.readline()
        with config.new_client_from_config(str(path)) as api:
            names = [space.metadata.name for space in client.CoreV1Api(api).list_namespace().items]
        assert names == ["default", "kube-system"]
        process.send_signal(number)
        assert process.wait(10) == 0
    assert not path.exists()


def test_the_shipped_schemas_are_kubernetes_own() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    source = files(validate) / "kubernetes-json-schema" / "v1.32.0-local" / "_definitions.json"
    definitions = json.loads(source.read_text())["$defs"]
    assert compact(definitions) == schemas(), "rewrite it: gzip of json.dumps(compact(definitions))"
    packed = (files("pytest_gpulab.cluster.api") / SHIPPED).read_bytes()
    assert len(packed) < 150_000 and json.loads(gzip.decompress(packed)) == schemas()
