"""The session's options: command line, then ini file, then default; a wrong one says what would be right."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import pytest

from pytest_gpulab.catalog import VARIABLE
from pytest_gpulab.verdict import BASES

if TYPE_CHECKING:
    from pytest_gpulab.run import Basis

T = TypeVar("T")

EXCLUSIVE_TARGETS = ("vllm", "endpoint", "eks")
"""Targets on which two clients at once would measure one another."""


CAMPAIGNS = {"quick": 6, "full": 12}
"""Most repeats a gate may pull on a measured target."""


class _Option(NamedTuple):
    default: str
    metavar: str
    help: str


_OPTIONS = {
    "target": _Option("sim", "NAME", "where experiments run"),
    "accelerator": _Option("t4", "NAME", "accelerator under study, offered by the `accelerator` fixture"),
    "catalog": _Option("", "DIR", "folder of your own models, accelerators and calibrations (or $GPULAB_CATALOG)"),
    "max-repeats": _Option("24", "N", "most repeats a gate may pull: 6, 12, 18 or 24"),
    "seed": _Option("0", "N", "seed of the first repeat; repeat i runs under seed N + i"),
    "require": _Option("simulated", "BASIS", "weakest evidence that decides: simulated, emulated or measured"),
    "gate": _Option("", "FILE", "committed decision record to hold this session against; exits 10 on a loss"),
    "report-dir": _Option("reports", "DIR", "folder of the decision record"),
    "campaign": _Option("full", "SIZE", "how much measured targets may spend: quick (6 repeats a gate) or full (12)"),
    "runs": _Option("", "DIR", "folder of measured runs, which are not measured again (default: runs in report-dir)"),
    "model-dir": _Option("", "DIR", "folder with a folder a model, for vllm; without weights in it: random ones"),
    "endpoint": _Option("", "URL", "base of the OpenAI API, without /v1, for endpoint"),
    "endpoint-serves": _Option("", "ARGS", "vLLM arguments the endpoint was started with: --model NAME ..."),
    "endpoint-metrics": _Option("", "URL", "vLLM's metrics, where they are not at /metrics of the endpoint"),
    "load-from": _Option("client", "PLACE", "where cluster and eks are loaded from: client, or pods in the cluster"),
    "accounts": _Option("", "IDS", "AWS accounts in which eks may work, 12 digits each, with commas"),
    "budget": _Option("", "USD", "the most that eks may spend; the session ends there"),
    "certificate": _Option("", "ARN", "TLS certificate of a public load balancer for eks (default: an internal one)"),
    "client-cidrs": _Option("", "CIDRS", "addresses that may reach what eks makes, such as 203.0.113.7/32"),
    "cluster": _Option("", "NAME", "an EKS cluster to use and leave, for eks (default: make one and remove it)"),
    "hours": _Option("4", "H", "the longest that eks may run"),
    "machines": _Option("1", "N", "the most GPU machines of a capacity type that eks may run at once, for fleets"),
    "region": _Option("us-west-2", "NAME", "AWS region of eks"),
}


@dataclass(frozen=True)
class EksOptions:
    """As they were given; the target reads them."""

    accounts: str
    budget: str
    certificate: str
    client_cidrs: str
    cluster: str
    hours: str
    machines: str
    region: str


@dataclass(frozen=True)
class Options:
    """Resolved and valid."""

    target: str
    accelerator: str
    catalog: Path | None
    max_repeats: int
    first_seed: int
    require: Basis
    gate: Path | None
    report_dir: Path
    campaign: str
    """quick or full on a measured target; empty where runs cost nothing."""
    runs_dir: Path
    model_dir: Path | None
    endpoint: str
    endpoint_serves: str
    endpoint_metrics: str
    load_from: str
    """client or cluster."""
    eks: EksOptions
    explicit: bool
    """At least one was given, on the command line or in the ini file."""

    def __str__(self) -> str:
        return (
            f"target {self.target}, accelerator {self.accelerator}, seeds from {self.first_seed}, "
            f"up to {self.max_repeats} repeats"
            + (f", {self.campaign} campaign" if self.campaign else "")
            + (f", loaded from the {self.load_from}" if self.load_from != "client" else "")
            + (f", {self.require} evidence required" if self.require != "simulated" else "")
            + (f", gate {shown(self.gate)}" if self.gate else "")
            + (f", catalog {shown(self.catalog)}" if self.catalog else "")
        )


def shown(path: Path) -> str:
    """`path` as short as it can be said from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


OPTIONS_KEY = pytest.StashKey[Options]()


def options_of(config: pytest.Config) -> Options:
    """The session's options; KeyError before pytest_configure."""
    return config.stash[OPTIONS_KEY]


def add_options(parser: pytest.Parser) -> None:
    """Declare ``--gpulab-*`` and their twins ``gpulab_*``."""
    group = parser.getgroup("gpulab", "decisions from LLM-serving measurements")
    for name, option in _OPTIONS.items():
        default = f" (default: {option.default})" if option.default else ""
        group.addoption(
            f"--gpulab-{name}",
            dest=_key(name),
            metavar=option.metavar,
            default=None,
            help=f"{option.help}{default}",
        )
        parser.addini(_key(name), f"{option.help}{default}", default="")


def use_catalog(config: pytest.Config) -> None:
    """Let this session, and every process that it starts, find the user's catalog. UsageError for a wrong one.

    That must be before conftest files are imported, which may name what is in it: options are known, but not parsed.
    """
    given = getattr(config.known_args_namespace, _key("catalog"), None)
    value = config.getini(_key("catalog")) if given is None else given
    base = config.rootpath if given is None else config.invocation_params.dir
    if given is None and not value:
        value, base = os.environ.get(VARIABLE, ""), config.invocation_params.dir
    environment = pytest.MonkeyPatch()
    config.add_cleanup(environment.undo)
    if not value:
        environment.delenv(VARIABLE, raising=False)
        return
    environment.setenv(VARIABLE, str(base / Path(value).expanduser()))
    from pytest_gpulab.engine.calibration import read_catalog

    try:
        read_catalog()
    except ValueError as wrong:
        raise pytest.UsageError(f"--gpulab-catalog: {wrong}") from None


def resolve_options(config: pytest.Config) -> Options:
    """The options of this session. UsageError names the option, the value and what would be right."""
    target = _checked(config, "target", _known_target)
    most = _checked(config, "max-repeats", _look)
    campaign = _checked(config, "campaign", _campaign)
    has_campaigns = False
    if target != _OPTIONS["target"].default:
        from pytest_gpulab.targets import kind_of

        kind = kind_of(target)
        has_campaigns = kind.has_campaigns
        most = min(most, kind.max_repeats, CAMPAIGNS[campaign] if has_campaigns else most)
    options = Options(
        target=target,
        accelerator=_checked(config, "accelerator", _known_accelerator),
        catalog=Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None,
        max_repeats=most,
        first_seed=_checked(config, "seed", _seed),
        require=_checked(config, "require", _basis),
        gate=_path(config, "gate") if _given(config, "gate") else None,
        report_dir=_path(config, "report-dir"),
        campaign=campaign if has_campaigns else "",
        runs_dir=_path(config, "runs") if _given(config, "runs") else _path(config, "report-dir") / "runs",
        model_dir=_path(config, "model-dir") if _given(config, "model-dir") else None,
        endpoint=_text(config, "endpoint"),
        endpoint_serves=_text(config, "endpoint-serves"),
        endpoint_metrics=_text(config, "endpoint-metrics"),
        load_from=_checked(config, "load-from", partial(_load_from, target)),
        eks=EksOptions(
            accounts=_text(config, "accounts"),
            budget=_text(config, "budget"),
            certificate=_text(config, "certificate"),
            client_cidrs=_text(config, "client-cidrs"),
            cluster=_text(config, "cluster"),
            hours=_text(config, "hours"),
            machines=_text(config, "machines"),
            region=_text(config, "region"),
        ),
        explicit=any(_given(config, name) for name in _OPTIONS),
    )
    refuse_workers(target, config)
    if has_campaigns:
        _check_target(options)
    return options


def _check_target(options: Options) -> None:
    """UsageError when the target lacks an option."""
    from pytest_gpulab.targets import find_target

    try:
        find_target(options.target, options)
    except ValueError as wrong:
        raise pytest.UsageError(f"--gpulab-target={options.target}: {wrong}") from None


def refuse_workers(target: str, config: pytest.Config) -> None:
    """UsageError for ``-n`` on a target that only one client may load."""
    workers = config.getoption("tx", None) or config.getoption("numprocesses", None)
    if target in EXCLUSIVE_TARGETS and workers:
        raise pytest.UsageError(
            f"--gpulab-target={target} runs one experiment at a time, because two clients would share one GPU; "
            "leave out -n"
        )


def _key(name: str) -> str:
    return f"gpulab_{name.replace('-', '_')}"


def _given(config: pytest.Config, name: str) -> bool:
    """Whether there is a value; an empty one on the command line takes the ini file's back."""
    value = config.getoption(_key(name))
    return bool(config.getini(_key(name)) if value is None else value)


def _text(config: pytest.Config, name: str) -> str:
    given = config.getoption(_key(name))
    return str(given if given is not None else config.getini(_key(name)) or _OPTIONS[name].default)


def _checked(config: pytest.Config, name: str, convert: Callable[[str], T]) -> T:
    try:
        return convert(_text(config, name))
    except ValueError as wrong:
        where = f"--gpulab-{name}"
        if config.getoption(_key(name)) is None:
            where = f"{_key(name)} in {config.inipath}"
        raise pytest.UsageError(f"{where}: {wrong}") from None


def _known_target(name: str) -> str:
    if name != _OPTIONS["target"].default:
        from pytest_gpulab.targets import kind_of

        kind_of(name)
    return name


def _known_accelerator(name: str) -> str:
    from pytest_gpulab.accelerators import find_accelerator

    return find_accelerator(name).name


def _look(text: str) -> int:
    from pytest_gpulab.rule import LOOKS

    looks = [str(look.repeats) for look in LOOKS]
    if text not in looks:
        raise ValueError(f"must be a look of the rule ({', '.join(looks)}), got {text!r}")
    return int(text)


def _campaign(text: str) -> str:
    if text not in CAMPAIGNS:
        raise ValueError(f"must be one of {', '.join(CAMPAIGNS)}, got {text!r}")
    return text


def _load_from(target: str, text: str) -> str:
    if text == _OPTIONS["load-from"].default:
        return text
    from pytest_gpulab.targets import LOADED_FROM, cluster_targets

    if text not in LOADED_FROM:
        raise ValueError(f"must be one of {', '.join(LOADED_FROM)}, got {text!r}")
    if target not in cluster_targets():
        raise ValueError(
            f"the target {target} has no cluster that could make the load: leave it out, or choose "
            f"--gpulab-target={' or '.join(cluster_targets())}"
        )
    return text


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def _basis(text: str) -> Basis:
    for basis in BASES:
        if basis == text:
            return basis
    raise ValueError(f"must be one of {', '.join(BASES)}, got {text!r}")


def _path(config: pytest.Config, name: str) -> Path:
    """A path of the command line counts from where pytest was called, one of the ini file from the root."""
    from_command_line = config.getoption(_key(name)) is not None
    base = config.invocation_params.dir if from_command_line else config.rootpath
    return base / Path(_text(config, name)).expanduser()
