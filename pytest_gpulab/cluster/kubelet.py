"""The kubelets of all nodes: image pull, container start, model load, probes, restarts, graceful termination.

Facts from Kubernetes 1.33, pkg/kubelet: image pull and crash backoff 10 s doubled up to 5 min, probes from their own
fields, SIGTERM after the preStop sleep, SIGKILL at the end of the grace period. A container with a GPU is a model
server: it answers its probes `model_load` after its start. A pod has one container that counts, its first. Where a
real server stands behind the pod (`Hooks`), it is asked, too: probes fail until it answers, and it may drain.
A process that ends is started again or not, as the pod's restart policy says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.cloud import GPU, Cloud
from pytest_gpulab.cluster.conditions import is_true, with_condition, with_status
from pytest_gpulab.cluster.durations import Durations
from pytest_gpulab.cluster.environment import MissingReference, environment
from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.objects import Object, at, is_deleting, name_of, namespace_of, timestamp, uid_of
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import NODE, POD
from pytest_gpulab.cluster.scheduler import is_terminal
from pytest_gpulab.cluster.store import Store

RELIST_S: Final = 1.0
"""How often the kubelet looks whether a container has ended (pod lifecycle event generator)."""
FIRST_BACKOFF_S: Final = 10.0
LONGEST_BACKOFF_S: Final = 300.0
_VLLM: Final = "vllm/"
"""Of an image that takes as long to pull as vLLM's, because it is."""
ORPHAN_S: Final = 40.0
"""Pod garbage collection: pods of a node that is gone for so long are removed."""


def backoff(failures: int) -> float:
    """Seconds before the next pull or restart."""
    return float(min(FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 30), LONGEST_BACKOFF_S))


def probe_passes(probe: dict[str, Any] | None, started: float, healthy: float) -> float | None:
    """When a probe first succeeds often enough, for a server that is healthy from some time on; None: it fails first.

    The first attempt comes `initialDelaySeconds` after the start, then one each period. `failureThreshold` counts for
    startup probes only: a readiness probe may fail for ever.
    """
    if not probe:
        return started
    first = started + probe.get("initialDelaySeconds", 0)
    period = probe.get("periodSeconds", 10)
    failures = max(0, math.ceil((healthy - first) / period))
    return float(first + (failures + probe.get("successThreshold", 1) - 1) * period)


def startup_fails(probe: dict[str, Any] | None, started: float, healthy: float) -> float | None:
    """When a startup probe has failed `failureThreshold` times before the server is healthy; None: it has not."""
    if not probe:
        return None
    last = started + probe.get("initialDelaySeconds", 0)
    last += (probe.get("failureThreshold", 3) - 1) * probe.get("periodSeconds", 10)
    return float(last) if last < healthy else None


@dataclass
class Process:
    """One run of a pod's model server, Unix seconds."""

    started: float
    healthy: float
    """When /health answers 200, unless something ends it before."""
    ready: float
    """When the readiness probe has passed."""
    dies: float = math.inf
    """When it exits by itself, or is killed for its startup probe."""
    error: str = ""
    """Why it exits at once, in its own words."""
    code: int = 1
    """Its exit status."""


@dataclass
class _Life:
    """What the kubelet knows of one pod. `due` is when the current stage is over."""

    stage: str = "pull"
    due: float = math.inf
    failures: int = 0
    restarts: int = 0
    process: Process | None = None
    last: dict[str, Any] = field(default_factory=dict)
    """How the last process ended: a container's `lastState`."""
    killed: float = math.inf
    """When the grace period is over."""
    orphaned: float | None = None
    announced: bool = False


Listener = Callable[[Object], None]


@dataclass
class Hooks:
    """Who else has to know: the model servers themselves. Each is called with the pod."""

    healthy: list[Listener] = field(default_factory=list)
    """Its server answers from now on."""
    terminated: list[Listener] = field(default_factory=list)
    """Its server gets SIGTERM."""
    stopped: list[Listener] = field(default_factory=list)
    """Its server does not exist any more."""
    refusal: Callable[[Object], str] = lambda pod: ""
    """Why its server exits at once when it is started; "": it does not."""
    starts: Callable[[Object], bool] = lambda pod: False
    """Its process is started; whether there is one in the outside world, which `Kubelets.exited` tells the end of."""
    answers: Callable[[Object], bool] = lambda pod: True
    """Whether its server, which is healthy, answers a probe."""
    drains: Callable[[Object], bool] = lambda pod: False
    """Whether its server still has work after SIGTERM."""


class Kubelets:
    """One state machine for each pod that is bound to a node."""

    watches = (POD, NODE)

    def __init__(self, store: Store, clock: Clock, cloud: Cloud, durations: Durations) -> None:
        self._store = store
        self._clock = clock
        self._cloud = cloud
        self._durations = durations
        self._events = Recorder(store, clock, "kubelet")
        self._lives: dict[str, _Life] = {}
        self._images: set[tuple[str, str]] = set()
        self.hooks = Hooks()

    def refs(self, event: Event) -> Iterable[Ref]:
        """A bound pod; when a node goes, its pods."""
        if event.resource is POD:
            if event.type == DELETED:
                self._forget(event.object)
                return ()
            return (ref_of(event),) if event.object["spec"].get("nodeName") else ()
        if event.type != DELETED:
            return ()
        gone = name_of(event.object)
        pods = [pod for pod in self._store.list(POD) if pod["spec"].get("nodeName") == gone]
        return [(name_of(pod), namespace_of(pod)) for pod in pods]

    def process(self, pod: Object) -> Process | None:
        """The pod's model server, if one runs."""
        life = self._lives.get(uid_of(pod))
        return life.process if life else None

    def serving(self, pod: Object) -> bool:
        """Whether its server answers now."""
        process = self.process(pod)
        return process is not None and process.healthy <= self._clock.now() < process.dies

    def exited(self, pod: Object, code: int) -> None:
        """The pod's process has ended by itself, or was killed by somebody else."""
        life = self._lives.get(uid_of(pod))
        if life is None or life.process is None:
            return
        now = self._clock.now()
        life.process.dies, life.process.code, life.due = now, code, now
        if life.stage in ("load", "probe"):
            life.stage = "serve"
        self.reconcile((name_of(pod), namespace_of(pod)))

    def lost(self, node_provider: str) -> None:
        """A machine is gone, and the servers on it with it; nobody has noticed yet."""
        nodes = {name_of(n) for n in self._store.list(NODE) if at(n, "spec.providerID") == node_provider}
        for pod in self._store.list(POD):
            if pod["spec"].get("nodeName") in nodes and uid_of(pod) in self._lives:
                self._stop(pod, self._lives[uid_of(pod)])

    def reconcile(self, ref: Ref) -> float | None:
        """Do what is due; seconds until the next thing is."""
        pod = self._store.find(POD, *ref)
        if pod is None or not pod["spec"].get("nodeName") or (is_terminal(pod) and not is_deleting(pod)):
            return None
        life = self._lives.setdefault(uid_of(pod), _Life())
        node = self._store.find(NODE, pod["spec"]["nodeName"])
        if node is None:
            return self._orphan(pod, life)
        if not self._cloud.running(at(node, "spec.providerID", "")):
            return None
        now = self._clock.now()
        if is_deleting(pod) and life.stage not in ("prestop", "stop"):
            self._begin_stop(pod, life, now)
        while life.due <= now or life.stage == "pull":
            pod = self._advance(pod, life, now)
            if self._store.find(POD, *ref) is None:
                return None
        return None if life.due == math.inf else life.due - now

    def _advance(self, pod: Object, life: _Life, now: float) -> Object:
        """From one stage into the next."""
        steps = {
            "pull": self._pull,
            "pulled": self._pulled,
            "create": self._start,
            "load": self._healthy,
            "probe": self._ready,
            "serve": self._crashed,
            "prestop": self._terminate,
            "stop": self._ended,
        }
        return steps[life.stage](pod, life, now)

    # from the image to a ready server

    def _pull(self, pod: Object, life: _Life, now: float) -> Object:
        image, node = _container(pod)["image"], pod["spec"]["nodeName"]
        life.stage = "pulled"
        if (node, image) in self._images:
            life.due = now
            self._events.normal(pod, "Pulled", f'Container image "{image}" already present on machine')
            return pod
        self._events.normal(pod, "Pulling", f'Pulling image "{image}"')
        bad = image in self._cloud.faults.bad_images
        stage = "image_pull" if _VLLM in image else "tool_pull"
        life.due = now + (1.0 if bad else self._durations.draw(stage))
        return self._waiting(pod, life, "ContainerCreating")

    def _pulled(self, pod: Object, life: _Life, now: float) -> Object:
        image, node = _container(pod)["image"], pod["spec"]["nodeName"]
        if image in self._cloud.faults.bad_images:
            life.failures += 1
            life.due = now + backoff(life.failures)
            self._events.warning(pod, "Failed", f'Failed to pull image "{image}": not found')
            self._events.warning(pod, "BackOff", f'Back-off pulling image "{image}"')
            return self._waiting(pod, life, "ImagePullBackOff")
        if (node, image) not in self._images:
            self._images.add((node, image))
            self._events.normal(pod, "Pulled", f'Successfully pulled image "{image}"')
        life.stage, life.due = "create", now + self._durations.draw("container_start")
        return pod

    def _start(self, pod: Object, life: _Life, now: float) -> Object:
        container = _container(pod)
        try:
            environment(self._store, pod, container)
        except MissingReference as missing:
            self._events.warning(pod, "Failed", f"Error: {missing}")
            life.due = now + FIRST_BACKOFF_S
            return self._waiting(pod, life, "CreateContainerConfigError", str(missing))
        healthy = now + self._durations.draw("model_load" if _uses_gpu(pod) else "tool_start")
        startup = container.get("startupProbe")
        passed = probe_passes(startup, now, healthy) if startup else now
        ready = probe_passes(container.get("readinessProbe"), now, max(healthy, passed or now))
        fails = startup_fails(startup, now, healthy)
        crash = self._cloud.faults.crash_after_s if _uses_gpu(pod) else None
        dies = min(math.inf if fails is None else fails, math.inf if crash is None else now + crash)
        error = self.hooks.refusal(pod)
        dies = now if error else dies
        life.process = Process(now, healthy, ready if ready is not None else math.inf, dies, error)
        life.stage, life.due = ("load", healthy) if healthy < dies else ("serve", dies)
        self._events.normal(pod, "Started", f"Started container {container['name']}")
        pod = self._running(pod, life, ready=False)
        life.announced = not error and self.hooks.starts(pod)
        return pod

    def _healthy(self, pod: Object, life: _Life, now: float) -> Object:
        assert life.process is not None
        life.announced = True
        for listener in self.hooks.healthy:
            listener(pod)
        ready_first = life.process.ready < life.process.dies
        life.stage, life.due = ("probe", life.process.ready) if ready_first else ("serve", life.process.dies)
        return pod

    def _ready(self, pod: Object, life: _Life, now: float) -> Object:
        assert life.process is not None
        if not self.hooks.answers(pod):
            life.due = now + at(_container(pod), "readinessProbe.periodSeconds", RELIST_S)
            return pod
        life.stage, life.due = "serve", life.process.dies
        return self._running(pod, life, ready=True)

    # the ways it ends

    def _crashed(self, pod: Object, life: _Life, now: float) -> Object:
        assert life.process is not None
        startup = startup_fails(_container(pod).get("startupProbe"), life.process.started, life.process.healthy)
        if startup is not None and now >= startup:
            self._events.warning(pod, "Unhealthy", "Startup probe failed")
            self._events.normal(pod, "Killing", f"Container {_container(pod)['name']} failed startup probe")
        ended = {"terminated": _exit(_container(pod), life.process, now)}
        code = life.process.code
        self._stop(pod, life)
        policy = pod["spec"]["restartPolicy"]
        if policy == "Never" or (policy == "OnFailure" and code == 0):
            return self._over(pod, life, ended, code)
        life.last = ended
        life.restarts += 1
        wait = backoff(life.restarts)
        self._events.warning(pod, "BackOff", f"Back-off restarting failed container {_container(pod)['name']}")
        life.stage, life.due = "create", now + wait
        message = f"back-off {wait:.0f}s restarting failed container={_container(pod)['name']} pod={name_of(pod)}"
        return self._waiting(pod, life, "CrashLoopBackOff", message)

    def _over(self, pod: Object, life: _Life, ended: dict[str, Any], code: int) -> Object:
        """The pod is not started again."""
        life.due = math.inf
        reason = "PodFailed" if code else "PodCompleted"
        pod = with_status(pod, phase="Failed" if code else "Succeeded", containerStatuses=[_status(pod, life, ended)])
        for kind in ("Ready", "ContainersReady"):
            pod = with_condition(pod, self._clock.now(), kind, False, reason)
        return self._write(pod)

    def _begin_stop(self, pod: Object, life: _Life, now: float) -> None:
        """The preStop sleep, then SIGTERM; never longer than the grace period."""
        if life.process is None:
            life.stage, life.due = "stop", now
            return
        life.killed = now + pod["metadata"].get("deletionGracePeriodSeconds", 30)
        sleep = at(_container(pod), "lifecycle.preStop.sleep.seconds", 0)
        self._events.normal(pod, "Killing", f"Stopping container {_container(pod)['name']}")
        life.stage, life.due = "prestop", min(now + sleep, life.killed)

    def _terminate(self, pod: Object, life: _Life, now: float) -> Object:
        if life.announced:
            for listener in self.hooks.terminated:
                listener(pod)
        life.stage, life.due = "stop", min(now + self._durations.draw("stop"), life.killed)
        return pod

    def _ended(self, pod: Object, life: _Life, now: float) -> Object:
        if now < life.killed and life.announced and self.hooks.drains(pod):
            life.due = min(now + RELIST_S, life.killed)
            return pod
        self._stop(pod, life)
        life.due = math.inf
        self._store.delete(POD, name_of(pod), namespace_of(pod), grace=0)
        return pod

    def _orphan(self, pod: Object, life: _Life) -> float | None:
        now = self._clock.now()
        if life.orphaned is None:
            life.orphaned = now
            self._stop(pod, life)
        if now < life.orphaned + ORPHAN_S:
            return life.orphaned + ORPHAN_S - now
        self._store.delete(POD, name_of(pod), namespace_of(pod), grace=0)
        return None

    def _stop(self, pod: Object, life: _Life) -> None:
        """The server is gone."""
        life.process = None
        if life.announced:
            life.announced = False
            for listener in self.hooks.stopped:
                listener(pod)

    def _forget(self, pod: Object) -> None:
        life = self._lives.pop(uid_of(pod), None)
        if life is not None:
            self._stop(pod, life)

    # what the pod's status says

    def _waiting(self, pod: Object, life: _Life, reason: str, message: str = "") -> Object:
        state = {"waiting": {"reason": reason} | ({"message": message} if message else {})}
        started = at(pod, "status.phase") == "Running"
        pod = with_status(
            pod, phase="Running" if started else "Pending", containerStatuses=[_status(pod, life, state)]
        )
        now = self._clock.now()
        if is_true(pod, "Ready"):
            pod = with_condition(pod, now, "Ready", False, "ContainersNotReady")
        return self._write(pod)

    def _running(self, pod: Object, life: _Life, ready: bool) -> Object:
        assert life.process is not None
        now = self._clock.now()
        state = {"running": {"startedAt": timestamp(life.process.started)}}
        container = {**_status(pod, life, state), "ready": ready, "started": True}
        ip = f"10.1.{len(self._lives) // 250}.{int(pod['metadata']['uid'][:2], 16) % 250 + 2}"
        pod = with_status(
            pod,
            phase="Running",
            startTime=at(pod, "status.startTime", timestamp(life.process.started)),
            podIP=at(pod, "status.podIP", ip),
            containerStatuses=[container],
        )
        for kind in ("Initialized", "ContainersReady", "Ready"):
            holds = ready or kind == "Initialized"
            pod = with_condition(pod, now, kind, holds, "" if holds else "ContainersNotReady")
        return self._write(pod)

    def _write(self, pod: Object) -> Object:
        meta = {key: value for key, value in pod["metadata"].items() if key != "resourceVersion"}
        return self._store.update_status(POD, {**pod, "metadata": meta})


def _container(pod: Object) -> dict[str, Any]:
    container: dict[str, Any] = pod["spec"]["containers"][0]
    return container


def _uses_gpu(pod: Object) -> bool:
    return GPU in at(_container(pod), "resources.limits", {})


def _status(pod: Object, life: _Life, state: dict[str, Any]) -> dict[str, Any]:
    container = _container(pod)
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": container["image"],
        "ready": False,
        "restartCount": life.restarts,
        "state": state,
        "lastState": life.last,
    }


def _exit(container: dict[str, Any], process: Process, now: float) -> dict[str, Any]:
    """How a process ended; what it wrote last, where the container asks for that in its status."""
    shown = container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
    return {
        "exitCode": process.code,
        "reason": "Error" if process.code else "Completed",
        "startedAt": timestamp(process.started),
        "finishedAt": timestamp(now),
        **({"message": process.error} if shown and process.error else {}),
    }
