"""`gpulab reap` on the command line; what it needs is imported when it runs."""

from __future__ import annotations

import argparse


def add_reap(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "reap",
        help="tear down what killed sessions left behind",
        description="Tears down the clusters, nodes and objects of every session that died before it could. "
        "Sessions that are alive are left alone. Exits 1, with a list, when something would not go.",
    )
    parser.add_argument("--run", dest="id", metavar="ID", help="only this run (default: all)")
    parser.set_defaults(run=_reap)


def _reap(options: argparse.Namespace) -> int:
    from pytest_gpulab.kube.reap import reap

    return reap(options)
