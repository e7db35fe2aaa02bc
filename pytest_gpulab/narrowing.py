"""What a session leaves out of the catalog, so that its record is only a part."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import PurePosixPath

import pytest

_COLLECTING = ("addopts", "norecursedirs", "python_classes", "python_files", "python_functions")
"""Ini options that choose what is collected; an ini file may set them, one session (``-o``) narrows by them."""


def narrowing(config: pytest.Config) -> str:
    """Which option or argument leaves out a part of the catalog, as the user wrote it; empty when none does.

    What the project's own ``addopts`` leaves out is not in its catalog and does not narrow.
    """
    project = _options_in(config.getini("addopts"))
    for option, name in (("-k", "keyword"), ("-m", "markexpr")):
        value = config.getoption(name, "")
        if value and [value] != project[option][-1:]:
            return f"{option} {value}"
    for option in ("--deselect", "--ignore", "--ignore-glob"):
        chosen = [str(value) for value in config.getoption(option.strip("-").replace("-", "_"), None) or ()]
        if chosen != project[option]:
            return f"{option}={chosen[-1]}"
    for option, name in (("--lf", "lf"), ("--stepwise", "stepwise")):
        if config.getoption(name, False):
            return option
    for override in config.getoption("override_ini", None) or ():
        if override.partition("=")[0].strip() in _COLLECTING:
            return f"-o {override}"
    return next((arg for arg in config.args if "::" in arg or arg.endswith(".py")), "") or _part_of_testpaths(config)


def _options_in(words: list[str]) -> dict[str, list[str]]:
    """Values of the narrowing options among `words`, in order."""
    values: dict[str, list[str]] = {name: [] for name in ("-k", "-m", "--deselect", "--ignore", "--ignore-glob")}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name.startswith("--") and name in values:
            values[name].append(value if equals or not rest else rest.pop(0))
        elif word[:2] in ("-k", "-m") and not word.startswith("--"):
            values[word[:2]].append(word[2:] if len(word) > 2 or not rest else rest.pop(0))
    return values


def collected(config: pytest.Config) -> tuple[str, ...]:
    """Folders and files that pytest was given to collect, from the root folder, in POSIX form; ``.`` is all of it."""
    paths = (config.invocation_params.dir / arg.partition("::")[0] for arg in config.args)
    return tuple(sorted({PurePosixPath(os.path.relpath(path, config.rootpath)).as_posix() for path in paths}))


def only(part: Sequence[str], whole: Sequence[str]) -> str:
    """The words for a session that collected `part` where there is `whole`."""
    return f"only {', '.join(part)} of {', '.join(whole)}"


def _part_of_testpaths(config: pytest.Config) -> str:
    for path in collected(config):
        for testpath in config.getini("testpaths"):
            whole = PurePosixPath(testpath).as_posix()
            if any(fnmatch(str(folder), whole) for folder in PurePosixPath(path).parents):
                return only([path], [whole])
    return ""


def deselected_by_an_option() -> bool:
    """Whether the hook ``pytest_deselected``, in which this is asked, was called by pytest itself.

    Then an option of pytest's did it (`narrowing` knows whose), else a plugin did, such as one that makes shards.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(("pytest_gpulab.", "pluggy.")):
        frame = frame.f_back
    return str(frame.f_globals["__name__"]).startswith("_pytest.")
