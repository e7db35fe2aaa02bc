"""`gpulab render`, `gpulab token` and `gpulab reap`; what they need is imported when they run."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

TEMPLATES = ("cluster.yaml", "guard.yaml")
POLICY = "caller-policy.json"
"""What the caller of all of it must be allowed."""


def add_eks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    render = commands.add_parser(
        "render",
        help="write what a target would create, without creating it",
        description="Writes the CloudFormation templates and every Kubernetes manifest of a target, as they would be "
        "reviewed or applied by hand, and the IAM policy that the caller needs. Needs no credentials and no network.",
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


def add_reap(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "reap",
        help="tear down what killed sessions left behind",
        description="Tears down the embedded clusters, nodes and objects of every session that died before it could, "
        "or with --cluster what one left in AWS. Sessions that are alive are left alone, and so are those of other "
        "machines and containers. Exits 1, with a list, when something is left, or may be in AWS.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", dest="id", metavar="ID", help="only this run (default: all)")
    what.add_argument("--cluster", metavar="NAME", help="an EKS cluster, its run's objects, and all that costs there")
    parser.add_argument("--region", help="of the cluster, where no ledger on this machine knows it")
    parser.add_argument("--yes", action="store_true", help="remove what the cluster left (default: list it)")
    parser.add_argument("--dead", action="store_true", help="its session is dead, which cannot be seen from here")
    parser.set_defaults(run=_reap)


def _reap(options: argparse.Namespace) -> int:
    if options.dead and options.id is None and options.cluster is None:
        raise ValueError("--dead must be said of one session: give --run or --cluster")
    if options.cluster is not None:
        from pytest_gpulab.aws.reap import reap

        return reap(options.cluster, options.region, act=options.yes, dead=options.dead)
    from pytest_gpulab.aws.ledger import cluster_ledgers
    from pytest_gpulab.kube.reap import reap_runs

    status = reap_runs(options.id, dead=options.dead)
    for ledger in cluster_ledgers() if options.id is None else ():
        unseen = ledger.out_of_sight()
        if not unseen and ledger.owner_lives():
            print(f"EKS cluster {ledger.name}: its session is alive; left alone")
            continue
        shows = f"`gpulab reap --cluster {ledger.name}` shows what is left"
        print(f"EKS cluster {ledger.name}: {unseen or 'its session is dead'}; {shows}")
        status = 1
    return status


def _render(options: argparse.Namespace) -> int:
    from pytest_gpulab.render import manifest_files

    written = [_copy("pytest_gpulab.aws", name, options.output) for name in (*TEMPLATES, POLICY)]
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
