"""What test items reported, merged into a Record: the same for any order and any number of workers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_gpulab.definition import digest
from pytest_gpulab.gates import Gate
from pytest_gpulab.record import Decision, Evidence, Item, Problem, Provenance, Record, RunSummary, SessionInfo
from pytest_gpulab.verdict import combine, decides, weakest

if TYPE_CHECKING:
    from pytest_gpulab.markers import Entry


@dataclass
class Reported:
    """What one item has reported so far, over all its attempts."""

    evidence: Mapping[str, Any] | None = None
    """Of the first attempt with a verdict, else of the last one."""
    error: str = ""
    """Why the last attempt crashed."""
    skipped: str = ""
    done: bool = False
    """The item's last phase was reported."""

    def begin(self) -> None:
        """A new attempt: what crashed or was skipped before no longer counts."""
        self.error = self.skipped = ""
        self.done = False

    def add(self, evidence: Mapping[str, Any]) -> None:
        """Keep `evidence` unless an earlier attempt reached a verdict."""
        if self.evidence is None or self.evidence["verdict"] is None:
            self.evidence = evidence


@dataclass(frozen=True)
class Setting:
    """What all decisions of a session share."""

    target: str
    accelerator: str
    git_commit: str
    versions: Mapping[str, str]


def compose(
    catalog: Mapping[str, Entry],
    outcomes: Mapping[str, Reported],
    collection_errors: Mapping[str, str],
    setting: Setting,
    session: SessionInfo,
) -> Record:
    """The Record of a session: `catalog` says what was collected, `outcomes` what was reported, by node id."""
    errors = [Problem(nodeid=nodeid, decision=None, reason=reason) for nodeid, reason in collection_errors.items()]
    missing: list[Problem] = []
    items: dict[str, tuple[Item, Mapping[str, Any]]] = {}
    for nodeid, entry in catalog.items():
        outcome = outcomes.get(nodeid, Reported())
        item, bucket = _item(nodeid, entry, outcome)
        if bucket is not None:
            problem = Problem(nodeid=nodeid, decision=entry.decision, reason=item.reason)
            (errors if bucket == "errors" else missing).append(problem)
        items[nodeid] = item, outcome.evidence or {}
    by_decision: dict[str, list[str]] = {}
    for nodeid, entry in catalog.items():
        if entry.decision is not None:
            by_decision.setdefault(entry.decision, []).append(nodeid)
    return Record(
        target=setting.target,
        accelerator=setting.accelerator,
        session=session,
        decisions=tuple(
            _decision(id, catalog[nodeids[0]].statement, [items[nodeid] for nodeid in sorted(nodeids)], setting)
            for id, nodeids in sorted(by_decision.items())
        ),
        evidence=tuple(
            _evidence(catalog[nodeid], item, shown)
            for nodeid, (item, shown) in sorted(items.items())
            if catalog[nodeid].decision is None and shown
        ),
        errors=tuple(sorted(errors, key=lambda problem: problem.nodeid)),
        missing=tuple(sorted(missing, key=lambda problem: problem.nodeid)),
    )


def _item(nodeid: str, entry: Entry, outcome: Reported) -> tuple[Item, str | None]:
    """The item, and the list that must name it: errors, missing, or none."""
    shown = outcome.evidence or {}
    verdict, reason, bucket = shown.get("verdict"), str(shown.get("reason", "")), None
    if outcome.error:
        verdict, reason, bucket = None, outcome.error, "errors"
    elif not outcome.done:
        verdict, reason, bucket = None, "collected, but it did not run to its end", "missing"
    elif outcome.skipped:
        verdict, reason, bucket = None, outcome.skipped, "missing"
    elif verdict is None and entry.decision is not None:
        bucket = "errors"
    return (
        Item(
            nodeid=nodeid,
            verdict=verdict,
            reason=reason,
            gates=shown.get("gates", ()),
            runs=tuple(run["id"] for run in shown.get("runs", ())),
        ),
        bucket,
    )


def _decision(id: str, statement: str, parts: list[tuple[Item, Mapping[str, Any]]], setting: Setting) -> Decision:
    items = tuple(item for item, _ in parts)
    verdict = combine([item.verdict for item in items])
    deciding = next(item for item in items if decides(verdict, item.verdict))
    name = deciding.nodeid.rpartition("::")[2]
    runs = _merged(run for _, shown in parts for run in shown.get("runs", ()))
    gates = tuple(gate for item in items for gate in item.gates)
    return Decision(
        id=id,
        statement=statement,
        verdict=verdict,
        basis=weakest(run.basis for run in runs),
        reason=f"{name}: {deciding.reason}" if len(items) > 1 else deciding.reason,
        items=items,
        gates=gates,
        runs=runs,
        provenance=Provenance(
            target=setting.target,
            accelerator=", ".join(sorted({run.profile["accelerator"] for run in runs})) or setting.accelerator,
            seeds=tuple(sorted({seed for run in runs for seed in run.seeds})),
            definition_hash=_definition_hash(gates),
            git_commit=setting.git_commit,
            versions=dict(setting.versions),
        ),
    )


def _evidence(entry: Entry, item: Item, shown: Mapping[str, Any]) -> Evidence:
    runs = _merged(shown["runs"])
    return Evidence(
        nodeid=item.nodeid,
        statement=entry.statement,
        verdict=item.verdict,
        basis=weakest(run.basis for run in runs),
        reason=item.reason,
        gates=item.gates,
        runs=runs,
    )


def _merged(runs: Iterable[Mapping[str, Any]]) -> tuple[RunSummary, ...]:
    """One summary a definition and server, sorted by label: of the item that repeated it most often."""
    best: dict[tuple[str, ...], RunSummary] = {}
    for run in map(RunSummary.model_validate, runs):
        key = run.id, run.target, run.basis, run.server
        known = best.get(key)
        if known is None or (-len(run.seeds), run.label) < (-len(known.seeds), known.label):
            best[key] = run
    return tuple(sorted(best.values(), key=lambda run: (run.label, run.id, run.target, run.server)))


def _definition_hash(gates: Iterable[Gate]) -> str:
    """Over what was asked: a false gate ends its item, so it covers the gates up to there."""
    return digest(json.dumps([(gate.role, gate.definition_hash) for gate in gates]))
