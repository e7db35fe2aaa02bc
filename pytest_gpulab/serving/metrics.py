"""vLLM's Prometheus metrics: its names, types, labels and bucket edges, written as text.

Times are model seconds, so they do not depend on the server's speed. As in vLLM, a request that its client aborted
is in the token counters and in no metric of finished requests: not even in `request_success_total` with
``finished_reason="abort"``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

LATENCY_EDGES: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
FIRST_TOKEN_EDGES: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_EDGES: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
STEP_TOKEN_EDGES: Final = tuple(float(edge) for edge in (1, *(2**power for power in range(3, 15))))
N_EDGES: Final = (1.0, 2.0, 5.0, 10.0, 20.0)
FINISHED_REASONS: Final = ("stop", "length", "abort", "error", "repetition")


def token_edges(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to the context length in tokens."""
    edges = (factor * 10**power for power in range(len(str(max_model_len))) for factor in (1, 2, 5))
    return tuple(float(edge) for edge in edges if edge <= max_model_len)


class Histogram:
    """Counts of observed values by upper edge, and their sum."""

    __slots__ = ("_counts", "edges", "sum")

    def __init__(self, edges: tuple[float, ...]) -> None:
        self.edges = edges
        self.sum = 0.0
        self._counts = [0] * (len(edges) + 1)

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self._counts)

    def observe(self, value: float) -> None:
        """Count a value, in the unit of the edges."""
        self._counts[bisect_left(self.edges, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Samples in the text format; `labels` without braces."""
        total = 0
        for edge, count in zip((*self.edges, None), self._counts, strict=True):
            total += count
            le = "+Inf" if edge is None else repr(edge)
            yield f'{name}_bucket{{{labels},le="{le}"}} {total}.0'
        yield f"{name}_count{{{labels}}} {total}.0"
        yield f"{name}_sum{{{labels}}} {self.sum!r}"


@dataclass(frozen=True, slots=True)
class Finished:
    """What is known of a request when its last token has been handled: tokens, and model seconds."""

    reason: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    asked_tokens: int | None
    arrived: float
    queued: float
    scheduled: float
    first_token: float
    last_token: float
    handled: float


@dataclass(frozen=True, slots=True)
class State:
    """The scheduler when it is scraped. `lag_s`: by how many model seconds the server was late at worst."""

    running: int
    waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    lag_s: float


class Metrics:
    """One engine's metrics. The engine loop reports, `text` is what ``GET /metrics`` answers."""

    def __init__(self, model: str, max_model_len: int, cache_config: Mapping[str, object]) -> None:
        self._labels = f'engine="0",model_name="{_escaped(model)}"'
        self._cache_config = cache_config
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.finished_requests = dict.fromkeys(FINISHED_REASONS, 0)
        tokens = token_edges(max_model_len)
        self.histograms = {
            "request_prompt_tokens": Histogram(tokens),
            "request_generation_tokens": Histogram(tokens),
            "iteration_tokens_total": Histogram(STEP_TOKEN_EDGES),
            "request_max_num_generation_tokens": Histogram(tokens),
            "request_params_n": Histogram(N_EDGES),
            "request_params_max_tokens": Histogram(tokens),
            "time_to_first_token_seconds": Histogram(FIRST_TOKEN_EDGES),
            "inter_token_latency_seconds": Histogram(INTER_TOKEN_EDGES),
            "request_time_per_output_token_seconds": Histogram(INTER_TOKEN_EDGES),
            "e2e_request_latency_seconds": Histogram(LATENCY_EDGES),
            "request_queue_time_seconds": Histogram(LATENCY_EDGES),
            "request_inference_time_seconds": Histogram(LATENCY_EDGES),
            "request_prefill_time_seconds": Histogram(LATENCY_EDGES),
            "request_decode_time_seconds": Histogram(LATENCY_EDGES),
            "request_prefill_kv_computed_tokens": Histogram(tokens),
        }
        self._observe_first = self.histograms["time_to_first_token_seconds"].observe
        self._observe_next = self.histograms["inter_token_latency_seconds"].observe

    def first_token(self, prompt_tokens: int, cached_tokens: int, seconds: float) -> None:
        """A prompt has been processed; its first token came `seconds` after the request."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self._observe_first(seconds)

    def next_token(self, seconds: float) -> None:
        """A token came `seconds` after the one before."""
        self._observe_next(seconds)

    def step(self, prompt_tokens: int, generation_tokens: int) -> None:
        """A step's outputs were handled."""
        self.generation_tokens += generation_tokens
        self.histograms["iteration_tokens_total"].observe(prompt_tokens + generation_tokens)

    def finish(self, request: Finished) -> None:
        """A request has all its tokens."""
        self.finished_requests[request.reason] += 1
        decode = request.last_token - request.first_token
        values = {
            "request_prompt_tokens": request.prompt_tokens,
            "request_generation_tokens": request.output_tokens,
            "request_max_num_generation_tokens": request.output_tokens,
            "request_params_n": 1,
            "e2e_request_latency_seconds": request.handled - request.arrived,
            "request_queue_time_seconds": request.scheduled - request.queued,
            "request_inference_time_seconds": request.last_token - request.scheduled,
            "request_prefill_time_seconds": request.first_token - request.scheduled,
            "request_decode_time_seconds": decode,
            "request_prefill_kv_computed_tokens": request.prompt_tokens - request.cached_tokens,
            "request_time_per_output_token_seconds": decode / max(1, request.output_tokens - 1),
        }
        if request.asked_tokens is not None:
            values["request_params_max_tokens"] = request.asked_tokens
        for name, value in values.items():
            self.histograms[name].observe(value)

    def text(self, state: State) -> str:
        """The exposition in Prometheus' text format 0.0.4."""
        return "\n".join([*self._gauges(state), *self._counters(state), *self._histograms(), ""])

    def _gauges(self, state: State) -> Iterator[str]:
        yield from self._one("num_requests_running", "gauge", state.running)
        yield from self._one("num_requests_waiting", "gauge", state.waiting)
        by_reason = {"capacity": state.waiting, "deferred": 0}
        yield from self._by("num_requests_waiting_by_reason", "gauge", "reason", by_reason)
        asleep = {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
        yield from self._by("engine_sleep_state", "gauge", "sleep_state", asleep)
        yield from self._one("kv_cache_usage_perc", "gauge", state.kv_usage)
        config = ",".join(f'{name}="{_escaped(str(value))}"' for name, value in self._cache_config.items())
        yield from _family("vllm:cache_config_info", "gauge", [(f'engine="0",{config}', 1)])
        yield from _family("gpulab:emulation_lag_seconds", "gauge", [(self._labels, state.lag_s)])

    def _counters(self, state: State) -> Iterator[str]:
        computed = self.prompt_tokens - self.cached_tokens
        by_source = {"local_compute": computed, "local_cache_hit": self.cached_tokens, "external_kv_transfer": 0}
        yield from self._one("prefix_cache_queries_total", "counter", state.prefix_queries)
        yield from self._one("prefix_cache_hits_total", "counter", state.prefix_hits)
        for absent in ("external_prefix_cache", "mm_cache"):
            yield from self._one(f"{absent}_queries_total", "counter", 0)
            yield from self._one(f"{absent}_hits_total", "counter", 0)
        yield from self._one("num_preemptions_total", "counter", state.preemptions)
        yield from self._one("prompt_tokens_total", "counter", self.prompt_tokens)
        yield from self._by("prompt_tokens_by_source_total", "counter", "source", by_source)
        yield from self._one("prompt_tokens_cached_total", "counter", self.cached_tokens)
        yield from self._one("generation_tokens_total", "counter", self.generation_tokens)
        yield from self._by("request_success_total", "counter", "finished_reason", self.finished_requests)

    def _histograms(self) -> Iterator[str]:
        for name, histogram in self.histograms.items():
            yield f"# HELP vllm:{name} {_HELP[name]}"
            yield f"# TYPE vllm:{name} histogram"
            yield from histogram.lines(f"vllm:{name}", self._labels)

    def _one(self, name: str, kind: str, value: float) -> Iterator[str]:
        return _family(f"vllm:{name}", kind, [(self._labels, value)])

    def _by(self, name: str, kind: str, label: str, values: Mapping[str, float]) -> Iterator[str]:
        samples = [(f'{self._labels},{label}="{key}"', value) for key, value in values.items()]
        return _family(f"vllm:{name}", kind, samples)


def _family(name: str, kind: str, samples: Iterable[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP {name} {_HELP[name.partition(':')[2]]}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        yield f"{name}{{{labels}}} {float(value)!r}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


_HELP: Final = {
    "num_requests_running": "Requests in the running batch.",
    "num_requests_waiting": "Requests waiting to be scheduled.",
    "num_requests_waiting_by_reason": "Waiting requests by reason.",
    "engine_sleep_state": "1 for the engine's sleep state.",
    "kv_cache_usage_perc": "Share of KV blocks in use, 1 is all.",
    "cache_config_info": "The KV cache's settings.",
    "emulation_lag_seconds": "By how much the emulation was late at worst, in model seconds.",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Prompt tokens found in the prefix cache.",
    "external_prefix_cache_queries_total": "Tokens looked up in a KV connector's cache.",
    "external_prefix_cache_hits_total": "Tokens found in a KV connector's cache.",
    "mm_cache_queries_total": "Items looked up in the multi-modal cache.",
    "mm_cache_hits_total": "Items found in the multi-modal cache.",
    "num_preemptions_total": "Preemptions of running requests.",
    "prompt_tokens_total": "Prompt tokens processed.",
    "prompt_tokens_by_source_total": "Prompt tokens by where their KV came from.",
    "prompt_tokens_cached_total": "Prompt tokens whose KV was cached.",
    "generation_tokens_total": "Output tokens generated.",
    "request_success_total": "Finished requests by reason.",
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Output tokens of a request.",
    "iteration_tokens_total": "Tokens of a step.",
    "request_max_num_generation_tokens": "Most output tokens over a request's answers.",
    "request_params_n": "The n of a request.",
    "request_params_max_tokens": "The max_tokens of a request.",
    "time_to_first_token_seconds": "From arrival to first token.",
    "inter_token_latency_seconds": "Between two tokens of a request.",
    "request_time_per_output_token_seconds": "Mean time between a request's tokens.",
    "e2e_request_latency_seconds": "From arrival to last token.",
    "request_queue_time_seconds": "From queued to first scheduled.",
    "request_inference_time_seconds": "From first scheduled to last token.",
    "request_prefill_time_seconds": "From first scheduled to first token.",
    "request_decode_time_seconds": "From first to last token.",
    "request_prefill_kv_computed_tokens": "Prompt tokens of a request that were not cached.",
}
