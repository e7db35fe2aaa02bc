"""The target eks in sessions of their own: moto's account, and the embedded cluster where EKS would answer."""

from __future__ import annotations

import json
import os
import re
import signal
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_gpulab.aws import lifecycle
from pytest_gpulab.aws.clients import Clients, make_clients
from pytest_gpulab.aws.stack import REAL_TIME
from tests.aws import moto_eks
from tests.aws.account import CERTIFICATE, account, plant_certificate
from tests.aws.conftest import ACCOUNT, REGION, SECRET, SESSION_TOKEN, make_plan
from tests.aws.test_lifecycle import everything
from tests.kube.project import CONFTEST, Project, until
from tests.kube.running import Running, running

OPTIONS = (
    "--gpulab-target=eks",
    "--gpulab-budget=20",
    f"--gpulab-accounts={ACCOUNT}",
    "--gpulab-client-cidrs=127.0.0.0/8",
    f"--gpulab-certificate={CERTIFICATE}",
    "--gpulab-hours=2",
    "--gpulab-campaign=quick",
)
STUDY = """
    import pytest
    from pytest_gpulab import ClosedLoop, Profile, Shape, Workload

    VLLM = "app.kubernetes.io/name=vllm"
    SHORT = Workload(arrivals=ClosedLoop(concurrency=2), shape=Shape(prompt_tokens=64, output_tokens=8), requests=8)

    @pytest.mark.decision("delivers", "One replica delivers what is asked for")
    def test_delivers(measure):
        assert measure(SHORT, PROFILE).delivery_ratio >= 0.999

    @pytest.mark.decision("fp4", "Blackwell would do")
    def test_b200(measure):
        profile = Profile(model="llama-3.1-8b", accelerator="b200")
        assert measure(SHORT, profile).delivery_ratio >= 0.999

    def test_one_after_the_other(serving, gpu_pool):
        for profile in (PROFILE, PROFILE.with_engine_args(max_num_seqs=4), PROFILE):
            assert serving(profile).model == profile.model
            assert serving(profile).url.startswith("https://")
            assert len(gpu_pool.kube.list("apps/v1", "Deployment", "gpulab", labels=VLLM)) == 1
"""
FLEETS = """
    from pytest_gpulab import Autoscaling, Constant, Faults, Fleet, Shape, Workload
    from pytest_gpulab.timeline import counts

    SHORT = Workload(arrivals=Constant(rate=4), shape=Shape(prompt_tokens=64, output_tokens=8), duration_s=8)

    def test_two_replicas(measure, gpu_pool):
        two = measure(SHORT, PROFILE.on(Fleet(autoscaling=Autoscaling(min_replicas=2, max_replicas=2))))
        for run in (two.run(0), two.run(1)):
            assert [problem for problem in run.problems if not problem.startswith("the client")] == []
            first, last = counts(run.timeline)[0], counts(run.timeline)[-1]
            assert (first.nodes, last.nodes, last.nodeclaims) == (0, 0, 0)
            assert max(count.ready for count in counts(run.timeline)) == 2
            assert 0 < run.requests["ok"].mean() < 1
            assert {"gpu_seconds", "gpu_busy_seconds", "cost_usd"} <= set(run.totals)
            assert any(text.startswith("prices: g4dn.xlarge: ") for _, text in run.timeline)
        pools = gpu_pool.kube.list("karpenter.sh/v1", "NodePool", labels=f"gpulab.dev/run={gpu_pool.run}")
        assert {pool["spec"]["limits"]["nvidia.com/gpu"] for pool in pools} == {"2"}

    def test_four_replicas(measure):
        measure(SHORT, PROFILE.on(Fleet())).run(0)

    def test_a_lost_node(measure):
        lost = Fleet(autoscaling=None, warm=1, faults=Faults(losses=(5.0,)))
        measure(SHORT, PROFILE.on(lost)).run(0)
"""
ANY_LOAD = """
from pytest_gpulab.targets import loading

loading.Loading.headroom = None  # a machine under test may be busy
"""
JOBS_MAY_TAKE_LONG = """
from pytest_gpulab.kube import load

load.RUNNING_S = 2e5  # the cluster that stands for EKS runs 300 times as fast as the session takes it to
"""
DEAR = """
from pytest_gpulab.aws import guard, lease

lease.BEAT_S = 0.5
guard.fixed_items = lambda request: [("what nobody has planned for", 1e5)]
"""
SPENT_WHILE_LOADING = """
import time

from pytest_gpulab.aws import billing, lease
from pytest_gpulab.targets import loading

lease.BEAT_S = 0.5
begun = []
load = loading.Loading.run
KEYS = os.environ["GPULAB_TEST_KEYS"]  # where this writes what must stand nowhere else


def run(self, *arguments, endpoint, **options):
    begun.append(time.monotonic())
    Path(KEYS).write_text(f"{endpoint.api_key} {endpoint.metrics_headers()['Authorization'].split()[1]}")
    return load(self, *arguments, endpoint=endpoint, **options)


def check(meter, now):
    if begun and time.monotonic() - begun[0] > 3:
        raise billing.BudgetError("the money is gone")


loading.Loading.headroom = None  # this machine may be too busy to have any
loading.Loading.run = run
billing.Meter.check = check
"""
LONG = """
    import pytest
    from pytest_gpulab import Constant, Shape, Workload

    @pytest.mark.decision("long", "It may take long")
    def test_long(measure):
        long = Workload(arrivals=Constant(rate=2), shape=Shape(prompt_tokens=64, output_tokens=8), duration_s=300)
        assert measure(long, PROFILE).delivery_ratio >= 0.999
"""
STAYS = """
    import time
    from pathlib import Path

    def test_stays(gpu_pool):
        Path("up").touch()
        time.sleep(300)
"""


class World:
    """An account, and the cluster that every EKS cluster made in it turns out to be."""

    def __init__(self, url: str, cluster: Running) -> None:
        self.url = url
        self.cluster = cluster
        self.clients: Clients = make_clients(REGION, url)

    def is_empty(self) -> bool:
        """Nothing is left in the account, nor of any run in the cluster."""
        return everything(self.clients) == {} and self.cluster.labelled() == [] and self.cluster.machines() == []


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(
        "pytest_gpulab.cluster.api.server.is_authorized", lambda header, _: header.startswith("Bearer k8s-aws-v1.")
    )
    with running(tmp_path) as cluster, account() as url:
        (known,) = yaml.safe_load(cluster.kubeconfig.read_text())["clusters"]
        authority = known["cluster"]["certificate-authority-data"]
        moto_eks.API_SERVER.update(endpoint=cluster.live.api.url, authority=authority)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        (tmp_path / "authority.pem").write_bytes(b64decode(authority))  # of the load balancers too
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        yield World(url, cluster)


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., Project]:
    """``project(body)``: its state folder is the one in which this process looks for ledgers, too."""
    return lambda body, conftest=CONFTEST: Project(tmp_path / "project", body, conftest)


def decisions(project: Project) -> dict[str, Any]:
    (path,) = (project.folder / "reports").glob("decision-record*.json")
    return {one["id"]: one for one in json.loads(path.read_text())["decisions"]}


@pytest.mark.slow
def test_a_study_from_nothing_to_nothing(world: World, project: Callable[..., Project]) -> None:
    study = project(STUDY)
    status, output = study.run(*OPTIONS)
    assert status == 0, output
    found = decisions(study)
    (gate,) = found["delivers"]["gates"]
    assert gate["left"]["value"] == 1.0 and gate["left"]["n"] == 6
    late = "the client sent requests late" in gate["reason"]  # then this machine is too busy to measure anything
    assert found["delivers"]["verdict"] == ("open" if late else "supported"), output
    assert found["delivers"]["basis"] == "measured"
    (run,) = found["delivers"]["runs"]
    assert run["server"] == "vllm 0.25.1 on g4dn.xlarge, EKS in us-west-2, loaded from the client machine"
    assert found["fp4"]["verdict"] == "blocked"
    assert "the quota 'Running On-Demand P instances' (L-417A185B) is 0 vCPUs" in " ".join(output.split())
    assert "USD/h  at most" in output and "budget 20.00 USD" in output
    assert world.is_empty()
    assert study.left() == []


@pytest.mark.slow
def test_a_network_of_its_own_loaded_from_inside_needs_no_certificate(
    world: World, project: Callable[..., Project]
) -> None:
    body = """
        import pytest
        from pytest_gpulab import ClosedLoop, Shape, Workload

        SHAPE = Shape(prompt_tokens=64, output_tokens=8)
        SHORT = Workload(arrivals=ClosedLoop(concurrency=2), shape=SHAPE, requests=8)

        @pytest.mark.decision("delivers", "One replica delivers what is asked for")
        def test_delivers(measure):
            assert measure(SHORT, PROFILE).delivery_ratio >= 0.999

        def test_nothing_is_public(gpu_pool):
            assert gpu_pool.kube.list("networking.k8s.io/v1", "Ingress") == []
            (params,) = gpu_pool.kube.list("eks.amazonaws.com/v1", "IngressClassParams")
            assert params["spec"]["scheme"] == "internal"
    """
    study = project(body, CONFTEST + JOBS_MAY_TAKE_LONG)
    status, output = study.run(*OPTIONS, "--gpulab-certificate=", "--gpulab-load-from=cluster")
    assert status == 0, output
    found = decisions(study)["delivers"]
    late = "the client sent requests late" in found["gates"][0]["reason"]
    assert found["verdict"] == ("open" if late else "supported"), output
    (run,) = found["runs"]
    assert run["server"] == "vllm 0.25.1 on g4dn.xlarge, EKS in us-west-2, loaded from inside the cluster"
    bought = {one.offering.type.name for one in world.cluster.live.embedded.cloud.instances.values()}
    assert bought == {"g4dn.xlarge", "c6a.large"}
    assert world.is_empty()
    assert study.left() == []


@pytest.mark.slow
def test_fleets_of_as_many_machines_as_were_asked_for(world: World, project: Callable[..., Project]) -> None:
    fleets = project(FLEETS, CONFTEST + ANY_LOAD)
    status, output = fleets.run(*OPTIONS, "--gpulab-machines=2", "-rs")
    assert status == 0 and "1 passed, 2 skipped" in output, output
    assert "2 x g4dn.xlarge" in output
    words = " ".join(output.split())
    assert "the fleet may ask for 4 machines at once, but plan, quota and budget of this session are for 2" in words
    assert "losses cannot be made to happen on EKS" in words
    assert world.cluster.launched() == 2 * 2, "every run has machines of its own"
    assert world.is_empty()
    assert fleets.left() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("conftest", "hours", "reason"),
    [
        (CONFTEST + DEAR, "2", "USD of its budget of 20.00 USD: it ends here"),
        (CONFTEST, "0.0001", "the time of the run on gpulab-"),
    ],
    ids=["budget", "hours"],
)
def test_the_guard_ends_a_session_in_order(
    world: World, project: Callable[..., Project], conftest: str, hours: str, reason: str
) -> None:
    spends = project(STAYS, conftest)
    status, output = spends.run(*OPTIONS, f"--gpulab-hours={hours}")
    assert status == 2, output
    assert "the session was stopped" in output and reason in output
    assert "1 passed" not in output
    assert world.is_empty()
    assert spends.left() == []


@pytest.mark.slow
def test_the_guard_ends_a_session_in_the_middle_of_a_run(
    world: World, project: Callable[..., Project], tmp_path: Path
) -> None:
    """And what it leaves for people to read holds no key: AWS's, the model's or the cluster's."""
    loads = project(LONG, CONFTEST + SPENT_WHILE_LOADING)
    reports = ("-vv", "--html=reports/index.html", "--self-contained-html", "--junitxml=reports/junit.xml")
    status, output = loads.run(*OPTIONS, *reports, GPULAB_TEST_KEYS=str(tmp_path / "keys"))
    assert status == 2, output
    assert "the money is gone" in output
    assert decisions(loads)["long"]["verdict"] == "open"
    assert world.is_empty()
    assert loads.left() == []
    kinds = {path.suffix for path in (loads.folder / "reports").rglob("*") if path.is_file()}
    assert kinds >= {".html", ".json", ".md", ".npz", ".xml"}
    key, token = (tmp_path / "keys").read_text().split()
    assert token.startswith("k8s-aws-v1.")
    planted = (key, "k8s-aws-v1.", SECRET, SESSION_TOKEN, os.environ["AWS_ACCESS_KEY_ID"])
    assert not [secret for secret in planted if secret in output]
    assert loads.holding(*planted) == []
    (loads.folder / "reports" / "noted").write_text(f"key: {key}")
    assert len(loads.holding(*planted)) == 1, "it would be found"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_at_nothing(world: World, project: Callable[..., Project], number: signal.Signals) -> None:
    stays = project(STAYS)
    with stays.start(*OPTIONS) as session:
        assert until((stays.folder / "up").exists, 60)
        assert not world.is_empty()
        session.send_signal(number)
        output = session.communicate(timeout=60)[0]
    assert session.returncode == 2, output
    assert world.is_empty()
    assert stays.left() == []


@pytest.mark.slow
def test_a_failing_stack_ends_it_at_nothing(world: World, project: Callable[..., Project]) -> None:
    moto_eks.FAIL_CREATION["AWS::EKS::Cluster"] = "The account is not allowed to"
    fails = project(STAYS)
    status, output = fails.run(*OPTIONS)
    assert status == 1
    assert "The account is not allowed to" in output
    assert world.is_empty()
    assert fails.left() == []


@pytest.mark.slow
def test_an_adopted_cluster_stays_as_it_was(world: World, project: Callable[..., Project]) -> None:
    lifecycle.make_cluster(world.clients, make_plan("theirs", run="another"), REAL_TIME)
    before = everything(world.clients)
    body = """
        def test_serves(serving, gpu_pool):
            assert serving(PROFILE).url.startswith("http://")
            assert gpu_pool.kube.list("v1", "ConfigMap", "kube-system", labels="gpulab.dev/run") == []
    """
    adopts = project(body)
    status, output = adopts.run(*OPTIONS, "--gpulab-cluster=theirs", "--gpulab-certificate=")
    assert status == 0, output
    assert "adopt theirs in us-west-2" in output and "EKS control plane" not in output
    assert everything(world.clients) == before
    assert world.cluster.labelled() == [] and world.cluster.machines() == []
    assert adopts.left() == []


@pytest.mark.slow
@pytest.mark.parametrize("adopted", [False, True], ids=["made", "adopted"])
def test_lost_ledgers_fail_the_session_at_nothing(
    world: World, project: Callable[..., Project], adopted: bool
) -> None:
    """Somebody cleans up the state folder while a machine runs."""
    if adopted:
        lifecycle.make_cluster(world.clients, make_plan("theirs", run="another"), REAL_TIME)
    before = everything(world.clients)
    loses = project(
        """
        import shutil

        def test_serves(serving, gpu_pool):
            assert serving(PROFILE).url
            shutil.rmtree(gpu_pool.ledger.path.parents[1])
        """
    )
    status, output = loses.run(*OPTIONS, *(["--gpulab-cluster=theirs", "--gpulab-certificate="] if adopted else []))
    assert status == 1 and "1 passed" in output, output
    assert output.count("must stay until its run is over, but somebody removed it") == 2, "of the run, of the cluster"
    assert everything(world.clients) == before
    assert world.cluster.labelled() == [] and world.cluster.machines() == []
    assert loses.left() == []


@pytest.mark.slow
def test_what_is_left_fails_the_session_with_a_list(world: World, project: Callable[..., Project]) -> None:
    vpc = world.clients("ec2").create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    leaves = project(
        f"""
        def test_tags_a_foreign_network(gpu_pool, lease):
            from pytest_gpulab.aws.clients import make_clients
            tag = {{"Key": "gpulab.dev/cluster", "Value": lease.plan.request.name}}
            make_clients("{REGION}")("ec2").create_tags(Resources=["{vpc}"], Tags=[tag])
        """,
        CONFTEST + "\nfrom pytest_gpulab.aws import lifecycle\nlifecycle.GONE_S = 1.0\n",
    )
    status, output = leaves.run(*OPTIONS)
    assert status == 1 and "1 passed" in output, output
    assert f"VPC {vpc} (0.0000 USD/h)" in output
    (name,) = set(re.findall(rf"`gpulab reap --cluster (\S+) --region {REGION} --yes` tries again", output))
    assert leaves.reap() == (
        1,
        f"no run has left anything\n"
        f"EKS cluster {name}: its session is dead; `gpulab reap --cluster {name}` shows what is left\n",
    )
    world.clients("ec2").delete_vpc(VpcId=vpc)
    assert leaves.reap("--cluster", name)[0] == 1, "the switch is left, and the command only shows it"
    status, output = leaves.reap("--cluster", name, "--yes")
    assert status == 0, output
    assert world.is_empty()
    assert leaves.left() == []


@pytest.mark.slow
def test_a_machine_that_aws_does_not_have_costs_nothing(world: World, project: Callable[..., Project]) -> None:
    study = project(STUDY)
    status, output = study.run(*OPTIONS, "--gpulab-accelerator=b200")
    assert status == 0, output
    assert {one["verdict"] for one in decisions(study).values()} == {"blocked"}
    assert "1 passed" not in output
    assert "making the EKS cluster" not in output
    assert world.is_empty()


@pytest.mark.slow
def test_a_certificate_that_will_not_do_costs_nothing(world: World, project: Callable[..., Project]) -> None:
    plant_certificate(f"{CERTIFICATE}2", "models.example.org")
    stays = project(STAYS)
    status, output = stays.run(*OPTIONS, f"--gpulab-certificate={CERTIFICATE}2")
    assert status == 1, output
    assert "but is for models.example.org" in output
    assert "making the EKS cluster" not in output
    assert world.is_empty()
    assert stays.left() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--gpulab-budget=", "needs --gpulab-budget"),
        ("--gpulab-budget=much", "--gpulab-budget must be a number above 0, got 'much'"),
        ("--gpulab-accounts=", "needs --gpulab-accounts"),
        ("--gpulab-accounts=12", "must be numbers of 12 digits, got 12"),
        ("--gpulab-certificate=", "give --gpulab-client-cidrs and --gpulab-certificate"),
        ("--gpulab-certificate=", "or load it from inside with --gpulab-load-from=cluster"),
        ("--gpulab-client-cidrs=here", "must be such as 203.0.113.7/32"),
        ("--gpulab-client-cidrs=", "give this machine's in --gpulab-client-cidrs"),
        ("--gpulab-machines=0", "--gpulab-machines must be a whole number above 0, got '0'"),
    ],
)
def test_what_is_missing_is_a_usage_error(pytester: pytest.Pytester, change: str, said: str) -> None:
    pytester.makepyfile("def test_never(gpu_pool): assert False")
    result = pytester.runpytest_inprocess(*OPTIONS, change)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--gpulab-target=eks:*{said}*"])
