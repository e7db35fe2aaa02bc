"""Jobs, logs and attach on a live cluster, through kubectl and the kubernetes client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import stream

from tests.cluster.live import KEY, SECRET, SERVICE, Live, deployment, ready, typed, until

POOL = typed(
    {
        "metadata": {"name": "cpu"},
        "spec": {
            "disruption": {"consolidationPolicy": "WhenEmpty", "consolidateAfter": "10m"},
            "template": {
                "metadata": {"labels": {"lab/pool": "cpu"}},
                "spec": {
                    "nodeClassRef": {"group": "eks.amazonaws.com", "kind": "NodeClass", "name": "default"},
                    "requirements": [
                        {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": ["c6a.large"]},
                    ],
                },
            },
        },
    },
    "karpenter.sh/v1",
    "NodePool",
)
SAYS = "import os; print('index', os.environ['JOB_COMPLETION_INDEX'], flush=True)"


def job(program: str, *, name: str = "work", pods: int = 1, command: str = "python3", **pod: Any) -> dict[str, Any]:
    container = {"name": "main", "image": "example.org/python:3", "command": [command, "-c", program]}
    container |= pod.pop("container", {})
    template = {
        "metadata": {"labels": {"app": name}},
        "spec": {"restartPolicy": "Never", "nodeSelector": {"lab/pool": "cpu"}, "containers": [container], **pod},
    }
    spec = {"completionMode": "Indexed", "completions": pods, "parallelism": pods, "backoffLimit": 0}
    return typed({"metadata": {"name": name}, "spec": {**spec, "template": template}}, "batch/v1", "Job")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    live = Live(tmp_path_factory.mktemp("jobs"), speed=300.0)
    live.create(POOL)
    yield live
    live.stop()


@pytest.fixture(autouse=True)
def clean(live: Live) -> Iterator[None]:
    """No Jobs and no pods of theirs afterwards."""
    yield
    batch(live).delete_collection_namespaced_job("default", propagation_policy="Background")
    until("no pod", lambda: not live.core.list_namespaced_pod("default", label_selector="job-name").items)


def batch(live: Live) -> client.BatchV1Api:
    return client.BatchV1Api(live.api)


def kubectl(live: Live, *words: str, stdin: str | None = None) -> str:
    command = ["kubectl", "--kubeconfig", str(live.config), "--cache-dir", str(live.config.parent / "cache"), *words]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ended(live: Live, name: str = "work") -> Any:
    """The Job once it is Complete or Failed."""

    def found() -> Any:
        job = batch(live).read_namespaced_job(name, "default")
        return job if any(one.type in ("Complete", "Failed") for one in job.status.conditions or ()) else None

    return until("the end of the job", found)


def running(live: Live, count: int = 1) -> list[str]:
    """Names of the Job's running pods, by index."""
    selector = {"label_selector": "job-name=work", "field_selector": "status.phase=Running"}

    def found() -> list[str]:
        names = [pod.metadata.name for pod in live.core.list_namespaced_pod("default", **selector).items]
        return sorted(names) if len(names) == count else []

    return list(until("running", found))


def log(live: Live, pod: str, **options: Any) -> str:
    read = live.core.read_namespaced_pod_log(pod, "default", _preload_content=False, **options)
    return str(read.data.decode())


def names(live: Live) -> list[str]:
    return sorted(pod.metadata.name for pod in live.pods() if (pod.metadata.labels or {}).get("job-name"))


def test_the_kubernetes_client_runs_a_job_and_reads_its_logs(live: Live) -> None:
    made = batch(live).create_namespaced_job("default", job(SAYS, pods=2))
    assert made.spec.selector.match_labels == {"batch.kubernetes.io/controller-uid": made.metadata.uid}
    done = ended(live)
    assert (done.status.succeeded, done.status.completed_indexes, done.status.failed) == (2, "0,1", None)
    assert [log(live, pod) for pod in names(live)] == ["index 0\n", "index 1\n"]


def test_kubectl_applies_waits_prints_a_table_and_reads_logs(live: Live) -> None:
    manifest = json.dumps(job(SAYS, pods=3))
    assert "job.batch/work created" in kubectl(live, "apply", "-f", "-", stdin=manifest)
    assert "job.batch/work unchanged" in kubectl(live, "apply", "-f", "-", stdin=manifest)
    assert "condition met" in kubectl(live, "wait", "--for=condition=complete", "job/work", "--timeout=60s")
    head, row = kubectl(live, "get", "jobs").splitlines()
    assert head.split() == ["NAME", "STATUS", "COMPLETIONS", "DURATION", "AGE"]
    assert row.split()[:3] == ["work", "Complete", "3/3"]
    assert "Completed" in kubectl(live, "get", "pods", "-l", "job-name=work")
    assert kubectl(live, "logs", "job/work") in {f"index {index}\n" for index in range(3)}
    described = kubectl(live, "describe", "job", "work")
    assert "Completed Indexes:  0-2" in described and "0 Active (0 Ready) / 3 Succeeded / 0 Failed" in described
    assert "jobs" in kubectl(live, "api-resources", "--api-group=batch")
    assert "backoffLimit" in kubectl(live, "explain", "job.spec")
    wrong = manifest.replace("backoffLimit", "backofLimit")
    with pytest.raises(AssertionError, match=r'unknown field "spec\.backofLimit"'):
        kubectl(live, "apply", "-f", "-", stdin=wrong.replace('"work"', '"wrong"'))


def test_logs_are_followed_to_the_end(live: Live) -> None:
    program = (
        "import sys\nfor line in sys.stdin:\n    print('heard', line[:-1], flush=True)\n    if 'end' in line: break"
    )
    live.create(job(program, container={"stdin": True}))
    (pod,) = running(live)
    following = watch.Watch().stream(live.core.read_namespaced_pod_log, name=pod, namespace="default")
    words = ["kubectl", "--kubeconfig", str(live.config), "logs", "-f", pod]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as follower:
        for word in ("one", "two", "end"):
            live.do(partial(live.cluster.containers.write, "default", pod, f"{word}\n".encode()))
        assert list(following) == ["heard one", "heard two", "heard end"]
        assert follower.communicate(timeout=30)[0] == "heard one\nheard two\nheard end\n"
    ended(live)
    assert log(live, pod, tail_lines=1) == "heard end\n"
    assert log(live, pod, since_seconds=3600 * 24).count("\n") == 3
    stamped = log(live, pod, timestamps=True).splitlines()
    assert len(stamped) == 3 and all(line.split()[0].endswith("Z") for line in stamped)


def test_what_has_no_log_is_refused_as_kubernetes_refuses_it(live: Live) -> None:
    live.create(job("import time; time.sleep(60)", nodeSelector={"lab/pool": "nowhere"}))
    until("the pod", lambda: names(live))
    (pod,) = names(live)
    for options, said in ({"container": "other"}, "not valid for pod"), ({}, "is waiting to start"):
        with pytest.raises(ApiException) as refusal:
            log(live, pod, **options)
        assert refusal.value.status == 400 and said in json.loads(refusal.value.body)["message"]
    with pytest.raises(ApiException) as missing:
        log(live, "no-such-pod")
    assert missing.value.status == 404


def test_attach_writes_to_stdin_and_reads_stdout(live: Live) -> None:
    program = "import sys\nfor line in sys.stdin:\n    print(line.strip().upper(), flush=True)"
    live.create(job(program, container={"stdin": True}))
    (pod,) = running(live)
    ask = live.core.connect_get_namespaced_pod_attach
    attached = stream(ask, pod, "default", stdin=True, stdout=True, stderr=True, _preload_content=False)
    attached.write_stdin("hello\n")
    assert attached.readline_stdout(timeout=10) == "HELLO"
    attached.close()
    again = stream(ask, pod, "default", stdin=True, stdout=True, stderr=True, _preload_content=False)
    again.write_stdin("again\n")
    assert again.readline_stdout(timeout=10) == "AGAIN"
    os.kill(live.cluster.containers.pid("default", pod) or 0, signal.SIGTERM)
    again.run_forever(timeout=10)
    assert not again.is_open()
    assert log(live, pod) == "HELLO\nAGAIN\n"


def test_kubectl_attaches(live: Live) -> None:
    program = "import sys\nfor line in sys.stdin:\n    print(line.strip().upper(), flush=True)\n    break"
    live.create(job(program, container={"stdin": True}))
    (pod,) = running(live)
    assert kubectl(live, "attach", "-i", pod, stdin="hello\n") == "HELLO\n"
    assert ended(live).status.succeeded == 1


def test_nothing_is_attached_to_a_process_without_stdin(live: Live) -> None:
    live.create(job("import time; time.sleep(60)"))
    (pod,) = running(live)
    ask = live.core.connect_get_namespaced_pod_attach
    with pytest.raises(ApiException) as refusal:
        ask(pod, "default", stdin=True)
    assert "no process with a standard input" in json.loads(refusal.value.body)["message"]


def test_a_container_gets_its_files_and_variables_and_nothing_else(live: Live) -> None:
    os.environ["GPULAB_TEST_OF_THE_HOST"] = "must not be seen"
    program = (
        "import json, os, pathlib; here = pathlib.Path(os.environ['WHERE']);"
        "(pathlib.Path(os.environ['SCRATCH']) / 'new').write_text('x');"
        "print(json.dumps({'files': {p.name: p.read_text() for p in here.iterdir()}, 'env': dict(os.environ)}))"
    )
    config = {"metadata": {"name": "files"}, "data": {"a.txt": "A"}, "binaryData": {"b.bin": "Qg=="}}
    live.create(typed(config, "v1", "ConfigMap"), SECRET)
    container = {
        "env": [
            {"name": "WHERE", "value": "/opt/files"},
            {"name": "SCRATCH", "value": "/opt/files-not/scratch"},
            {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "vllm", "key": "api-key"}}},
        ],
        "volumeMounts": [
            {"name": "files", "mountPath": "/opt/files"},
            {"name": "scratch", "mountPath": "/opt/files-not/scratch"},
        ],
    }
    volumes = [{"name": "files", "configMap": {"name": "files"}}, {"name": "scratch", "emptyDir": {}}]
    live.create(job(program, container=container, volumes=volumes, enableServiceLinks=False))
    assert ended(live).status.succeeded == 1
    seen = json.loads(log(live, names(live)[0]))
    assert seen["files"] == {"a.txt": "A", "b.bin": "B"}
    own = {name for name in seen["env"] if not name.startswith("LC_")}
    assert own == {"PATH", "WHERE", "SCRATCH", "KEY", "JOB_COMPLETION_INDEX"}
    assert seen["env"]["KEY"] == KEY
    assert not Path(seen["env"]["WHERE"]).exists(), "it goes with the container"
    live.delete(typed(config, "v1", "ConfigMap"), SECRET)
    del os.environ["GPULAB_TEST_OF_THE_HOST"]


@pytest.mark.parametrize(
    ("program", "more", "code", "said"),
    [
        ("import sys; print('no'); sys.exit(3)", {}, 3, "no\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", {}, 137, ""),
        ("", {"command": "sh"}, 1, None),
        ("", {"volumes": [{"name": "x", "configMap": {"name": "no-such"}}]}, 1, None),
    ],
    ids=["exits", "killed", "no-python", "no-configmap"],
)
def test_a_container_that_fails_fails_the_job(
    live: Live, program: str, more: dict[str, Any], code: int, said: str | None
) -> None:
    live.create(job(program, **more))
    done = ended(live)
    assert [one.reason for one in done.status.conditions if one.type == "Failed"] == ["BackoffLimitExceeded"]
    (pod,) = (pod for pod in live.pods() if pod.metadata.name == names(live)[0])
    state = pod.status.container_statuses[0].state.terminated
    assert (pod.status.phase, state.exit_code, state.reason) == ("Failed", code, "Error")
    if said is not None:
        assert log(live, pod.metadata.name) == said


@pytest.mark.slow
def test_deleting_a_job_ends_its_processes_with_all_they_started(live: Live) -> None:
    program = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True));"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    live.create(job(program, terminationGracePeriodSeconds=600))
    (pod,) = running(live)
    child = int(until("its child", lambda: log(live, pod)))
    process = live.cluster.containers.pid("default", pod)
    assert process is not None
    batch(live).delete_namespaced_job("work", "default", propagation_policy="Background")
    until("the end", lambda: not names(live))
    until("no process", lambda: not _lives(process) and not _lives(child))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_pods_find_a_service_by_its_variables(live: Live) -> None:
    """And a Service sends each connection to a Ready pod; without one it refuses."""
    program = (
        "import os, sys, urllib.request as r\n"
        "url = 'http://%s:%s' % (os.environ['VLLM_SERVICE_HOST'], os.environ['VLLM_SERVICE_PORT'])\n"
        f"asked = r.Request(url + '/v1/models', headers={{'Authorization': 'Bearer {KEY}'}})\n"
        "for _ in range(int(sys.argv[1])):\n"
        "    try: print(r.urlopen(asked, timeout=10).status, flush=True)\n"
        "    except OSError as error: print(type(error).__name__, flush=True)\n"
    )
    gpu = typed(
        {"metadata": {"name": "gpu"}, "spec": POOL["spec"] | {"template": _gpu_template()}},
        "karpenter.sh/v1",
        "NodePool",
    )
    live.create(gpu, SECRET, SERVICE)
    live.create(job(program, container={"args": ["2"]}, name="before"))
    ended(live, "before")
    assert set(log(live, names(live)[0]).split()) <= {"URLError", "ConnectionResetError", "RemoteDisconnected"}
    live.create(deployment(replicas=2))
    ready(live, 2)
    live.create(job(program, container={"args": ["6"]}, name="after"))
    ended(live, "after")
    (after,) = [name for name in names(live) if name.startswith("after")]
    assert log(live, after).split() == ["200"] * 6
    live.delete(deployment(), SERVICE, SECRET, gpu)
    until("no server", lambda: not [pod for pod in live.pods() if pod.metadata.labels.get("app") == "vllm"])


def _gpu_template() -> dict[str, Any]:
    from tests.cluster import scene

    template: dict[str, Any] = scene.pool("gpu", "on-demand")["spec"]["template"]
    return template
