"""The target `eks`: real vLLM on GPU machines of an EKS cluster, loaded through its load balancer or from inside."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pytest_gpulab.accelerators import find_accelerator
from pytest_gpulab.aws.preflight import Request
from pytest_gpulab.aws.supply import Need
from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.render import PublicAccess, documents
from pytest_gpulab.run import Basis, Run
from pytest_gpulab.targets.base import LOADED_FROM, MEASURED_REPEATS, Serving
from pytest_gpulab.targets.fleets import loading_refusal, run_fleet
from pytest_gpulab.targets.loading import Loading

if TYPE_CHECKING:
    from pytest_gpulab.options import EksOptions, Options

_NO_MACHINES = ("g4dn-soci", "p5en-soci", "brief")
"""Stages that ask for another cold start than the machine has."""
_ACCOUNT = re.compile(r"\d{12}")


class EksTarget:
    """One replica at a time, or a fleet of as many machines as the session's budget has been held against.

    A run costs what the GPU machines cost from the moment it was asked for: a cold start that it brought about, the
    time its answers took, and machines that idled or drained meanwhile.
    """

    name = "eks"
    basis: Basis = "measured"
    max_repeats = MEASURED_REPEATS
    repeatable = False

    def __init__(
        self,
        serving: Serving,
        region: str,
        machine: str,
        log_dir: Path,
        tell: Callable[[str], None],
        load_from: str = "client",
    ) -> None:
        """`machine`: the instance type that the session may buy."""
        self._serving = serving
        self._load_from = load_from
        self._region = region
        self._machine = machine
        self._loading = Loading(log_dir / "interrupted", tell)

    @classmethod
    def from_options(cls, options: Options, tell: Callable[[str], None], serving: Serving) -> Self:
        read_request(options.eks, run="", need=None, load_from=options.load_from)
        read_public(options.eks)
        read_machines(options.eks)
        machine = find_accelerator(options.accelerator).instance_type
        return cls(serving, options.eks.region, machine, options.report_dir / cls.name, tell, options.load_from)

    def server(self, profile: Profile) -> str:
        """vLLM's version, the machine and its region, and where the load came from."""
        if self._refusal(profile) or profile.machine != self._machine:
            return ""
        place = LOADED_FROM[self._load_from]
        return f"vllm {_vllm_version()} on {self._machine}, EKS in {self._region}, loaded from {place}"

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        """Have the profile served, or its fleet deployed, and load it.

        TargetRefused where AWS has no such machine, or the fleet is to suffer what cannot be made to happen there.
        """
        if refusal := self._refusal(profile):
            raise TargetRefused(refusal)
        if self._load_from == "client":
            self._loading.headroom  # noqa: B018 (measured before there is a machine that costs)
        load = partial(
            self._loading.run,
            workload,
            profile,
            seed,
            target=self.name,
            basis=self.basis,
            server=self.server(profile),
        )
        if profile.fleet is None:
            return self._run_one(load, profile)
        assert self._serving.tariff is not None, "on AWS somebody pays"
        return run_fleet(load, profile, self._serving.deploy, self._serving.tariff())

    def _run_one(self, load: Callable[..., Run], profile: Profile) -> Run:
        asked = time.time()
        served = self._serving.serve(profile)
        ready = time.time()
        run = load(endpoint=served.endpoint, elsewhere=served.pods)
        before = (asked - ready, f"asked for; served after {ready - asked:.0f} s")
        if served.bill is None:
            return replace(run, timeline=(before, *run.timeline))
        bill = served.bill(asked, time.time())
        return replace(
            run,
            totals={**run.totals, "gpu_seconds": bill.gpu_seconds, "cost_usd": bill.usd},
            timeline=(before, (0.0, f"prices: {served.prices}"), *run.timeline),
        )

    def close(self) -> None:
        """The session's pool ends what it has started."""

    def _refusal(self, profile: Profile) -> str:
        return _fleet_refusal(profile) or loading_refusal(profile, self._load_from)


def _fleet_refusal(profile: Profile) -> str:
    """Why the target cannot do what the profile's fleet asks for; empty when it can."""
    if profile.fleet is None:
        return ""
    if profile.fleet.stages in _NO_MACHINES:
        return (
            f"stages={profile.fleet.stages} cannot be had on EKS, where a cold start takes as long as it takes: ask "
            "sim or cluster"
        )
    asked = profile.fleet.faults.model_dump(exclude_defaults=True, exclude={"pod_deletions"})
    if not asked:
        return ""
    return (
        f"{', '.join(asked)} cannot be made to happen on EKS: capacity is what it is, AWS restricts what others may "
        "do to machines of Auto Mode, and the lab asks for no right to harm them. Ask sim or cluster; of the faults, "
        "eks knows pod_deletions"
    )


def read_request(given: EksOptions, *, run: str, need: Need | None, load_from: str) -> Request:
    """What preflight is asked for. ValueError: an option is missing or wrong; it says which and why.

    Args:
        run: the run's id, from which a cluster of its own has its name.
        load_from: "client" needs a way to the model, "cluster" has one.
    """
    for option, value in (("accounts", given.accounts), ("budget", given.budget)):
        if not value:
            raise ValueError(f"the target eks needs --gpulab-{option}: it spends somebody's money")
    if not given.cluster and not given.client_cidrs:
        raise ValueError(
            "the target eks makes a cluster whose API answers named addresses only: give this machine's in "
            "--gpulab-client-cidrs"
        )
    if not given.cluster and load_from == "client" and not given.certificate:
        raise ValueError(
            "the target eks makes a network of its own, which this machine reaches through a public load balancer "
            "only: give --gpulab-client-cidrs and --gpulab-certificate, a --gpulab-cluster whose network it is in, "
            "or load it from inside with --gpulab-load-from=cluster"
        )
    accounts = _words(given.accounts)
    if wrong := [account for account in accounts if not _ACCOUNT.fullmatch(account)]:
        raise ValueError(f"--gpulab-accounts must be numbers of 12 digits, got {', '.join(wrong)}")
    return Request(
        name=given.cluster or f"gpulab-{run}",
        run=run,
        region=given.region,
        needs=(need,) if need else (),
        hours=_above_zero("hours", given.hours),
        budget_usd=_above_zero("budget", given.budget),
        allowed_accounts=frozenset(accounts),
        client_cidrs=_cidrs(given.client_cidrs),
        adopt=bool(given.cluster),
    )


def read_public(given: EksOptions) -> PublicAccess | None:
    """How the internet may reach the load balancer; None: not at all. ValueError: a certificate without addresses."""
    if not given.certificate:
        return None
    if not given.client_cidrs:
        raise ValueError("--gpulab-certificate needs --gpulab-client-cidrs: a public load balancer is not for all")
    return PublicAccess(given.certificate, _cidrs(given.client_cidrs))


def read_machines(given: EksOptions) -> int:
    """The most GPU machines at once. ValueError: it is no whole number above 0."""
    if not given.machines.isdigit() or not int(given.machines):
        raise ValueError(f"--gpulab-machines must be a whole number above 0, got {given.machines!r}")
    return int(given.machines)


def _vllm_version() -> str:
    """Of the image that the manifest names."""
    (deployment,) = (obj for obj in documents("vllm") if obj["kind"] == "Deployment")
    image = str(deployment["spec"]["template"]["spec"]["containers"][0]["image"])
    return image.partition("@")[0].rpartition(":v")[2]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _cidrs(text: str) -> tuple[str, ...]:
    words = _words(text)
    try:
        return tuple(str(ip_network(word)) for word in words)
    except ValueError as wrong:
        raise ValueError(f"--gpulab-client-cidrs must be such as 203.0.113.7/32: {wrong}") from None


def _above_zero(option: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"--gpulab-{option} must be a number above 0, got {text!r}")
    return number
