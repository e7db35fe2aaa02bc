"""The decision record: all decisions of a session, as data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pytest_gpulab.gates import Figure, Gate
from pytest_gpulab.run import Basis

Verdict = Literal["supported", "caveated", "partial", "rejected", "open", "blocked"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class RunSummary(_Part):
    """One measured arm: what was run, how often, and its figures over the repeats."""

    id: str
    """Definition hash of workload and profile: equal definitions share their runs."""
    label: str
    target: str
    basis: Basis
    server: str
    """Calibration and variant, or vLLM version and GPU."""
    workload: dict[str, Any]
    profile: dict[str, Any]
    seeds: tuple[int, ...]
    figures: tuple[Figure, ...]
    problems: tuple[str, ...] = ()
    """Why the evidence is invalid; empty when it is valid."""


class Item(_Part):
    """One test item and what it said."""

    nodeid: str
    verdict: Verdict | None
    """None: no verdict (error or missing)."""
    reason: str
    gates: tuple[Gate, ...] = ()
    runs: tuple[str, ...] = ()


class Provenance(_Part):
    """What produced a decision's evidence."""

    target: str
    accelerator: str
    seeds: tuple[int, ...]
    definition_hash: str
    """Hash over the ids of all runs and the texts of all gates."""
    git_commit: str
    """Of the experiments' folder; ends in ``+dirty`` with uncommitted changes; empty outside git."""
    versions: dict[str, str]


class Decision(_Part):
    """A question with its verdict and everything that decided it."""

    id: str
    statement: str
    verdict: Verdict
    basis: Basis | None
    """The weakest basis among the runs (simulated < emulated < measured); None without a run."""
    reason: str
    """The deciding gate in a sentence."""
    items: tuple[Item, ...]
    gates: tuple[Gate, ...]
    runs: tuple[RunSummary, ...]
    provenance: Provenance
