"""Which rule of an Ingress a path belongs to."""

from __future__ import annotations

import pytest

from pytest_gpulab.live.ingress import matches, rules_of


@pytest.mark.parametrize(
    ("kind", "path", "own", "others"),
    [
        ("Prefix", "/v1", ["/v1", "/v1/", "/v1/models"], ["/", "/v1beta", "/v2", "/V1", "/a/v1"]),
        ("Prefix", "/v1/", ["/v1", "/v1/", "/v1/models"], ["/v1beta", "/v2"]),
        ("Prefix", "/", ["/", "/v1", "/metrics"], []),
        ("Exact", "/v1", ["/v1"], ["/v1/", "/v1/models"]),
        ("ImplementationSpecific", "/v1/*", ["/v1/models", "/v1/"], ["/v1", "/v2/models"]),
    ],
)
def test_paths(kind, path, own, others):
    """Prefix and Exact as in the table of Kubernetes' documentation, the third as an ALB's path pattern."""
    (rule,) = rules_of({"rules": [{"http": {"paths": [{"path": path, "pathType": kind}]}}]})
    assert [asked for asked in [*own, *others] if matches(rule, asked)] == own


def test_a_rule_without_a_path_takes_all():
    (rule,) = rules_of({"rules": [{"http": {"paths": [{"pathType": "ImplementationSpecific"}]}}, {}]})
    assert matches(rule, "/anything")
