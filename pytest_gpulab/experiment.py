"""What an experiment asks: the Workload that arrives and the Profile that serves it.

Everything here is data: frozen, validated, comparable, hashable into a definition. Nothing is random
here; `pytest_gpulab.arrivals` turns a Workload and a seed into a schedule.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from pytest_gpulab.accelerators import find_accelerator
from pytest_gpulab.definition import Definition
from pytest_gpulab.fleet import Fleet
from pytest_gpulab.models import find_model

Tokens = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False, description="requests per second")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


# --- arrivals: when requests come -------------------------------------------------------------------


class Constant(Definition):
    """One request every 1/rate seconds, the first at 0. No randomness."""

    kind: Literal["constant"] = "constant"
    rate: Rate


class Poisson(Definition):
    """Independent exponential gaps with mean 1/rate seconds."""

    kind: Literal["poisson"] = "poisson"
    rate: Rate


class Gamma(Definition):
    """Gamma distributed gaps with mean 1/rate; `burstiness` is the gamma's shape, as in vLLM's benchmark.

    1 is Poisson, below 1 is burstier, above 1 more regular. Gap variance is 1 / (burstiness * rate**2).
    """

    kind: Literal["gamma"] = "gamma"
    rate: Rate
    burstiness: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Ramp(Definition):
    """A rate that goes linearly from `start_rate` to `rate` in `ramp_s` seconds, then stays. No randomness.

    Request k comes when the integral of the rate reaches k.
    """

    kind: Literal["ramp"] = "ramp"
    start_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    rate: Rate
    ramp_s: Seconds


class SpikeToZero(Definition):
    """Poisson arrivals at `rate` for `spike_s` seconds, then none until the workload's duration is over."""

    kind: Literal["spike-to-zero"] = "spike-to-zero"
    rate: Rate
    spike_s: Seconds


class ClosedLoop(Definition):
    """`concurrency` users, each sending its next request when its last one is answered."""

    kind: Literal["closed-loop"] = "closed-loop"
    concurrency: Annotated[int, Field(ge=1)]


LATEST_START_S: Final = 86_400.0
"""Of a trace: more are the seconds of a clock, such as Unix time, and the run would idle through all of them."""


class Trace(Definition):
    """Recorded arrivals: seconds from the run's start, prompt tokens, output tokens."""

    kind: Literal["trace"] = "trace"
    rows: tuple[tuple[float, int, int], ...] = Field(min_length=1)

    @field_validator("rows")
    @classmethod
    def _rows_are_possible(cls, rows: tuple[tuple[float, int, int], ...]) -> tuple[tuple[float, int, int], ...]:
        if rows[0][0] > LATEST_START_S:
            raise ValueError(
                f"row 0: the first arrival must come within a day of the run's start, got {rows[0][0]:.15g} s; count "
                "seconds from the run's start, such as `arrival - first_arrival` of timestamps"
            )
        previous_s = 0.0
        for index, (arrival_s, prompt_tokens, output_tokens) in enumerate(rows):
            if not previous_s <= arrival_s < float("inf"):
                raise ValueError(
                    f"row {index}: arrivals must be finite, >= 0 and in order, got {arrival_s} s after "
                    f"{previous_s} s; sort the trace and count seconds from the run's start"
                )
            if prompt_tokens < 1 or output_tokens < 1:
                raise ValueError(
                    f"row {index}: a request has at least 1 prompt and 1 output token, "
                    f"got {prompt_tokens} and {output_tokens}"
                )
            previous_s = arrival_s
        return rows


def _trace_row(index: int, row: Any) -> tuple[float, int, int]:
    try:
        arrival_s, prompt_tokens, output_tokens = (float(value) for value in row)
        if prompt_tokens.is_integer() and output_tokens.is_integer():
            return arrival_s, int(prompt_tokens), int(output_tokens)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"row {index}: a trace's rows must be (arrival in seconds, prompt tokens, output tokens), whole numbers of "
        f"tokens, got {row!r}"
    )


Arrivals = Annotated[
    Constant | Poisson | Gamma | Ramp | SpikeToZero | ClosedLoop | Trace, Field(discriminator="kind")
]


# --- shapes: how long requests are ------------------------------------------------------------------


class Shape(Definition):
    """Every request the same: prompt and output tokens."""

    kind: Literal["shape"] = "shape"
    prompt_tokens: Tokens
    output_tokens: Tokens


class Mix(Definition):
    """A weighted mix of shapes, each request drawn independently."""

    kind: Literal["mix"] = "mix"
    parts: tuple[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], Shape], ...] = Field(min_length=1)


class Lengths(Definition):
    """Log-normal token counts, rounded and clipped to [1, the stated maximum].

    `sigma` is the standard deviation of the logarithm; 0 gives the median always.
    """

    kind: Literal["lengths"] = "lengths"
    prompt_median: Tokens
    prompt_sigma: Annotated[float, Field(ge=0, le=5)]
    prompt_max: Tokens
    output_median: Tokens
    output_sigma: Annotated[float, Field(ge=0, le=5)]
    output_max: Tokens

    @model_validator(mode="after")
    def _medians_fit(self) -> Self:
        for what, median, most in (
            ("prompt", self.prompt_median, self.prompt_max),
            ("output", self.output_median, self.output_max),
        ):
            if median > most:
                raise ValueError(f"{what}_median must be at most {what}_max, got {median} > {most}; raise {what}_max")
        return self


Shapes = Annotated[Shape | Mix | Lengths, Field(discriminator="kind")]


# --- admission: what the client does with them --------------------------------------------------------


class Direct(Definition):
    """Open loop: every request is sent when it is due.

    With `max_outstanding`, a request due while that many are unanswered is dropped and counted as undelivered
    (what k6 does at ``maxVUs``). None sends all.
    """

    kind: Literal["direct"] = "direct"
    max_outstanding: Annotated[int, Field(ge=1)] | None = None


class BoundedQueue(Definition):
    """The client holds up to `capacity` requests, first in first out, and keeps `max_outstanding` in flight.

    A request that finds the queue full is dropped; one that waited `max_wait_s` seconds is given up. Both count
    as undelivered, and waiting counts in the latency (it starts at the scheduled time).
    """

    kind: Literal["bounded-queue"] = "bounded-queue"
    capacity: Annotated[int, Field(ge=1)]
    max_wait_s: Seconds
    max_outstanding: Annotated[int, Field(ge=1)] = 64


Admission = Annotated[Direct | BoundedQueue, Field(discriminator="kind")]


# --- the workload -------------------------------------------------------------------------------------


class Workload(Definition):
    """What arrives: arrival process, request shapes, the client's admission policy, and for how long.

    Give `duration_s` (arrivals stop then, answers are awaited) or `requests` (so many arrivals), not both. A
    closed loop needs `requests`; a trace needs neither and carries its own shapes. `shared_prefix_tokens` are
    the same in all prompts; the rest of each prompt is unique, so the prefix cache sees what the workload says. A
    prompt that is drawn shorter is all prefix.
    `timeout_s`: the client gives an answer up after so many seconds from sending; it then counts as undelivered.
    """

    arrivals: Arrivals
    shape: Shapes | None = None
    duration_s: Seconds | None = None
    requests: Annotated[int, Field(ge=1)] | None = None
    admission: Admission = Direct()
    shared_prefix_tokens: Annotated[int, Field(ge=0)] = 0
    timeout_s: Seconds | None = None

    @classmethod
    def from_trace(cls, rows: Iterable[tuple[float, int, int]], **fields: Any) -> Self:
        """A workload of recorded (arrival_s, prompt_tokens, output_tokens). ValueError for other rows."""
        plain = tuple(_trace_row(index, row) for index, row in enumerate(rows))
        return cls(arrivals=Trace(rows=plain), **fields)

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if isinstance(self.arrivals, Trace):
            given = [n for n in ("shape", "duration_s", "requests") if getattr(self, n) is not None]
            if given:
                raise ValueError(f"a trace says {', '.join(given)} itself; leave out {', '.join(given)}")
            return self
        if self.shape is None:
            raise ValueError(f"shape must be given with {self.arrivals.kind} arrivals, got none")
        if isinstance(self.arrivals, ClosedLoop):
            if self.requests is None or self.duration_s is not None:
                raise ValueError("a closed loop needs requests (how many in all) and takes no duration_s")
        elif (self.requests is None) == (self.duration_s is None):
            raise ValueError(
                "exactly one of duration_s and requests must be given, got "
                + ("none" if self.requests is None else "both")
            )
        if isinstance(self.arrivals, SpikeToZero):
            self._require_whole_spike(self.arrivals.spike_s)
        return self

    def _require_whole_spike(self, spike_s: float) -> None:
        if self.duration_s is None:
            raise ValueError("a spike needs duration_s: the zero after it is part of the run")
        if self.duration_s < spike_s:
            raise ValueError(
                f"duration_s must be at least the spike's {spike_s:g} s, got {self.duration_s:g} s: traffic would "
                "never go to zero; raise duration_s or lower spike_s"
            )

    @property
    def length_s(self) -> float | None:
        """How long it lasts; None where answers or chance decide that."""
        if isinstance(self.arrivals, Trace):
            return self.arrivals.rows[-1][0]
        return self.duration_s

    @property
    def longest_tokens(self) -> int:
        """The most tokens (prompt and output) that one request can have."""
        if isinstance(self.arrivals, Trace):
            return max(prompt + output for _, prompt, output in self.arrivals.rows)
        if isinstance(self.shape, Shape):
            return self.shape.prompt_tokens + self.shape.output_tokens
        if isinstance(self.shape, Mix):
            return max(shape.prompt_tokens + shape.output_tokens for _, shape in self.shape.parts)
        assert self.shape is not None
        return self.shape.prompt_max + self.shape.output_max

    @property
    def shortest_prompt(self) -> int:
        """The fewest tokens of a prompt. Of drawn lengths, which may be as short as 1, half of the prompts have more
        than this."""
        if isinstance(self.arrivals, Trace):
            return min(prompt for _, prompt, _ in self.arrivals.rows)
        if isinstance(self.shape, Mix):
            return min(shape.prompt_tokens for _, shape in self.shape.parts)
        assert self.shape is not None
        return self.shape.prompt_tokens if isinstance(self.shape, Shape) else self.shape.prompt_median


# --- the profile --------------------------------------------------------------------------------------


class EngineArgs(Definition):
    """vLLM engine arguments, under vLLM's own names. None means vLLM's default for the model and accelerator."""

    max_model_len: Tokens | None = None
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.92
    block_size: Literal[1, 8, 16, 32, 64, 128] = 16
    num_gpu_blocks_override: Annotated[int, Field(ge=2)] | None = None
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    quantization: Literal["fp8", "modelopt_fp4"] | None = None
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = 0
    scheduler_reserve_full_isl: bool = True
    enforce_eager: bool = False
    calculate_kv_scales: bool = False


class Profile(Definition):
    """What serves: model, vLLM engine arguments, accelerator and the instance type that carries it.

    `price_usd_per_hour` is of one accelerator; without it the accelerator's price on record counts. `fleet` says how
    it is deployed; None is one server that is there before the workload comes and stays as it is.
    """

    model: str
    accelerator: str
    engine_args: EngineArgs = EngineArgs()
    instance_type: str | None = None
    price_usd_per_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    fleet: Fleet | None = None

    @field_validator("model")
    @classmethod
    def _model_is_known(cls, name: str) -> str:
        return find_model(name).name

    @field_validator("accelerator")
    @classmethod
    def _accelerator_is_known(cls, name: str) -> str:
        return find_accelerator(name).name

    @model_validator(mode="after")
    def _fits_the_model(self) -> Self:
        longest = find_model(self.model).max_position
        asked = self.engine_args.max_model_len
        if asked is not None and asked > longest:
            raise ValueError(f"engine_args.max_model_len must be at most {longest} for {self.model}, got {asked}")
        return self

    @model_validator(mode="after")
    def _machine_carries_the_accelerator(self) -> Self:
        accelerator = find_accelerator(self.accelerator)
        if self.instance_type is not None and self.instance_type.partition(".")[0] not in accelerator.families:
            raise ValueError(
                f"instance_type must be one that carries the {accelerator.name}, of "
                f"{' or '.join(accelerator.families)}, got {self.instance_type}; leave it out for "
                f"{accelerator.instance_type}"
            )
        return self

    @model_validator(mode="after")
    def _shortages_are_of_its_machine(self) -> Self:
        for shortage in self.fleet.faults.shortages if self.fleet else ():
            if shortage.instance_type not in ("", self.machine):
                raise ValueError(
                    f"a shortage must be of the profile's machine, which is {self.machine}, got one of "
                    f"{shortage.instance_type}: nobody would notice; leave instance_type out"
                )
        return self

    @property
    def machine(self) -> str:
        """The instance type that carries it."""
        return self.instance_type or find_accelerator(self.accelerator).instance_type

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens that this profile serves."""
        return self.engine_args.max_model_len or find_model(self.model).max_position

    @property
    def price(self) -> float:
        """USD per accelerator and hour."""
        return self.price_usd_per_hour or find_accelerator(self.accelerator).price_usd_per_hour

    def with_engine_args(self, **changes: Any) -> Self:
        """The same profile with some engine arguments changed (validated)."""
        return self.model_copy(update={"engine_args": self.engine_args.model_copy(update=changes)})

    def on(self, fleet: Fleet) -> Self:
        """The same profile, deployed as `fleet`."""
        return self.model_copy(update={"fleet": fleet})


def _require_faults_within(workload: Workload, fleet: Fleet | None) -> None:
    length_s = workload.length_s
    if fleet is not None and length_s is not None and fleet.faults.last_s > length_s:
        raise ValueError(
            f"a fleet's faults must happen while the workload lasts, which is {length_s:g} s, got one at "
            f"{fleet.faults.last_s:g} s: nobody would notice; let it happen sooner or the workload last longer"
        )


def require_servable(workload: Workload, profile: Profile) -> None:
    """ValueError when the two do not go together.

    That is when the workload has a request longer than the profile's ``max_model_len`` or a prompt that is all shared
    prefix, or is over before something goes wrong that the fleet is to suffer.
    """
    _require_faults_within(workload, profile.fleet)
    if workload.longest_tokens > profile.max_model_len:
        raise ValueError(
            f"every request must fit max_model_len: the workload has one of {workload.longest_tokens} tokens "
            f"(prompt and output), {profile.model} serves {profile.max_model_len}; shorten the shape or raise "
            "engine_args.max_model_len"
        )
    if workload.shared_prefix_tokens >= workload.shortest_prompt:
        raise ValueError(
            f"shared_prefix_tokens must be below prompt_tokens, got {workload.shared_prefix_tokens} and a prompt of "
            f"{workload.shortest_prompt}: an empty remainder would make prompts equal; shorten the prefix"
        )
