"""Kubernetes' protobuf as kubectl 1.32 sends it, and what only looks like it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab.cluster.api.protobuf import decode
from pytest_gpulab.cluster.errors import ApiError, BadRequest, Unsupported

NAMESPACE = (
    b'k8s\x00\n\x0f\n\x02v1\x12\tNamespace\x12\x19\n\x11\n\x01x\x12\x00\x1a\x00"\x00*\x002\x008\x00B\x00\x12\x00'
    b'\x1a\x02\n\x00\x1a\x00"\x00'
)
"""`kubectl create namespace x`, recorded."""
SECRET = (
    b'k8s\x00\n\x0c\n\x02v1\x12\x06Secret\x12 \n\x14\n\x01s\x12\x00\x1a\x03foo"\x00*\x002\x008\x00B\x00\x12\x06'
    b'\n\x01a\x12\x01b\x1a\x00\x1a\x00"\x00'
)
"""`kubectl create secret generic s -n foo --from-literal=a=b`, recorded."""


def envelope(kind: bytes, raw: bytes) -> bytes:
    meta = b"\n\x02v1\x12" + bytes([len(kind)]) + kind
    return b"k8s\0\n" + bytes([len(meta)]) + meta + b"\x12" + bytes([len(raw)]) + raw


def test_what_kubectl_sends_is_read():
    assert decode(NAMESPACE) == {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}
    meta = {"name": "s", "namespace": "foo"}
    assert decode(SECRET) == {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": {"a": "Yg=="}}


@pytest.mark.parametrize(("sent", "read"), [(b" \x00", False), (b" \x01", True), (b"", None)])
def test_a_boolean_that_is_sent_was_set(sent: bytes, read: bool | None):
    assert decode(envelope(b"ServiceAccount", sent)).get("automountServiceAccountToken") is read


@pytest.mark.parametrize(
    "raw",
    [
        b"\x12\x03\n\x01x",  # ServiceAccount.secrets
        b"\n\x04j\x02\x08\x01",  # ObjectMeta.ownerReferences
    ],
)
def test_a_field_that_would_be_lost_is_refused(raw: bytes):
    with pytest.raises(Unsupported, match="create -f"):
        decode(envelope(b"ServiceAccount", raw))


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"k8s\0", NAMESPACE[:-10], b"k8s\0" + b"\xff" * 100, envelope(b"Namespace", b"\n\x03\n\x01\xff")],
)
def test_what_is_no_protobuf_is_a_bad_request(body: bytes):
    with pytest.raises(BadRequest):
        decode(body)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(junk: bytes):
    for body in (b"k8s\0" + junk, envelope(b"ConfigMap", junk[:100])):
        try:
            assert isinstance(decode(body), dict)
        except ApiError as refusal:
            assert refusal.code in (400, 415)
