"""The table of targets says what their classes say."""

from __future__ import annotations

from importlib import import_module

import pytest

from pytest_gpulab.rule import LOOKS
from pytest_gpulab.targets import kind_of, target_names


@pytest.mark.parametrize("name", target_names())
def test_the_table_agrees_with_the_class(name: str) -> None:
    kind = kind_of(name)
    target = getattr(import_module(f"pytest_gpulab.targets.{name}"), kind.class_name)
    assert (target.name, target.basis, target.max_repeats) == (name, kind.basis, kind.max_repeats)
    assert kind.max_repeats in {look.repeats for look in LOOKS}


def test_an_unknown_target_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown target 'vlm': did you mean 'vllm'\?"):
        kind_of("vlm")
