"""`gpulab render`: everything the eks target would create, from a machine without credentials or network."""

from __future__ import annotations

import os
import subprocess
import sys

import yaml

from pytest_gpulab.cli import main

NO_NETWORK = """
import socket, sys
def refuse(*_, **__): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
from pytest_gpulab.cli import main
status = main(["render", "--target", "eks", "-o", sys.argv[1]])
assert not {"boto3", "botocore", "kubernetes"} & set(sys.modules), "a client library was imported"
sys.exit(status)
"""


def test_render_needs_no_credentials_and_no_network(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    command = [sys.executable, "-c", NO_NETWORK, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert {
        "caller-policy.json",
        "cluster.yaml",
        "guard.yaml",
        "manifests/nodepools.yaml",
        "manifests/vllm.yaml",
    } <= set(written)
    assert sorted(done.stdout.split()) == sorted(str(tmp_path / "out" / name) for name in written)


def test_what_is_written_is_what_would_be_created(tmp_path):
    from pytest_gpulab.aws.stack import read_template
    from pytest_gpulab.render import documents, manifest_files

    assert main(["render", "--target", "eks", "-o", str(tmp_path)]) == 0
    for name in ("caller-policy.json", "cluster.yaml", "guard.yaml"):
        assert (tmp_path / name).read_text(encoding="utf-8") == read_template(name)
    for name in manifest_files():
        text = (tmp_path / "manifests" / f"{name}.yaml").read_text(encoding="utf-8")
        assert list(yaml.safe_load_all(text)) == documents(name)
