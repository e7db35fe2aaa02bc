"""What is read from /metrics: names of several versions, several servers, restarts, gaps."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import pytest
from aiohttp import web

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.load.metrics import Scraper, parse_page

LABELS = '{engine="0",model_name="m"}'

V0_9 = f"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{LABELS} 3.0
vllm:num_requests_waiting{LABELS} 2.0
vllm:gpu_cache_usage_perc{LABELS} 0.25
vllm:gpu_prefix_cache_queries_total{LABELS} 100.0
vllm:gpu_prefix_cache_queries_created{LABELS} 1.75e+09
vllm:gpu_prefix_cache_hits_total{LABELS} 16.0
vllm:num_preemptions_total{LABELS} 1.0
vllm:time_per_output_token_seconds_bucket{{engine="0",le="0.01",model_name="m"}} 4.0
vllm:time_per_output_token_seconds_sum{LABELS} 0.5
vllm:time_per_output_token_seconds_count{LABELS} 40.0
"""
V0_11 = f"""vllm:gpu_cache_usage_perc{LABELS} 0.25
vllm:kv_cache_usage_perc{LABELS} 0.25
vllm:prefix_cache_queries_total{LABELS} 100.0
vllm:gpu_prefix_cache_queries_total{LABELS} 100.0
vllm:inter_token_latency_seconds_sum{LABELS} 0.5
vllm:time_per_output_token_seconds_sum{LABELS} 0.5
"""
V0_32 = """vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.2
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.4
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 10.0
vllm:request_success_total{engine="1",finished_reason="stop",model_name="m"} 5.0
vllm:request_success_total{engine="1",finished_reason="abort",model_name="m"} 7.0
vllm:request_queue_time_seconds_sum{engine="0",model_name="m, of {braces} 9"} 1.5e-05
python_gc_collections_total{generation="0"} 12.0
process_start_time_seconds 1.75e+09
"""


def test_older_names_are_the_newer_ones():
    page = parse_page(V0_9.encode())
    assert page["kv_cache_usage_perc"] == 0.25
    assert page["prefix_cache_queries_total"] == 100
    assert page["prefix_cache_hits_total"] == 16
    assert page["inter_token_latency_seconds_sum"] == 0.5
    assert page["inter_token_latency_seconds_count"] == 40
    assert not any("created" in name or "gpu_" in name or "bucket" in name for name in page)


def test_names_side_by_side_count_once():
    page = parse_page(V0_11.encode())
    assert page == {
        "kv_cache_usage_perc": 0.25,
        "prefix_cache_queries_total": 100,
        "inter_token_latency_seconds_sum": 0.5,
    }


def test_engines_of_one_server_are_summed():
    page = parse_page(V0_32.encode())
    assert page["num_requests_running"] == 7
    assert page["num_requests_waiting"] == 1
    assert page["kv_cache_usage_perc"] == pytest.approx(0.3)
    assert page["request_success_total"] == 15  # an aborted request is no success
    assert page["request_queue_time_seconds_sum"] == 1.5e-05
    assert page["process_start_time_seconds"] == 1.75e9
    assert not any(name.startswith("python") for name in page)


class Pages:
    """Metrics pages whose text the test sets; None: the server is away."""

    def __init__(self, *texts: str | None) -> None:
        self.texts = list(texts)
        self.headers: list[str] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers.get("X-Key", ""))
        text = self.texts[int(request.match_info["number"])]
        return web.Response(text=text or "", status=200 if text is not None else 503)


class Coming:
    """Servers that the test lets come and go: numbers of pages, and whether each must show its page."""

    def __init__(self):
        self.base, self.there = "", {}

    def begin(self, start):
        raise AssertionError("the load generator begins, not the scraper")

    def pages(self):
        return {f"{self.base}/{number}": ready for number, ready in self.there.items()}


def scraping(pages, check, coming=None):
    """Run `check(scraper)` against the pages."""

    async def run():
        app = web.Application()
        app.router.add_get("/{number}", pages.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        urls = tuple(f"{base}/{number}" for number in range(len(pages.texts)))
        if coming is not None:
            coming.base, urls = base, ()
        endpoint = Endpoint(base, "m", metrics_urls=urls, metrics_headers=lambda: {"X-Key": "k"})
        try:
            async with aiohttp.ClientSession() as session:
                await check(Scraper(endpoint, session, coming))
        finally:
            await runner.cleanup()

    asyncio.run(run())


def page(generated: float, running: int = 0, usage: float = 0.0, **more: float) -> str:
    values = {"generation_tokens_total": generated, "num_requests_running": running, "kv_cache_usage_perc": usage}
    return "".join(f"vllm:{name}{LABELS} {value}\n" for name, value in {**values, **more}.items())


def test_differences_over_several_servers():
    pages = Pages(page(100, x_seconds_sum=1.0), page(1000))

    async def check(scraper):
        await scraper.read_all(counts=False)
        assert scraper.totals == {}
        pages.texts = [page(150, x_seconds_sum=3.5), page(1007)]
        await scraper.read_all()
        assert scraper.totals == {"generation_tokens_total": 57, "x_seconds_sum": 2.5}
        assert scraper.restarts == 0
        assert scraper.silent == []

    scraping(pages, check)
    assert set(pages.headers) == {"k"}


@pytest.mark.parametrize("start_time", [False, True])
def test_a_restart_is_seen_and_its_counters_count_on(start_time):
    """By a counter that fell, or by the process' start when the counters are already past the old ones."""

    def text(generated, started):
        shown = f"process_start_time_seconds {started}\n" if start_time else ""
        return page(generated) + shown

    pages = Pages(text(100, 1.0))

    async def check(scraper):
        await scraper.read_all(counts=False)
        pages.texts = [text(160, 1.0)]
        await scraper.read_all()
        new = 200 if start_time else 30
        pages.texts = [text(new, 2.0)]
        await scraper.read_all()
        assert scraper.restarts == 1
        assert scraper.totals["generation_tokens_total"] == 60 + new
        pages.texts = [text(new + 5, 2.0)]
        await scraper.read_all()
        assert scraper.restarts == 1
        assert scraper.totals["generation_tokens_total"] == 65 + new

    scraping(pages, check)


def test_a_server_that_comes_during_the_run_counts_from_zero():
    pages = Pages(page(100), None)

    async def check(scraper):
        await scraper.read_all(counts=False)
        assert len(scraper.silent) == 1
        pages.texts = [page(110), page(7)]
        await scraper.read_all()
        assert scraper.totals["generation_tokens_total"] == 17
        pages.texts = [None, page(9)]
        await scraper.read_all()
        assert scraper.totals["generation_tokens_total"] == 19

    scraping(pages, check)


def test_samples_each_second():
    pages = Pages(page(10, running=1, usage=0.5), page(20, running=2, usage=0.1))

    async def check(scraper):
        await scraper.read_all(counts=False)
        pages.texts = [page(15, running=4, usage=0.6), page(20, running=2, usage=0.2)]
        start = time.perf_counter()
        task = asyncio.create_task(scraper.sample(start))
        while len(scraper.table) < 2:
            await asyncio.sleep(0.01)
        pages.texts = [None, None]
        while scraper.in_flight:
            await asyncio.sleep(0.01)
        task.cancel()
        rows = scraper.table
        assert rows["num_requests_running"].tolist() == [6, 6]
        assert rows["kv_cache_usage"].tolist() == pytest.approx([0.4, 0.4])
        assert rows["generation_tokens_total"].tolist() == [5, 5]
        assert 0.0 <= rows["time"][0] < 0.5
        assert 1.0 <= rows["time"][1] < 1.5

    scraping(pages, check)


def test_a_page_that_is_not_vllms_is_no_row_of_zeros():
    pages = Pages("<html>a login page</html>")

    async def check(scraper):
        await scraper.read_all(counts=False)
        task = asyncio.create_task(scraper.sample(time.perf_counter()))
        while len(pages.headers) < 3:  # before the run, and the second sample: the first has been taken in then
            await asyncio.sleep(0.01)
        task.cancel()
        assert len(scraper.table) == 0
        assert scraper.silent == scraper.urls

    scraping(pages, check)


def test_servers_come_and_go():
    """One is there before the run, one comes later and goes; what both have done in the run is counted."""
    pages, coming = Pages(page(100), page(7)), Coming()

    async def check(scraper):
        coming.there = {0: True}
        await scraper.read_all(counts=False)
        pages.texts[0] = page(110)
        coming.there = {0: True, 1: True}
        await scraper.read_all()
        assert scraper.totals["generation_tokens_total"] == 10 + 7
        assert (scraper.cut_off, scraper.silent) == (0, [])
        coming.there = {0: True}
        pages.texts[0] = page(115)
        await scraper.read_all()
        assert scraper.totals["generation_tokens_total"] == 15 + 7, "what it did is not forgotten"
        assert (scraper.cut_off, scraper.restarts) == (1, 0)

    scraping(pages, check, coming)


def test_a_server_that_dies_unnoticed_is_cut_off():
    """Its pod still looks Ready: samples are lost, and its last counts are known to be old."""
    pages, coming = Pages(page(100, running=3)), Coming()

    async def check(scraper):
        coming.there = {0: True}
        await scraper.read_all(counts=False)
        pages.texts = [None]
        task = asyncio.create_task(scraper.sample(time.perf_counter()))
        while not scraper.cut_off:
            await asyncio.sleep(0.01)
        task.cancel()
        assert scraper.cut_off == 1
        assert scraper.in_flight == 0
        assert len(scraper.table) == 0

    scraping(pages, check, coming)


def test_without_any_server_nothing_runs():
    pages, coming = Pages(page(50, running=2, usage=0.4)), Coming()

    async def check(scraper):
        await scraper.read_all(counts=False)
        task = asyncio.create_task(scraper.sample(time.perf_counter()))
        while not len(scraper.table):
            await asyncio.sleep(0.01)
        coming.there = {0: True}
        while len(scraper.table) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        rows = scraper.table
        assert rows["num_requests_running"].tolist() == [0, 2, 2]
        assert rows["generation_tokens_total"].tolist() == [0, 50, 50]
        assert rows["kv_cache_usage"].tolist() == pytest.approx([0.0, 0.4, 0.4])
        assert scraper.busy_s == pytest.approx(rows["time"][2] - rows["time"][0])

    scraping(pages, check, coming)


def test_a_server_that_never_shows_its_page_is_silent():
    pages, coming = Pages(None, None), Coming()

    async def check(scraper):
        coming.there = {0: True, 1: False}
        await scraper.read_all()
        assert [url[-1] for url in scraper.silent] == ["0"], "the other one is not ready"

    scraping(pages, check, coming)
