"""The target `endpoint`: a server that runs somewhere else and speaks the OpenAI API."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from pytest_gpulab.endpoint import Endpoint, distrust, fetch
from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.models import find_model
from pytest_gpulab.run import Basis, Run
from pytest_gpulab.targets.base import MEASURED_REPEATS, Serving
from pytest_gpulab.targets.loading import Loading
from pytest_gpulab.vllm_args import from_argv, served_names

if TYPE_CHECKING:
    from pytest_gpulab.options import Options

API_KEY = "GPULAB_API_KEY"
"""Environment variable of the bearer token: a key has no place on a command line or in a file."""

_PATIENCE_S = 30.0


class EndpointTarget:
    """One server with one declared profile; every other profile is refused.

    Args:
        served: what runs there. Nothing in the API tells the accelerator and the engine arguments, so the user must.
        metrics: page of vLLM's metrics; empty: /metrics of the endpoint, if it shows one.
        log_dir: where Ctrl-C leaves what there was of a run.
        tell: takes a line for the user.
        names: what clients call the model there, any of them; empty: by the lab's name or by where it is published.
    """

    name = "endpoint"
    basis: Basis = "measured"
    max_repeats = MEASURED_REPEATS
    repeatable = False

    def __init__(
        self,
        url: str,
        served: Profile,
        metrics: str,
        log_dir: Path,
        tell: Callable[[str], None],
        *,
        names: Sequence[str] = (),
    ) -> None:
        given = (metrics,) if metrics else ()
        self._address = Endpoint(url, served.model, api_key=os.environ.get(API_KEY), metrics_urls=given)
        self._served = served
        self._names = names or (served.model, find_model(served.model).repository)
        self._loading = Loading(log_dir / "interrupted", tell)

    @classmethod
    def from_options(cls, options: Options, tell: Callable[[str], None], serving: Serving) -> Self:
        for option, value in (("endpoint", options.endpoint), ("endpoint-serves", options.endpoint_serves)):
            if not value:
                raise ValueError(f"the target endpoint needs --gpulab-{option}")
        argv = shlex.split(options.endpoint_serves)
        served, folder = from_argv(argv, options.accelerator), options.report_dir / cls.name
        return cls(options.endpoint, served, options.endpoint_metrics, folder, tell, names=served_names(argv))

    def server(self, profile: Profile) -> str:
        """Where it is, and vLLM's version if it tells."""
        return "" if self._refusal(profile) else self._server

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        """Load the endpoint. TargetRefused for another profile than the declared one."""
        refusal = self._refusal(profile)
        if refusal:
            raise TargetRefused(refusal)
        return self._loading.run(
            workload, profile, seed, endpoint=self._endpoint, target=self.name, server=self._server
        )

    def close(self) -> None:
        """The server is not ours."""

    def _refusal(self, profile: Profile) -> str:
        """Why the endpoint does not serve `profile`; empty when it does."""
        served = self._served
        if profile.fleet is not None:
            return "the target endpoint is one server: a profile with a fleet needs a cluster"
        for what, asked, there in (
            ("model", profile.model, served.model),
            ("accelerator", profile.accelerator, served.accelerator),
            ("engine arguments", profile.engine_args, served.engine_args),
        ):
            if asked != there:
                return f"the endpoint serves the {what} {there}, this profile has {asked}"
        return self._complaint

    @cached_property
    def _complaint(self) -> str:
        """What is wrong with the endpoint itself; empty when it lists the model. Asked once a session."""
        try:
            self._endpoint  # noqa: B018
        except (OSError, ValueError, KeyError, TypeError) as wrong:
            why = distrust(self._address.url, wrong) if isinstance(wrong, OSError) else ""
            return why or f"{self._address.url} must list {self._names[0]} at /v1/models: {wrong}"
        return ""

    @cached_property
    def _endpoint(self) -> Endpoint:
        """The address with the name that clients use there. Raises what a wrong answer leads to."""
        names = [model["id"] for model in self._get("/v1/models")["data"]]
        known = [name for name in self._names if name in names]
        if not known:
            raise ValueError(f"it serves {', '.join(names)}")
        urls = self._metrics_urls
        headers = self._address.headers if all(map(self._is_own, urls)) else {}
        return replace(self._address, model=known[0], metrics_urls=urls, metrics_headers=lambda: headers)

    @property
    def _metrics_urls(self) -> tuple[str, ...]:
        """The page that was given, else /metrics where that is vLLM's."""
        if self._address.metrics_urls:
            return self._address.metrics_urls
        url = f"{self._address.url}/metrics"
        try:
            with fetch(url, _PATIENCE_S, self._address.headers) as answer:
                return (url,) if b"vllm:" in answer.read() else ()
        except OSError:
            return ()

    def _is_own(self, url: str) -> bool:
        """Whether `url` is of the endpoint's own host, which alone may see the key."""
        return urlsplit(url)[:2] == urlsplit(self._address.url)[:2]

    @cached_property
    def _server(self) -> str:
        try:
            version = f"vLLM {self._get('/version')['version']}"
        except (OSError, ValueError, KeyError, TypeError):
            version = "a server that tells no version"
        host = self._address.url.partition("://")[2]
        return f"{version} at {host}, declared as {self._served.accelerator}"

    def _get(self, path: str) -> Any:
        with self._address.ask(path, _PATIENCE_S) as answer:
            basis = answer.headers.get("x-gpulab-basis", self.basis)
            if basis != self.basis:
                raise ValueError(f"its answers are {basis}, which is no measurement")
            return json.load(answer)
