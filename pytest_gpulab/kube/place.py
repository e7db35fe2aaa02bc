"""Where pids mean something: one boot of one machine, and one pid namespace (a container) there."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE: Final = Path("/proc/self/ns/pid")


def here() -> str:
    """This process's, as ``BOOT/NAMESPACE``; empty where the kernel tells neither, as on macOS."""
    try:
        return f"{_BOOT.read_text(encoding='ascii').strip()}/{_NAMESPACE.stat().st_ino}"
    except OSError:
        return ""
