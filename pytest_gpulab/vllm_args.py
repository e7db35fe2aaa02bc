"""vLLM's command line: a Profile's model and engine arguments as flags, and back.

Flags are named after the engine arguments, as vLLM's own are; ``--flag`` and ``--no-flag`` for booleans.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from pydantic import ValidationError

from pytest_gpulab.errors import in_one_line
from pytest_gpulab.experiment import EngineArgs, Profile
from pytest_gpulab.models import find_model, models

_IGNORED = ("--host", "--port", "--load-format", "--tokenizer", "--api-key", "--shutdown-timeout")
"""Flags with a value that change nothing about speed or scheduling."""

_ALWAYS = {"block_size", "gpu_memory_utilization"}
"""What vLLM chooses by its version and the machine's attention kernels: the record states it, so it is passed."""


def to_argv(profile: Profile, model: str | None = None) -> list[str]:
    """Arguments of vLLM's API server that serve `profile`; what vLLM takes by default is left out.

    Args:
        model: a folder or repository to load; default: where the model is published. Clients call it by the
            profile's name in either case.
    """
    argv = ["--model", model or find_model(profile.model).repository, "--served-model-name", profile.model]
    args = profile.engine_args
    stated = {**args.model_dump(exclude_defaults=True), **args.model_dump(include=_ALWAYS)}
    for name, value in stated.items():
        argv += _flag(name, value)
    return argv


def _flag(name: str, value: object) -> list[str]:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    return [f"--{dashed}", str(value)]


def from_argv(argv: Sequence[str], accelerator: str) -> Profile:
    """The Profile that a server started with `argv` on `accelerator` serves.

    Raises:
        ValueError: an unknown flag or model, or a value that vLLM would refuse.
    """
    given = _parse(argv)
    for name in ("ignored", "served_model_name"):
        given.pop(name, None)
    model = _model_name(given.pop("model"))
    try:
        engine_args = EngineArgs(**given)
    except ValidationError as wrong:
        raise ValueError(f"vLLM's arguments cannot be read: {in_one_line(wrong)}") from None
    return Profile(model=model, accelerator=accelerator, engine_args=engine_args)


def served_names(argv: Sequence[str]) -> list[str]:
    """The names that a server started with `argv` has for clients; none where they call it what ``--model`` says.

    Raises:
        ValueError: an unknown flag, or no model.
    """
    names: list[str] = _parse(argv).get("served_model_name", [])
    return names


def dashed(argv: Sequence[str]) -> list[str]:
    """`argv` with the flags as they are documented: vLLM takes ``--max_model_len`` for ``--max-model-len``."""
    parts = [argument.partition("=") for argument in argv]
    return [
        flag.replace("_", "-") + sign + value if flag.startswith("--") else flag + sign + value
        for flag, sign, value in parts
    ]


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    parser = _Parser(prog="vllm", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", nargs="+")
    for name in EngineArgs.model_fields:
        _add_flag(parser, name)
    for flag in _IGNORED:
        parser.add_argument(flag, dest="ignored")
    return vars(parser.parse_args(dashed(argv)))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"vLLM's arguments cannot be read: {message}")


def _add_flag(parser: argparse.ArgumentParser, name: str) -> None:
    field = EngineArgs.model_fields[name]
    options: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if field.annotation is bool else {}
    if isinstance(field.default, int) and not options:
        options["type"] = int  # choices of numbers are not converted from text
    parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **options)


def _model_name(given: str) -> str:
    """The lab's name of a model given as a repository, a folder or that name."""
    by_repository = {model.repository: model.name for model in models().values()}
    return by_repository.get(given) or find_model(given.rstrip("/").rsplit("/", 1)[-1]).name
