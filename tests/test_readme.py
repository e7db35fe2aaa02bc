"""The examples of README and docs do what is said there, and the pages name what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import pytest_gpulab
from pytest_gpulab.measurement import Latency, Measurement

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "docs" / "experiments.md"


def decisions_of_the_example(page: Path, pytester: pytest.Pytester, **outcomes: int) -> dict[str, Any]:
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    pytester.makepyfile(example)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(**outcomes)
    record = json.loads((pytester.path / "reports" / "decision-record.json").read_text(encoding="utf-8"))
    return {decision["id"]: decision for decision in record["decisions"]}


def test_the_example_is_supported_with_the_reservation_it_states(pytester: pytest.Pytester) -> None:
    decision = decisions_of_the_example(ROOT / "README.md", pytester, passed=1)["queue"]
    assert (decision["verdict"], decision["basis"]) == ("caveated", "simulated")
    assert "2 s SLO" in decision["reason"]


def test_the_vocabulary_decides(pytester: pytest.Pytester) -> None:
    decisions = decisions_of_the_example(EXPERIMENTS, pytester, passed=3, skipped=1)
    verdicts = {id: decision["verdict"] for id, decision in decisions.items()}
    assert verdicts == {"chat-seqs": "caveated", "chat-rate": "supported", "chat-b200": "blocked"}


def test_the_vocabulary_is_complete() -> None:
    text = EXPERIMENTS.read_text(encoding="utf-8")
    figures = [name for of in (Measurement, Latency) for name in vars(of) if not name.startswith("_")]
    not_figures = {"run", "runs", "seeds", "max_repeats", "figure", "measurement", "interval", "errors"}
    words = {*pytest_gpulab.__all__, *figures} - not_figures - {"EngineArgs"}
    assert [word for word in sorted(words) if not re.search(rf"\b{word}\b", text)] == []


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_the_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_anchors_are_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        titles = re.findall(
            r"^#+ (.*)$", (page.parent / (target or page.name)).read_text(encoding="utf-8"), re.MULTILINE
        )
        assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
