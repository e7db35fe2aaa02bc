"""The way in to an embedded cluster: what its kubeconfig says, and the file, there as long as the cluster."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from pathlib import Path
from typing import Any, Final

_NAME: Final = "gpulab"

Kubeconfig = dict[str, Any]


def kubeconfig(url: str, authority: bytes, token: str, namespace: str = "default") -> Kubeconfig:
    """What `kubectl --kubeconfig` and `kubernetes.config.load_kube_config` read."""
    cluster = {"server": url, "certificate-authority-data": b64encode(authority).decode()}
    context = {"cluster": _NAME, "user": _NAME, "namespace": namespace}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": _NAME, "cluster": cluster}],
        "users": [{"name": _NAME, "user": {"token": token}}],
        "contexts": [{"name": _NAME, "context": context}],
        "current-context": _NAME,
    }


def write(path: Path, config: Kubeconfig) -> None:
    """Write it where only this user can read it, and in place of what a cluster that was killed has left.

    ValueError when another file is there: it may hold the ways to other clusters.
    """
    if _is_only_ours(path):
        path.unlink()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ValueError(f"the kubeconfig must not exist yet, got {path}; name a new file") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(_text(config))


def remove(path: Path, config: Kubeconfig) -> None:
    """Remove the file, unless it says something else by now."""
    if path.is_file() and path.read_bytes() == _text(config).encode():
        path.unlink()


def _text(config: Kubeconfig) -> str:
    return json.dumps(config, indent=1) + "\n"


def _is_only_ours(path: Path) -> bool:
    """Whether it is a kubeconfig of one embedded cluster as `write` leaves it, and of nothing else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        listed = [entry["name"] for part in ("clusters", "users", "contexts") for entry in found[part]]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return listed == [_NAME] * 3
