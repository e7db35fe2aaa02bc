"""The decision record: all decisions of a session, as data."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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
    """Of the runs' profiles; the session's where nothing ran."""
    seeds: tuple[int, ...]
    definition_hash: str
    """Hash over the roles and definitions of all gates that were asked; a false one ends its item."""
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


class Problem(_Part):
    """An item that gave no verdict, and why."""

    nodeid: str
    decision: str | None
    """The decision that stays open because of it; None for evidence that no decision claims."""
    reason: str


class Evidence(_Part):
    """An item with gates that no decision claims; its statement is the first line of its docstring."""

    nodeid: str
    statement: str
    verdict: Verdict | None
    """None: the item is named under errors or missing."""
    basis: Basis | None
    reason: str
    gates: tuple[Gate, ...]
    runs: tuple[RunSummary, ...]


class SessionInfo(_Part):
    """How the session was run. All times of a record are here: the rest depends on the experiments and seeds only."""

    started: str
    """ISO 8601, UTC."""
    seconds: float = Field(ge=0)
    first_seed: int
    max_repeats: int
    require: Basis
    narrowed: str
    """What kept the session from running the whole catalog; empty in a full record."""
    collected: tuple[str, ...] = ()
    """Folders and files that pytest was given, from the root folder; empty in older records, which do not say."""
    load_from: str = "client"
    """Where the load came from: the machine that ran pytest, or pods of the cluster."""


class Record(_Part):
    """All decisions of a session. Lists are sorted by id or node id, whatever order the items ran in."""

    schema_version: Literal[1] = 1
    target: str
    accelerator: str
    """What the session asked for; a decision's provenance says what its profiles have."""
    session: SessionInfo
    decisions: tuple[Decision, ...]
    evidence: tuple[Evidence, ...]
    errors: tuple[Problem, ...]
    """Items that crashed."""
    missing: tuple[Problem, ...]
    """Items that were collected and gave no verdict without crashing: never run, or skipped."""

    def to_json(self) -> str:
        """Canonical text: keys in the order of the model, infinities as strings, one final newline."""
        return self.model_dump_json(indent=2) + "\n"


def schema_json() -> str:
    """The JSON schema of a record, as committed in ``reports/decision-record.schema.json``."""
    schema = Record.model_json_schema(mode="serialization")
    for name in ("value", "low", "high"):
        number = schema["$defs"]["Figure"]["properties"][name]
        number["anyOf"] = [{"type": number.pop("type")}, {"enum": ["Infinity", "-Infinity", "NaN"]}]
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    print(schema_json(), end="")
