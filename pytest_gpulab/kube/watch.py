"""Watching kinds of objects, each in a thread of its own: what changes is heard when it happens.

A stream that breaks off is begun again with a list, so nothing is missed but what came and went in between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from pytest_gpulab.kube.client import Kube, KubeError
from pytest_gpulab.kube.objects import Object

Heard = Callable[[Object, bool], None]
"""Takes an object as it is now, and whether it is gone. Called by one thread at a time for a kind."""

_STREAM_S: Final = 10
"""Seconds of one stream: as long as a thread may outlive the watch."""
_PAUSE_S: Final = 0.5


def watch(
    kube: Kube,
    over: threading.Event,
    api_version: str,
    kind: str,
    heard: Heard,
    *,
    namespace: str = "",
    labels: str = "",
) -> None:
    """Call `heard` for every object that the labels select, and for every change of one, until `over`.

    Returns when those that exist now have been heard. KubeError when they could not be listed.
    """
    selected = {"namespace": namespace, "labels": labels}
    watched = _Watch(kube, over, api_version, kind, heard, selected)
    version = watched.take_stock()
    threading.Thread(target=watched.keep_on, args=(version,), name=f"watch {kind}", daemon=True).start()


@dataclass
class _Watch:
    kube: Kube
    over: threading.Event
    api_version: str
    kind: str
    heard: Heard
    selected: dict[str, str]
    known: dict[str, Object] = field(default_factory=dict)

    def keep_on(self, version: str) -> None:
        while not self.over.is_set():
            with self._trying():
                self._follow(version)
            with self._trying():
                version = self.take_stock()

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """What breaks off is tried again after a pause."""
        try:
            yield
        except (KubeError, ApiException, HTTPError, OSError, ValueError):
            self.over.wait(_PAUSE_S)

    def take_stock(self) -> str:
        """Hear what differs from what is known; the version of the list."""
        objects, version = self.kube.snapshot(self.api_version, self.kind, **self.selected)
        there = {obj["metadata"]["uid"]: obj for obj in objects}
        for uid in set(self.known) - set(there):
            self._take(self.known[uid], gone=True)
        for uid, obj in there.items():
            if uid not in self.known or self.known[uid]["metadata"] != obj["metadata"]:
                self._take(obj, gone=False)
        return version

    def _follow(self, version: str) -> None:
        changes = self.kube.watch(self.api_version, self.kind, **self.selected, since=version, for_s=_STREAM_S)
        for change, obj in changes:
            if self.over.is_set():
                return
            if change != "BOOKMARK":
                self._take(obj, gone=change == "DELETED")

    def _take(self, obj: Object, *, gone: bool) -> None:
        uid = obj["metadata"]["uid"]
        if gone:
            self.known.pop(uid, None)
        else:
            self.known[uid] = obj
        if not self.over.is_set():
            self.heard(obj, gone)
