"""vLLM's HTTP server on the engine in real time: emulated answers, real sockets.

The names are loaded on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpulab.serving.edge import serve_edge as serve_edge
    from pytest_gpulab.serving.server import serve as serve

_HOMES = {"serve": "server", "serve_edge": "edge"}

__all__ = ["serve", "serve_edge"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
