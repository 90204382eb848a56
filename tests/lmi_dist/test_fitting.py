"""A GPU's KV pool is what its share of the memory leaves once the weights are there and the largest step has run. What the GPU's
memory holds is set by the tests."""

import logging
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import tiny_models
import tiny_t5
from fake_cuda import GIGA, FakeCuda

from lmi_dist import Engine, EngineConfig, MemoryPlanError, Request, SamplingParams, explain, ops
from lmi_dist.config import BLOCK_SIZE
from lmi_dist.fitting import largest_plan
from lmi_dist.kv_cache import GpuMemory, Measured, MemoryPlan, plan_memory
from lmi_dist.models import read_config
from lmi_dist.plan import MAX_PROMPT_ROWS
from lmi_dist.runner import Runner
from lmi_dist.weights import Checkpoint

MEGA = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    with ops.using("cpu", 1):
        yield fake_cuda.install_with_tensors(monkeypatch)


def plan(folder: Path, memory: GpuMemory, measured: Measured | None = None, **values: Any) -> MemoryPlan:
    config = EngineConfig.of({"model": str(folder), "max_batch_size": 1000, "max_prefill_tokens": 64, "dtype": "bf16", **values})
    return plan_memory(config, read_config(folder), Checkpoint(folder), 0, gpu=memory, measured=measured)


# ---- the arithmetic ----


def test_pool_is_what_the_share_leaves(folder: Path) -> None:
    memory = plan(folder, GpuMemory(100 * MEGA, 100 * MEGA), Measured(20 * MEGA, 30 * MEGA), max_batch_size=5000)

    assert memory.available_bytes == 90 * MEGA
    assert memory.num_blocks == (90 * MEGA - 50 * MEGA - memory.graph_bytes) // memory.block_bytes


def test_each_graph_keeps_its_logits(folder: Path) -> None:
    """The other tensors of a step all graphs share."""
    one, two, three = (plan(folder, GpuMemory(GIGA, GIGA), max_batch_size=size).graph_bytes for size in (1, 2, 3))
    logits = 4 * tiny_models.VOCABULARY  # of a row
    others = one - logits

    assert two == 2 * others + (1 + 2) * logits
    assert three == 3 * others + (1 + 2 + 3) * logits
    assert plan(folder, GpuMemory(GIGA, GIGA), enforce_eager=True).graph_bytes == 0


def test_what_others_hold_is_not_taken(folder: Path) -> None:
    assert plan(folder, GpuMemory(100 * MEGA, 40 * MEGA)).available_bytes == 40 * MEGA
    assert plan(folder, GpuMemory(100 * MEGA, 90 * MEGA), gpu_memory_utilization=0.5).available_bytes == 50 * MEGA
    assert plan(folder, GpuMemory(100 * MEGA, 100 * MEGA), reserved_memory_mb=1).available_bytes == 90 * MEGA - (1 << 20)


def test_each_rank_has_a_gpu_of_its_own(folder: Path) -> None:
    assert plan(folder, GpuMemory(100 * MEGA, 100 * MEGA), tensor_parallel_degree=2).available_bytes == 90 * MEGA


def test_pool_is_at_most_what_all_sequences_need(folder: Path) -> None:
    assert plan(folder, GpuMemory(GIGA, GIGA), max_batch_size=4).num_tokens == 4 * 256


def test_dtype_is_the_checkpoints(folder: Path) -> None:
    assert plan(folder, GpuMemory(GIGA, GIGA), dtype="auto").dtype == read_config(folder).dtype == "fp32"


def test_too_little_memory_is_told_with_the_arithmetic(folder: Path) -> None:
    with pytest.raises(MemoryPlanError) as caught:
        plan(folder, GpuMemory(100 * MEGA, 70 * MEGA), Measured(60 * MEGA, 20 * MEGA))

    for part in (
        "raise gpu_memory_utilization or tensor_parallel_degree",
        "available memory 0.070 GB of a GPU's 0.100 GB, 0.070 GB free, gpu_memory_utilization=0.9",
        "weights 0.060 GB in bf16, measured",
        "working memory 0.020 GB for 64 prompt tokens a step, measured",
        "recorded decode steps",
    ):
        assert part in str(caught.value)


# ---- in the engine ----


def test_engine_takes_what_loading_and_the_largest_step_have_left(
    folder: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.total_bytes, gpu.free_bytes, gpu.peak_bytes = 1000 * MEGA, 950 * MEGA, 200 * MEGA
    original = Runner.__init__

    def load(runner: Runner, *args: Any, **options: Any) -> None:
        original(runner, *args, **options)
        gpu.free_bytes -= 500 * MEGA + runner.cache.size_bytes  # weights, and the pool of one sequence

    monkeypatch.setattr(Runner, "__init__", load)
    caplog.set_level(logging.INFO, "lmi_dist")

    engine = Engine(EngineConfig(model=str(folder), device="cuda", cpu_threads=1, max_batch_size=5000))

    memory, unit = engine.memory, 1 << 20
    assert memory.available_bytes == 900 * MEGA
    assert 500 * MEGA <= memory.weights_bytes < 500 * MEGA + unit
    sampler_bytes = 5000 * engine.model.vocab_size * 4
    assert 200 * MEGA + sampler_bytes <= memory.working_bytes < 200 * MEGA + sampler_bytes + unit
    left = 900 * MEGA - memory.weights_bytes - memory.working_bytes - memory.graph_bytes
    assert memory.num_blocks == left // memory.block_bytes == engine.stats().num_blocks == len(engine._runner.cache.layers[0].k)
    assert engine.config.kv_cache_memory_bytes == memory.pool_bytes
    assert any("measured" in message for message in caplog.messages)
    engine.add(Request(id="a", prompt="x", params=SamplingParams(max_tokens=2)))
    assert engine.step()[0].error is None


def test_pool_of_given_size_is_not_measured(folder: Path, gpu: FakeCuda) -> None:
    gpu.peak_bytes = 1 << 60

    engine = Engine(EngineConfig(model=str(folder), device="cuda", cpu_threads=1, kv_cache_memory_bytes=32 * MEGA))

    assert engine.memory.num_blocks == 32 * MEGA // engine.memory.block_bytes


def test_step_that_does_not_fit_is_told_at_the_start(folder: Path, gpu: FakeCuda) -> None:
    gpu.peak_bytes = 90 * GIGA

    with pytest.raises(MemoryPlanError, match="the model does not fit the memory; lower max_model_len"):
        Engine(EngineConfig(model=str(folder), device="cuda", cpu_threads=1))


def test_explain_estimates_without_loading(folder: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmi_dist.weights.Checkpoint.read", lambda *_: pytest.fail("a tensor was read"))

    told = explain(EngineConfig(model=str(folder), device="cuda"))

    assert any(line.startswith("weights ") and line.endswith(", estimated") for line in told.lines)
    assert "available memory 72.000 GB of a GPU's 80.000 GB, 79.000 GB free, gpu_memory_utilization=0.9" in told.lines
    assert (told.config.prefill_chunk_tokens, told.config.max_decode_slowdown) == (2048, 0.0)


# ---- the largest step ----


def test_largest_step_has_all_tokens_and_rows(folder: Path, gpu: FakeCuda) -> None:
    setup = explain(EngineConfig(model=str(folder), device="cuda", max_prefill_tokens=600, max_batch_size=30, max_model_len=250))

    made = largest_plan(setup)

    assert [len(chunk.token_ids) for chunk in made.chunks] == [250, 250, 100]
    assert sum(chunk.num_outputs for chunk in made.chunks) == 30 + MAX_PROMPT_ROWS
    assert all(len(chunk.table) == -(-len(chunk.token_ids) // BLOCK_SIZE) for chunk in made.chunks)


def test_encoder_decoder_is_measured_with_a_whole_input(tmp_path: Path, gpu: FakeCuda) -> None:
    tiny_t5.save(tiny_t5.build("flan"), tmp_path, "flan")

    engine = Engine(EngineConfig(model=str(tmp_path), device="cuda", cpu_threads=1, max_model_len=64, max_prefill_tokens=100))

    (encode,) = largest_plan(explain(EngineConfig(model=str(tmp_path), max_model_len=64))).encodes
    assert len(encode.token_ids) == 64
    assert engine.memory.num_blocks > 0
