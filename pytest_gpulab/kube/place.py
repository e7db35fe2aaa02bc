"""Where pids mean something: one boot of one machine, and one pid namespace (a container) there."""

from __future__ import annotations

import socket
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


def can_see(host: str, place: str) -> bool:
    """Whether a process of `place`, when the machine was called `host`, can be told alive or dead from here.

    A machine that goes on is known by its boot, whatever it is called now. With another boot, or none that is known,
    only the name is left: a machine that was started anew has none of its processes any more.
    """
    ours = here()
    if place and _boot(place) == _boot(ours):
        return place == ours
    return host == socket.gethostname()


def _boot(place: str) -> str:
    return place.partition("/")[0]
