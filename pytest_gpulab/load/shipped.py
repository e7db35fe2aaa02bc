"""The modules that a pod needs to send a share, as an archive that Python imports from.

They travel as they are; the image has what they need from others: Python, aiohttp, uvloop, numpy, pydantic.
"""

from __future__ import annotations

import io
import zipfile
from importlib.resources import files
from typing import Final

_MODULES: Final = (
    *("__init__", "accelerators", "arrivals", "catalog", "definition", "endpoint", "errors", "experiment", "fleet"),
    *("models", "run", "engine/__init__", "engine/client"),
    *("load/__init__", "load/answer", "load/bodies", "load/headroom", "load/local", "load/null_server", "load/pod"),
    *("load/progress", "load/reconcile", "load/sending", "load/shard", "load/share", "load/sse", "load/wire"),
    "load/words",
)
_DATE: Final = (1980, 1, 1, 0, 0, 0)
"""The same modules make the same archive."""


def shard_archive() -> bytes:
    """The archive, for PYTHONPATH."""
    package, file = files("pytest_gpulab"), io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for module in _MODULES:
            text = (package / f"{module}.py").read_text(encoding="utf-8")
            info = zipfile.ZipInfo(f"pytest_gpulab/{module}.py", _DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, text)
    return file.getvalue()
