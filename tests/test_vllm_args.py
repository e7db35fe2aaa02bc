"""vLLM's command line and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab import Profile
from pytest_gpulab.experiment import EngineArgs
from pytest_gpulab.vllm_args import from_argv, served_names, to_argv

T4 = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 9216})


def test_defaults_are_left_to_vllm_but_those_that_differ_by_version_and_machine():
    assert to_argv(T4) == [
        *("--model", "Qwen/Qwen2.5-0.5B-Instruct"),
        *("--served-model-name", "qwen2.5-0.5b"),
        *("--max-model-len", "9216"),
        *("--gpu-memory-utilization", "0.92"),
        *("--block-size", "16"),
    ]


def test_flags_are_spelled_as_vllm_spells_them():
    profile = T4.with_engine_args(kv_cache_dtype="fp8", enable_prefix_caching=False, enforce_eager=True)
    argv = to_argv(profile, model="models/qwen2.5-0.5b")
    assert argv[:2] == ["--model", "models/qwen2.5-0.5b"]
    assert argv[argv.index("--kv-cache-dtype") + 1] == "fp8"
    assert "--no-enable-prefix-caching" in argv
    assert "--enforce-eager" in argv


engine_args = st.builds(
    EngineArgs,
    max_model_len=st.none() | st.integers(1, 32_768),
    max_num_seqs=st.none() | st.integers(1, 4096),
    max_num_batched_tokens=st.none() | st.integers(1, 65_536),
    gpu_memory_utilization=st.floats(0.1, 1.0),
    block_size=st.sampled_from([16, 32]),
    kv_cache_dtype=st.sampled_from(["auto", "fp8", "fp8_e4m3"]),
    quantization=st.sampled_from([None, "fp8"]),
    enable_prefix_caching=st.booleans(),
    async_scheduling=st.booleans(),
    enforce_eager=st.booleans(),
)


@given(args=engine_args, folder=st.sampled_from([None, "qwen2.5-0.5b", "/models/qwen2.5-0.5b/"]))
def test_what_is_written_is_read_back(args, folder):
    profile = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args=args)
    assert from_argv(to_argv(profile, folder), "t4") == profile


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--max-num-seqs", "8"], "--model"),
        (["--model", "qwen2.5-0.5b", "--tensor-parallel-size", "2"], "--tensor-parallel-size"),
        (["--model", "qwen2.5-0.5b", "--max-num-seqs", "none"], "max_num_seqs"),
        (["--model", "gpt-2"], "gpt-2"),
    ],
)
def test_what_cannot_be_served_is_named(argv, complaint):
    with pytest.raises(ValueError, match=complaint):
        from_argv(argv, "t4")


def test_underscores_are_dashes_as_for_vllm():
    argv = ["--model", "qwen2.5-0.5b", "--max_model_len", "9216", "--kv_cache_dtype=fp8_e4m3"]
    assert from_argv(argv, "t4") == T4.with_engine_args(kv_cache_dtype="fp8_e4m3")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([], []),
        (["--served-model-name", "prod"], ["prod"]),
        (["--served_model_name", "prod", "my_model", "--max-model-len", "9216"], ["prod", "my_model"]),
    ],
)
def test_a_server_has_the_names_that_it_was_given(given, names):
    argv = ["--model", "qwen2.5-0.5b", *given]
    assert served_names(argv) == names
    assert from_argv(argv, "t4").model == "qwen2.5-0.5b"


def test_flags_that_change_no_speed_are_accepted():
    argv = ["--model", "qwen2.5-0.5b", "--host", "0.0.0.0", "--port", "8000", "--load-format", "dummy"]
    assert from_argv(argv, "t4") == Profile(model="qwen2.5-0.5b", accelerator="t4")
