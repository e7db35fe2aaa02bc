"""The README's experiment does what the README says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_example_is_supported_with_the_reservation_it_states(pytester: pytest.Pytester) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    pytester.makepyfile(example)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    record = json.loads((pytester.path / "reports" / "decision-record.json").read_text(encoding="utf-8"))
    (decision,) = record["decisions"]
    assert (decision["id"], decision["verdict"], decision["basis"]) == ("queue", "caveated", "simulated")
    assert "2 s SLO" in decision["reason"]


def test_the_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
