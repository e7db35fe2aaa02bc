"""`gpulab render` and `gpulab token`; boto3 is imported by the second only, when it runs."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

TEMPLATES = ("cluster.yaml", "guard.yaml")


def add_eks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    render = commands.add_parser(
        "render",
        help="write what a target would create, without creating it",
        description="Writes the CloudFormation templates and every Kubernetes manifest of a target, as they would be "
        "reviewed or applied by hand. Needs no credentials and no network.",
    )
    render.add_argument("--target", required=True, choices=["eks"], help="which target")
    render.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="made if it is not there")
    render.set_defaults(run=_render)
    token = commands.add_parser(
        "token",
        help="sign a token for an EKS cluster (kubectl asks for it)",
        description="Prints an ExecCredential signed with the caller's AWS credentials; kubeconfigs of the eks "
        "target name this command.",
    )
    token.add_argument("--cluster", required=True, metavar="NAME", help="of the EKS cluster")
    token.add_argument("--region", required=True, help="such as us-west-2")
    token.set_defaults(run=_token)


def _render(options: argparse.Namespace) -> int:
    from pytest_gpulab.render import manifest_files

    written = [_copy("pytest_gpulab.aws", name, options.output) for name in TEMPLATES]
    manifests = options.output / "manifests"
    written += [_copy("pytest_gpulab.manifests", f"{name}.yaml", manifests) for name in manifest_files()]
    print("\n".join(map(str, written)))
    return 0


def _copy(package: str, name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(files(package).joinpath(name).read_text(encoding="utf-8"), encoding="utf-8")
    return path


def _token(options: argparse.Namespace) -> int:
    from pytest_gpulab.aws.auth import exec_credential
    from pytest_gpulab.aws.clients import make_clients

    print(json.dumps(exec_credential(make_clients(options.region), options.cluster, datetime.now(UTC))))
    return 0
