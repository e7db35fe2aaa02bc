"""vLLM's ``/metrics``: read before, during and after a run, over one or several servers.

Names are those of vLLM 0.10 and later without the ``vllm:`` prefix; the older names of the same thing are read where
a page does not have the new one.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.load.gpu import GpuSample, dcgm_samples
from pytest_gpulab.load.servers import Servers
from pytest_gpulab.run import SERVER_DTYPE

_OLDER_NAMES = {
    "gpu_cache_usage_perc": "kv_cache_usage_perc",
    "gpu_prefix_cache_queries_total": "prefix_cache_queries_total",
    "gpu_prefix_cache_hits_total": "prefix_cache_hits_total",
    "time_per_output_token_seconds_sum": "inter_token_latency_seconds_sum",
    "time_per_output_token_seconds_count": "inter_token_latency_seconds_count",
}
_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_COUNTERS = ("prompt_tokens_total", "generation_tokens_total", "num_preemptions_total")
_NO_SUCCESS = ('finished_reason="abort"', 'finished_reason="error"')
_STARTED = "process_start_time_seconds"

_SAMPLE = re.compile(rb"^(?:vllm:)?(\w+)(?:\{(.*)\})?[ \t]+(\S+)")
_EVERY_SECOND = re.compile(
    rb"^vllm:(?:%s)[{ ].*$" % b"|".join(name.encode() for name in (*_GAUGES, "gpu_cache_usage_perc", *_COUNTERS)),
    re.MULTILINE,
)

Page = Mapping[str, float]
"""Name -> value, over all engines of one server: counters and numbers of requests summed, KV usage the mean."""


def parse_page(text: bytes) -> Page:
    """Counters, sums and counts of histograms, and the gauges this package uses, from Prometheus' text format."""
    values: dict[str, list[float]] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None or not line.startswith((b"vllm:", _STARTED.encode())):
            continue
        name, labels = sample[1].decode(), (sample[2] or b"").decode()
        if _is_wanted(name) and not (name == "request_success_total" and any(no in labels for no in _NO_SUCCESS)):
            values.setdefault(name, []).append(float(sample[3]))
    for old, new in _OLDER_NAMES.items():
        if old in values:
            older = values.pop(old)
            values.setdefault(new, older)
    page = {name: sum(listed) for name, listed in values.items()}
    for name in ("kv_cache_usage_perc", _STARTED):
        if name in values:
            page[name] /= len(values[name])
    return page


def _is_wanted(name: str) -> bool:
    return name.endswith(("_total", "_sum", "_count")) or name in (*_GAUGES, "gpu_cache_usage_perc", _STARTED)


def _is_counter(name: str) -> bool:
    return name.endswith(("_total", "_sum", "_count"))


@dataclass
class _Server:
    """One metrics page over the run. `increases`: of every counter since the first reading."""

    url: str
    last: dict[str, float] = field(default_factory=dict)
    increases: dict[str, float] = field(default_factory=dict)
    restarts: int = 0
    seen: bool = False
    fresh: bool = True
    """Whether it answered when it was last asked."""
    owed: bool = True
    """Whether its page must come: servers that are not ready yet, or about to end, need not show one."""

    def read(self, page: Page, *, counts: bool) -> None:
        """Take a page in. What a server counted before its first page with `counts` is not the run's."""
        restarted = any(_is_counter(name) and value < self.last.get(name, 0.0) for name, value in page.items())
        restarted |= page.get(_STARTED, 0.0) > self.last.get(_STARTED, float("inf"))
        self.restarts += restarted
        for name, value in page.items():
            if counts and _is_counter(name):
                before = 0.0 if restarted else self.last.get(name, 0.0)
                self.increases[name] = self.increases.get(name, 0.0) + value - before
        self.last = dict(page) if restarted else {**self.last, **page}
        self.seen = True


class Scraper:
    """Reads the metrics of all servers of an endpoint. Times are seconds from the run's start.

    `servers`: those that come and go. What one had counted when it was first seen counts as the run's, because it did
    not exist before; what it did after its last page is not known.
    """

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession, servers: Servers | None = None) -> None:
        self._headers = endpoint.metrics_headers
        self._ssl = ssl.create_default_context(cafile=endpoint.metrics_ca) if endpoint.metrics_ca else True
        self._session = session
        self._servers = [_Server(url) for url in endpoint.metrics_urls]
        self._come_and_go = servers
        self._ended: list[_Server] = []
        self._rows: list[tuple[float, ...]] = []
        self.busy_s = 0.0
        """Seconds in which a server ran a request, summed over the servers."""
        self.gpu_samples: list[GpuSample] = []
        """What pages of DCGM's exporter say of GPUs."""

    @property
    def restarts(self) -> int:
        """How often a server was seen to have restarted."""
        return sum(server.restarts for server in (*self._servers, *self._ended))

    @property
    def cut_off(self) -> int:
        """How many of the servers that come and go have shown metrics, but do not any more."""
        if self._come_and_go is None:
            return 0
        return sum(server.seen for server in self._ended) + sum(s.seen and not s.fresh for s in self._servers)

    @property
    def urls(self) -> list[str]:
        """All pages."""
        return [server.url for server in self._servers]

    @property
    def silent(self) -> list[str]:
        """Pages that have never been read; all of them when none of them is vLLM's."""
        if self._come_and_go is not None:
            return [server.url for server in self._servers if server.owed and not server.seen]
        if not any(_GAUGES[0] in server.last for server in self._servers):
            return self.urls
        return [server.url for server in self._servers if not server.seen]

    @property
    def totals(self) -> dict[str, float]:
        """Increases of all counters between the first and the last reading, over all servers."""
        totals: dict[str, float] = {}
        for server in (*self._servers, *self._ended):
            for name, increase in server.increases.items():
                totals[name] = totals.get(name, 0.0) + increase
        return totals

    @property
    def in_flight(self) -> float:
        """Requests running or waiting at the last reading."""
        names = ("num_requests_running", "num_requests_waiting")
        return sum(server.last.get(name, 0.0) for server in self._servers if server.fresh for name in names)

    @property
    def table(self) -> NDArray[Any]:
        """SERVER_DTYPE, one row a second; none while no vLLM answers, fewer while answers take longer."""
        return np.array(self._rows, dtype=SERVER_DTYPE)

    async def read_all(self, *, counts: bool = True, timeout_s: float = 10.0) -> bool:
        """Read the whole pages. With `counts` off, the values are where counting starts. False: no page came."""
        pages = await self._pages(timeout_s)
        for server, text in zip(self._servers, pages, strict=True):
            if text is not None:
                server.read(parse_page(text), counts=counts)
        return any(text is not None for text in pages)

    async def sample(self, start: float) -> None:
        """Add a row each second from `start` (``time.perf_counter``) on, until cancelled."""
        second = 0
        while self._servers or self._come_and_go is not None:
            await asyncio.sleep(max(0.0, start + second - time.perf_counter()))
            pages = await self._pages(timeout_s=5.0)
            now = time.perf_counter() - start
            self._add_row(now, pages)
            second = max(second, int(now)) + 1

    def _add_row(self, now: float, pages: list[bytes | None]) -> None:
        read = []
        self.gpu_samples += [sample for text in pages if text is not None for sample in dcgm_samples(text)]
        for server, text in zip(self._servers, pages, strict=True):
            if text is not None:
                # Whole, where it may be the last one that its server shows.
                whole = self._come_and_go is not None
                page = parse_page(text if whole else b"\n".join(_EVERY_SECOND.findall(text)))
                server.read(page, counts=True)
                if _GAUGES[0] in page:  # a page of DCGM's exporter has none
                    read.append(page)
        if not read and any(server.owed for server in self._servers):
            return
        running, waiting, usage = (sum(page.get(name, 0.0) for page in read) for name in _GAUGES)
        totals = self.totals
        since = self._rows[-1][0] if self._rows else 0.0
        self.busy_s += (now - since) * sum(page[_GAUGES[0]] > 0 for page in read)
        usage /= max(len(read), 1)
        self._rows.append((now, running, waiting, usage, *(totals.get(name, 0.0) for name in _COUNTERS)))

    def _look_around(self) -> None:
        """Which of the servers that come and go are there now."""
        if self._come_and_go is None:
            return
        now = dict(self._come_and_go.pages())
        self._ended += [server for server in self._servers if server.url not in now]
        self._servers = [server for server in self._servers if server.url in now]
        known = {server.url for server in self._servers}
        self._servers += [_Server(url) for url in now if url not in known]
        for server in self._servers:
            server.owed = now[server.url]

    async def _pages(self, timeout_s: float) -> list[bytes | None]:
        self._look_around()
        try:
            headers = self._headers()  # a token is signed in less than a millisecond
        except OSError:  # no credentials any more
            return [None] * len(self._servers)
        asked = (self._page(server.url, headers, timeout_s) for server in self._servers)
        pages = list(await asyncio.gather(*asked))
        for server, page in zip(self._servers, pages, strict=True):
            server.fresh = page is not None
        return pages

    async def _page(self, url: str, headers: Mapping[str, str], timeout_s: float) -> bytes | None:
        try:
            asked = self._session.get(url, headers=headers, ssl=self._ssl, allow_redirects=False)
            async with asyncio.timeout(timeout_s), asked as response:
                return await response.read() if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None
