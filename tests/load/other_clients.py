"""Other load generators in a closed loop against a null server, for `make bench`: what each can read.

They are found by variables: ``GPULAB_BENCH_VLLM`` is a python that imports vllm, ``GPULAB_BENCH_GUIDELLM`` and
``GPULAB_BENCH_AIPERF`` are those commands, ``GPULAB_BENCH_TOKENIZER`` is a folder with a tokenizer, which all want.
With ``HF_HUB_OFFLINE`` aiperf takes the folder for a name, and does not start.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable

import numpy as np

from pytest_gpulab.experiment import ClosedLoop, Shape, Workload
from pytest_gpulab.load.headroom import null_server, send_to

STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS, REQUESTS = 64, 128, 128, 8000
INTERVAL_S = 0.0
WINDOW = 2
"""Seconds; the rate is that of the best so many seconds in a row: start-up and warm-up do not count."""

_VLLM = "import argparse; from vllm.benchmarks import serve as s; p = argparse.ArgumentParser(); s.add_cli_args(p); "


def ours(url: str) -> None:
    shape = Shape(prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)
    outcome = send_to(url, Workload(arrivals=ClosedLoop(concurrency=STREAMS), shape=shape, requests=REQUESTS))
    assert outcome.requests["ok"].all()


def vllm_bench_serve(url: str) -> None:
    _run(
        [os.environ["GPULAB_BENCH_VLLM"], "-c", _VLLM + "s.main(p.parse_args())"],
        ["--backend=vllm", f"--base-url={url}", "--endpoint=/v1/completions", "--model=none-served", "--ignore-eos"],
        [f"--tokenizer={_tokenizer()}", "--dataset-name=random", f"--random-input-len={PROMPT_TOKENS}"],
        [f"--random-output-len={OUTPUT_TOKENS}", f"--num-prompts={REQUESTS}", f"--max-concurrency={STREAMS}"],
    )


def guidellm(url: str) -> None:
    data = f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"
    _run(
        [os.environ["GPULAB_BENCH_GUIDELLM"], "run", "--disable-console"],
        ["--backend", f"kind=openai_http,target={url},model=none-served,request_format=/v1/completions"],
        ["--profile", f"kind=concurrent,streams={STREAMS}", "--data", data],
        ["--tokenizer", f"kind=huggingface_auto,model={_tokenizer()}"],
        ["--constraint", f"kind=max_requests,count={REQUESTS}"],
    )


def aiperf(url: str) -> None:
    _run(
        [os.environ["GPULAB_BENCH_AIPERF"], "profile", "--model", "none-served", "--url", url, "--streaming"],
        ["--endpoint-type", "completions", "--tokenizer", _tokenizer(), "--ui", "none"],
        ["--concurrency", str(STREAMS), "--request-count", str(REQUESTS)],
        ["--synthetic-input-tokens-mean", str(PROMPT_TOKENS), "--output-tokens-mean", str(OUTPUT_TOKENS)],
        ["--extra-inputs", f"max_tokens:{OUTPUT_TOKENS}", "--extra-inputs", "ignore_eos:true"],
    )


def chunk_rates(rounds: int = 2) -> dict[str, float]:
    """Chunks per second by client, the best of some rounds in turn; clients that are not there are left out."""
    clients: dict[str, Callable[[str], None]] = {"ours": ours}
    for client in (vllm_bench_serve, guidellm, aiperf):
        if f"GPULAB_BENCH_{client.__name__.split('_')[0].upper()}" in os.environ:
            clients[client.__name__.replace("_", " ")] = client
    seen: dict[str, float] = dict.fromkeys(clients, 0.0)
    for _ in range(rounds):
        for name, client in clients.items():
            seen[name] = max(seen[name], _chunk_rate(client))
    return seen


def _chunk_rate(client: Callable[[str], None]) -> float:
    with null_server(INTERVAL_S) as url:
        client(url)
        with urllib.request.urlopen(url) as response:
            seconds = np.array(json.load(response))
    return float(np.convolve(seconds, np.ones(WINDOW), "valid").max() / WINDOW) if len(seconds) >= WINDOW else 0.0


def _run(*parts: list[str]) -> None:
    command = [word for part in parts for word in part]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)


def _tokenizer() -> str:
    return os.environ["GPULAB_BENCH_TOKENIZER"]
