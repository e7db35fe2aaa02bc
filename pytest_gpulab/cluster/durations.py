"""How long things take in the emulated cloud: a named profile of seeded distributions.

Every stage has its own random stream, so a stage that is drawn more often does not change the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final, Self

import numpy as np

from pytest_gpulab.accelerators import find_accelerator


@dataclass(frozen=True)
class Span:
    """Seconds between `low` and `high`, all equally likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < float("inf"):
            raise ValueError(f"a span must be 0 <= low <= high, got {self.low} to {self.high} s: swap or raise them")

    @property
    def mean(self) -> float:
        """Seconds."""
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Stages:
    """Seconds that each stage of a cold start and of a teardown takes.

    The defaults reproduce a spike from zero on EKS with g4dn.xlarge (vLLM v0.9.0, plain image pull), in seconds from
    the trigger: NodeClaim 3 to 12, node 35, pod scheduled 65, container started 354 to 357, model ready 425 to 439.
    Karpenter's batch window of 1 s is part of the first, a readiness probe of 5 s part of the last.
    """

    decide: Span = Span(2.0, 11.0)
    """Karpenter, from the end of its batch to the NodeClaim."""
    launch: Span = Span(2.5, 3.5)
    """EC2 CreateFleet, from the NodeClaim to Launched."""
    boot: Span = Span(23.0, 26.0)
    """From Launched to the Node object: boot and kubelet start."""
    node_ready: Span = Span(11.0, 13.0)
    """From the Node object to its Ready condition."""
    gpu_ready: Span = Span(17.0, 19.0)
    """From Ready to an allocatable nvidia.com/gpu: the device plugin."""
    image_pull: Span = Span(288.0, 291.0)
    """Of an image the node does not have."""
    container_start: Span = Span(0.5, 1.5)
    """From the image to the running process."""
    model_load: Span = Span(68.5, 79.5)
    """From process start to the first 200 of /health."""
    tool_pull: Span = Span(4.0, 8.0)
    """Of an image of some 100 MB, without a model server; assumed."""
    tool_start: Span = Span(1.0, 3.0)
    """From process start to the first successful probe, without a model; assumed."""
    stop: Span = Span(1.0, 3.0)
    """From SIGTERM to the end of the process."""
    terminate: Span = Span(25.0, 40.0)
    """EC2, from TerminateInstances to terminated."""
    balancer: Span = Span(120.0, 180.0)
    """From the Ingress to an active ALB: the two to three minutes that users report; assumed, not measured here."""
    balancer_delete: Span = Span(5.0, 15.0)
    """From the deletion of the Ingress to the end of its ALB; assumed."""

    def replace(self, **spans: Span) -> Self:
        """The same stages with some changed."""
        return replace(self, **spans)

    @classmethod
    def fast(cls, factor: float) -> Self:
        """The default stages, every one `factor` times as long."""
        whole = cls()
        return replace(whole, **{f.name: _scaled(getattr(whole, f.name), factor) for f in fields(cls)})


def _scaled(span: Span, factor: float) -> Span:
    return Span(span.low * factor, span.high * factor)


G4DN = Stages()
"""g4dn.xlarge, plain image pull of the vLLM image over the network."""

P5EN = Stages(model_load=Span(78.0, 109.0))
"""An H200 that loads an 8B model: vLLM 0.25.1 took 78 to 109 s from process start to ready (measured). Nothing is
published of the node and the image there: those stages are g4dn's."""

_LAZY_PULL: Final = Span(38.0, 41.0)
"""Of a lazily loaded image (SOCI): 39.6 s for 9.35 GB (published figure)."""

# "brief" is like no machine: g4dn's proportions in 9 s, to try a study in real time.
PROFILES: Mapping[str, Stages] = {
    "g4dn": G4DN,
    "g4dn-soci": G4DN.replace(image_pull=_LAZY_PULL),
    "p5en": P5EN,
    "p5en-soci": P5EN.replace(image_pull=_LAZY_PULL),
    "brief": Stages.fast(1 / 50),
}


def stages_text(name: str, accelerator: str) -> str:
    """``g4dn cluster``, as runs say whose cold starts they have; with a remark where `accelerator` has others."""
    family = name.partition("-")[0]
    own = family in find_accelerator(accelerator).families
    return f"{name} cluster" + ("" if own else f" (cold starts not measured on {accelerator})")


@dataclass
class Durations:
    """Draws stage lengths; the same seed and the same order of draws within a stage give the same seconds."""

    stages: Stages = G4DN
    seed: int = 0
    _streams: dict[str, np.random.Generator] = field(default_factory=dict, repr=False)

    def draw(self, stage: str) -> float:
        """Seconds of the next `stage`, by its name in Stages."""
        span: Span = getattr(self.stages, stage)
        if stage not in self._streams:
            key = np.random.SeedSequence([self.seed, zlib.crc32(stage.encode())])
            self._streams[stage] = np.random.Generator(np.random.PCG64(key))
        return float(self._streams[stage].uniform(span.low, span.high))
