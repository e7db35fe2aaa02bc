"""The target `endpoint`: what it asks a server, and what it refuses to call a measurement of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.fleet import Fleet
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.run import Run
from pytest_gpulab.targets import loading
from pytest_gpulab.targets.endpoint import EndpointTarget
from pytest_gpulab.vllm_args import from_argv
from tests.known import WORKLOAD, known_run

SERVED = Profile(model="llama-3.1-8b", accelerator="h200", engine_args={"max_model_len": 16384})


@dataclass
class Remote:
    """A server that shows these pages to who has the key; `headers` go with every answer."""

    pages: dict[str, str] = field(default_factory=dict)
    key: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""


def models(*names: str) -> str:
    return json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


@pytest.fixture
def remote() -> Iterator[Remote]:
    shown = Remote(pages={"/v1/models": models("llama-3.1-8b"), "/version": '{"version": "0.25.1"}'})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = not shown.key or self.headers["Authorization"] == f"Bearer {shown.key}"
            page = shown.pages.get(self.path)
            self.send_response(401 if not allowed else 404 if page is None else 200)
            for name, value in shown.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write((page or "").encode() if allowed else b"")

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        shown.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield shown
        server.shutdown()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """How the load generator was called; nothing is sent really."""
    calls: list[dict[str, object]] = []

    def run(self: loading.Loading, workload: Workload, profile: Profile, seed: int, **where: object) -> Run:
        calls.append(where)
        return known_run(1.0, seed=seed)

    monkeypatch.setattr(loading.Loading, "run", run)
    return calls


def target_of(remote: Remote, metrics: str = "") -> EndpointTarget:
    return EndpointTarget(remote.url, SERVED, metrics, Path("unused"), lambda line: None)


def endpoint_of(call: dict[str, object]) -> tuple[str, tuple[str, ...]]:
    endpoint = call["endpoint"]
    return endpoint.model, endpoint.metrics_urls  # type: ignore[attr-defined]


def test_the_declared_profile_is_loaded(remote: Remote, sent: list[dict[str, object]]) -> None:
    target_of(remote).run(WORKLOAD, SERVED, 0)
    assert endpoint_of(sent[0]) == ("llama-3.1-8b", ())
    assert sent[0]["server"] == f"vLLM 0.25.1 at {remote.url.partition('://')[2]}, declared as h200"


def test_clients_may_call_the_model_by_its_repository(remote: Remote, sent: list[dict[str, object]]) -> None:
    remote.pages["/v1/models"] = models("other", "meta-llama/Llama-3.1-8B-Instruct")
    target_of(remote).run(WORKLOAD, SERVED, 0)
    assert endpoint_of(sent[0])[0] == "meta-llama/Llama-3.1-8B-Instruct"


def test_clients_may_call_the_model_as_the_server_was_told(
    remote: Remote, sent: list[dict[str, object]], pytester: pytest.Pytester
) -> None:
    remote.pages["/v1/models"] = models("prod-llama")
    serves = "--model meta-llama/Llama-3.1-8B-Instruct --max_model_len 16384 --served-model-name llama prod-llama"
    pytester.makepyfile(
        """
        from pytest_gpulab import Profile
        from tests.known import WORKLOAD

        SERVED = Profile(model="llama-3.1-8b", accelerator="h200", engine_args={"max_model_len": 16384})

        def test_it(measure):
            assert measure(WORKLOAD, SERVED).p95 <= 2.0
        """
    )
    result = pytester.runpytest_inprocess(
        *("--gpulab-target=endpoint", "--gpulab-accelerator=h200", f"--gpulab-endpoint={remote.url}"),
        f"--gpulab-endpoint-serves={serves}",
    )
    result.assert_outcomes(passed=1)
    assert {endpoint_of(call)[0] for call in sent} == {"prod-llama"}


def test_a_server_that_was_told_another_name_is_another_model(remote: Remote) -> None:
    target = EndpointTarget(remote.url, SERVED, "", Path("unused"), lambda line: None, names=["prod-llama"])
    with pytest.raises(TargetRefused, match=r"must list prod-llama at /v1/models: it serves llama-3.1-8b"):
        target.run(WORKLOAD, SERVED, 0)


def test_metrics_are_found_or_given(remote: Remote, sent: list[dict[str, object]]) -> None:
    remote.pages["/metrics"] = "vllm:num_requests_running 0\n"
    target_of(remote).run(WORKLOAD, SERVED, 0)
    target_of(remote, "http://elsewhere/metrics").run(WORKLOAD, SERVED, 0)
    remote.pages["/metrics"] = "<html>a login page</html>"
    target_of(remote).run(WORKLOAD, SERVED, 0)
    assert [endpoint_of(call)[1] for call in sent] == [
        (f"{remote.url}/metrics",),
        ("http://elsewhere/metrics",),
        (),
    ]


def test_the_key_comes_from_the_environment_and_is_never_shown(
    remote: Remote, sent: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.key = "s3cret"
    with pytest.raises(TargetRefused, match="401"):
        target_of(remote).run(WORKLOAD, SERVED, 0)
    monkeypatch.setenv("GPULAB_API_KEY", "s3cret")
    target_of(remote).run(WORKLOAD, SERVED, 0)
    assert len(sent) == 1
    assert "s3cret" not in repr(sent)


def test_the_key_opens_the_metrics_of_its_own_host_only(
    remote: Remote, sent: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway may ask for it on every path."""
    monkeypatch.setenv("GPULAB_API_KEY", "s3cret")
    remote.key, remote.pages["/metrics"] = "s3cret", "vllm:num_requests_running 0\n"
    for metrics in ("", f"{remote.url}/metrics", "http://127.0.0.1:9/metrics", f"{remote.url}.evil.example/metrics"):
        target_of(remote, metrics).run(WORKLOAD, SERVED, 0)
    assert endpoint_of(sent[0])[1] == (f"{remote.url}/metrics",)
    keys = [call["endpoint"].metrics_headers().get("Authorization") for call in sent]  # type: ignore[attr-defined]
    assert keys == ["Bearer s3cret", "Bearer s3cret", None, None]


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (SERVED.model_copy(update={"model": "qwen2.5-0.5b"}), "serves the model llama-3.1-8b, .* has qwen2.5-0.5b"),
        (SERVED.model_copy(update={"accelerator": "t4"}), "serves the accelerator h200, this profile has t4"),
        (SERVED.with_engine_args(max_num_seqs=8), "serves the engine arguments .* this profile has .*max_num_seqs=8"),
        (SERVED.on(Fleet()), "a profile with a fleet needs a cluster"),
    ],
    ids=["model", "accelerator", "arguments", "fleet"],
)
def test_other_profiles_are_refused(remote: Remote, profile: Profile, reason: str) -> None:
    target = target_of(remote)
    assert target.server(profile) == ""
    with pytest.raises(TargetRefused, match=reason):
        target.run(WORKLOAD, profile, 0)


def test_a_price_does_not_change_what_is_served(remote: Remote, sent: list[dict[str, object]]) -> None:
    target_of(remote).run(WORKLOAD, SERVED.model_copy(update={"price_usd_per_hour": 1.0}), 0)
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (models("gpt-7"), "it serves gpt-7"),
        ("no json", "must list llama-3.1-8b at /v1/models"),
        ("{}", "data"),
        ("[]", "must list"),
    ],
    ids=["another model", "no API", "no list", "another list"],
)
def test_what_is_no_such_api_is_refused(remote: Remote, page: str, reason: str) -> None:
    remote.pages["/v1/models"] = page
    with pytest.raises(TargetRefused, match=reason):
        target_of(remote).run(WORKLOAD, SERVED, 0)


def test_nobody_there_is_refused() -> None:
    target = EndpointTarget("http://127.0.0.1:9", SERVED, "", Path("unused"), lambda line: None)
    with pytest.raises(TargetRefused, match="Connection refused"):
        target.run(WORKLOAD, SERVED, 0)


def test_an_emulated_server_is_not_measured(remote: Remote) -> None:
    remote.headers["x-gpulab-basis"] = "emulated"
    with pytest.raises(TargetRefused, match=r"emulated, which is no measurement"):
        target_of(remote).run(WORKLOAD, SERVED, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "needs --gpulab-endpoint"),
        (("--gpulab-endpoint=http://x",), "needs --gpulab-endpoint-serves"),
        (("--gpulab-endpoint=http://x", "--gpulab-endpoint-serves=--model nope"), "unknown model 'nope'"),
        (
            ("--gpulab-endpoint=http://x/v1", "--gpulab-endpoint-serves=--model llama-3.1-8b"),
            "must come without /v1",
        ),
        (
            ("--gpulab-endpoint=http://u:pw@x", "--gpulab-endpoint-serves=--model llama-3.1-8b"),
            "must come without USER:PASSWORD@",
        ),
    ],
)
def test_what_is_missing_is_said_at_once(pytester: pytest.Pytester, options: tuple[str, ...], message: str) -> None:
    result = pytester.runpytest_inprocess("--gpulab-target=endpoint", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in "\n".join(result.errlines)


def test_the_declaration_is_vllms_command_line() -> None:
    declared = "--model meta-llama/Llama-3.1-8B-Instruct --max-model-len 16384"
    assert from_argv(declared.split(), "h200") == SERVED
