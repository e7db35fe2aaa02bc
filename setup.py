"""Compiles the hot modules of the engine where a C compiler is at hand; the same sources run interpreted otherwise.

Everything else about the distribution stands in pyproject.toml. An editable install stays interpreted: a compiled
module beside its source would hide later edits.
"""

from __future__ import annotations

import sys

from setuptools import Extension, setup

HOT = (
    "engine/ramp.py",
    "engine/cost.py",
    "engine/frontend.py",
    "engine/client.py",
    "engine/jumping.py",
    "cluster/replica.py",
)


def extensions() -> list[Extension]:
    """One optional extension module per hot source; none where mypyc is missing or refuses."""
    if "editable_wheel" in sys.argv:
        return []
    try:
        from mypyc.build import mypycify

        found: list[Extension] = mypycify(
            [
                "--config-file=",
                "--follow-imports=silent",
                "--ignore-missing-imports",
                *(f"pytest_gpulab/{path}" for path in HOT),
            ],
            opt_level="2",
        )
    except (ImportError, SystemExit):
        return []
    for extension in found:
        extension.optional = True
    return found


setup(ext_modules=extensions())
