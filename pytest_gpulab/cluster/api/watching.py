"""Watches: the changes of a kind as a stream, from a version on, as a selector sees them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from pytest_gpulab.cluster.api.requests import Call, flag, whole
from pytest_gpulab.cluster.api.tables import table
from pytest_gpulab.cluster.errors import ApiError, Expired
from pytest_gpulab.cluster.events import ADDED, DELETED, Event, Watch
from pytest_gpulab.cluster.objects import Object
from pytest_gpulab.cluster.selectors import field_selector, label_selector
from pytest_gpulab.cluster.store import Store

_BOOKMARK_EVERY = 60.0
_LONGEST = 1800
_INITIAL_EVENTS_END = "k8s.io/initial-events-end"


def selects(call: Call) -> Callable[[Object], bool]:
    """Whether an object is in the call's namespace and selectors."""
    labels = label_selector(call.query.get("labelSelector", ""))
    fields = field_selector(call.fields)

    def visible(obj: Object) -> bool:
        meta = obj["metadata"]
        in_space = not call.namespace or meta.get("namespace") == call.namespace
        return in_space and labels(meta.get("labels") or {}) and fields(obj)

    return visible


def seen(event: Event, visible: Callable[[Object], bool]) -> tuple[str, Object] | None:
    """The event as a selector sees it: an object that stops matching is deleted, one that starts is added."""
    now = visible(event.object)
    before = event.previous is not None and visible(event.previous)
    if event.type == DELETED:
        return (DELETED, event.object) if before else None
    if now:
        return (event.type if before else ADDED, event.object)
    if before and event.previous:
        version = event.object["metadata"]["resourceVersion"]
        return DELETED, {**event.previous, "metadata": {**event.previous["metadata"], "resourceVersion": version}}
    return None


async def stream(store: Store, call: Call, request: web.Request) -> web.StreamResponse:
    """Answer a watch until its time is over, the client leaves, or the server cancels it."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    try:
        async for kind, obj in _events(store, call):
            shown = table(call.resource, [obj], "", store.clock.now()) if _tabular(call, kind) else obj
            await response.write(json.dumps({"type": kind, "object": shown}).encode() + b"\n")
    except ApiError as refusal:
        await response.write(json.dumps({"type": "ERROR", "object": refusal.status()}).encode() + b"\n")
    except ConnectionResetError:
        pass
    return response


def _tabular(call: Call, kind: str) -> bool:
    return call.wants_table and kind != "BOOKMARK"


async def _events(store: Store, call: Call) -> AsyncIterator[tuple[str, Object]]:
    visible = selects(call)
    from_state = call.query.get("resourceVersion", "") in ("", "0") or flag(call.query, "sendInitialEvents")
    changed = asyncio.Event()
    watch = store.watch(call.resource, None if from_state else _start(call), changed.set)
    try:
        if from_state:
            version = store.version
            for obj in [obj for obj in store.list(call.resource, call.namespace) if visible(obj)]:
                yield ADDED, obj
            if flag(call.query, "sendInitialEvents"):
                yield "BOOKMARK", _bookmark(call, version, initial=True)
        async for item in _following(store, call, watch, changed):
            yield item
    finally:
        watch.close()


def _start(call: Call) -> int:
    try:
        return whole(call.query, "resourceVersion")
    except ApiError as error:
        raise Expired(f"resourceVersion: {error.message}") from error


async def _following(
    store: Store, call: Call, watch: Watch, changed: asyncio.Event
) -> AsyncIterator[tuple[str, Object]]:
    visible = selects(call)
    loop = asyncio.get_running_loop()
    end = loop.time() + whole(call.query, "timeoutSeconds", _LONGEST)
    while True:
        changed.clear()
        for event in watch.drain():
            if item := seen(event, visible):
                yield item
        left = end - loop.time()
        if left <= 0:
            return
        if watch.events:
            continue
        if not await _happens(changed, min(left, _BOOKMARK_EVERY)) and flag(call.query, "allowWatchBookmarks"):
            yield "BOOKMARK", _bookmark(call, store.version)


async def _happens(changed: asyncio.Event, within: float) -> bool:
    try:
        await asyncio.wait_for(changed.wait(), within)
    except TimeoutError:
        return False
    return True


def _bookmark(call: Call, version: int, *, initial: bool = False) -> Object:
    meta: Object = {"resourceVersion": str(version), "creationTimestamp": None}
    if initial:
        meta["annotations"] = {_INITIAL_EVENTS_END: "true"}
    return {"kind": call.resource.kind, "apiVersion": call.resource.api_version, "metadata": meta}
