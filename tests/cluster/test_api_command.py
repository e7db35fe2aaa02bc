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

from pytest_gpulab.cli import main
from pytest_gpulab.cluster.api import kubeconfig
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


OTHERS = {"apiVersion": "v1", "kind": "Config", "clusters": [{"name": "production", "cluster": {}}]}


@pytest.mark.parametrize("text", [json.dumps({**OTHERS, "users": [], "contexts": []}), "clusters: []", "", "[1]"])
def test_a_file_of_others_is_left_alone(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    assert main(["cluster", "--kubeconfig", str(path)]) == 2
    assert f"must not exist yet, got {path}; name a new file" in capsys.readouterr().err
    assert path.read_text() == text


def test_what_a_killed_cluster_left_is_replaced_and_what_another_wrote_since_stays(tmp_path: Path) -> None:
    path = tmp_path / "config"
    killed, running = (kubeconfig.kubeconfig("https://127.0.0.1:1", b"", token) for token in ("one", "two"))
    kubeconfig.write(path, killed)
    kubeconfig.write(path, running)
    kubeconfig.remove(path, killed)
    assert json.loads(path.read_text()) == running
    assert path.stat().st_mode & 0o777 == 0o600
    kubeconfig.remove(path, running)
    assert not path.exists()


def test_the_shipped_schemas_are_kubernetes_own() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    source = files(validate) / "kubernetes-json-schema" / "v1.32.0-local" / "_definitions.json"
    definitions = json.loads(source.read_text())["$defs"]
    assert compact(definitions) == schemas(), "rewrite it: gzip of json.dumps(compact(definitions))"
    packed = (files("pytest_gpulab.cluster.api") / SHIPPED).read_bytes()
    assert len(packed) < 150_000 and json.loads(gzip.decompress(packed)) == schemas()
