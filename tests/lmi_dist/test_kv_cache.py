"""The memory plan is arithmetic on given numbers; what does not fit is told with it."""

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import tiny_models
import torch
from resident import resident_bytes

from lmi_dist.config import BLOCK_SIZE, EngineConfig
from lmi_dist.errors import ConfigError, MemoryPlanError
from lmi_dist.images import VisionConfig
from lmi_dist.kv_cache import Dtype, GpuMemory, KVCache, MemoryPlan, available_memory, plan_memory, read_cpu_flags, resolve_dtype
from lmi_dist.models import read_config
from lmi_dist.plan import MAX_PROMPT_ROWS
from lmi_dist.weights import Checkpoint

BF16_CPU = frozenset({"avx512f", "avx512_bf16"})
MEGA = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path_factory.mktemp("tiny"))


def plan(folder: Path, available: int, flags: frozenset[str] = BF16_CPU, **values: Any) -> MemoryPlan:
    config = EngineConfig.of({"model": str(folder), "max_batch_size": 4, "max_prefill_tokens": 64, **values})
    return plan_memory(config, read_config(folder), Checkpoint(folder), available, cpu_flags=flags)


def test_block_holds_keys_and_values_of_all_layers(folder: Path) -> None:
    memory = plan(folder, 100 * MEGA)

    assert memory.block_bytes == 2 * 2 * 2 * BLOCK_SIZE * 16 * 2  # k and v, layers, heads, tokens, head size, bf16


def test_pool_is_what_all_sequences_need(folder: Path) -> None:
    memory = plan(folder, 1000 * MEGA)

    assert memory.num_tokens == 4 * 256
    assert memory.max_model_len == 256


def test_pool_is_at_most_a_quarter_of_the_memory(folder: Path) -> None:
    memory = plan(folder, 20 * MEGA, max_batch_size=1000)

    assert memory.pool_bytes <= 5 * MEGA < memory.pool_bytes + memory.block_bytes


def test_pool_holds_one_sequence_at_least(folder: Path) -> None:
    need = plan(folder, 1000 * MEGA, max_batch_size=1)
    all_of_it = need.weights_bytes + need.working_bytes + need.pool_bytes

    assert plan(folder, all_of_it, max_batch_size=1).num_tokens == 256
    with pytest.raises(MemoryPlanError, match="does not fit the memory; lower max_model_len"):
        plan(folder, all_of_it - 1, max_batch_size=1)


def test_logits_of_prompts_are_counted(folder: Path) -> None:
    vocab_size = read_config(folder).vocab_size

    few, many = plan(folder, 1000 * MEGA, max_prefill_tokens=1), plan(folder, 1000 * MEGA, max_prefill_tokens=512)
    more = plan(folder, 1000 * MEGA, max_prefill_tokens=1024)

    per_token = (more.working_bytes - many.working_bytes) // 512  # both at the bound of the logits
    assert many.working_bytes - few.working_bytes == 511 * per_token + (MAX_PROMPT_ROWS - 1) * vocab_size * 4


def test_pool_of_given_size_is_taken_as_given(folder: Path) -> None:
    block_bytes = plan(folder, 100 * MEGA).block_bytes

    assert plan(folder, 100 * MEGA, kv_cache_memory_bytes=20 * block_bytes + 1).num_blocks == 20


def test_given_pool_too_small_is_refused_with_arithmetic(folder: Path) -> None:
    with pytest.raises(MemoryPlanError) as caught:
        plan(folder, 100 * MEGA, kv_cache_memory_bytes=1000)

    for part in (
        "kv_cache_memory_bytes=1000",
        "max_model_len=256",
        "lower max_model_len",
        "available memory 0.100 GB",
        "block 4096",
    ):
        assert part in str(caught.value)


def test_given_pool_too_large_is_refused(folder: Path) -> None:
    with pytest.raises(MemoryPlanError, match="does not fit the memory"):
        plan(folder, 100 * MEGA, kv_cache_memory_bytes=200 * MEGA)


def test_reserved_memory_is_left_alone(folder: Path) -> None:
    reserved = plan(folder, 3 << 30, reserved_memory_mb=1024)

    assert reserved.num_blocks == plan(folder, 2 << 30).num_blocks
    assert reserved.left_bytes == (2 << 30) - reserved.planned_bytes
    assert "beside 1024 MiB reserved" in reserved.arithmetic[0]
    with pytest.raises(MemoryPlanError, match="does not fit the memory"):
        plan(folder, 1 << 30, reserved_memory_mb=2048)


def test_shorter_model_len_needs_less(folder: Path) -> None:
    assert plan(folder, 1000 * MEGA, max_model_len=33).num_blocks == 4 * 3


def test_model_len_beyond_positions_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len=257"):
        plan(folder, 1000 * MEGA, max_model_len=257)


def test_weights_are_counted_in_the_dtype_they_run_in(folder: Path) -> None:
    size = Checkpoint(folder).size_bytes  # fp32

    assert plan(folder, 100 * MEGA).weights_bytes == size // 2
    assert plan(folder, 100 * MEGA, dtype="fp32").weights_bytes == size


def test_tied_embedding_is_counted_twice(tmp_path: Path) -> None:
    tiny_models.save(tiny_models.build("tied"), tmp_path)

    memory = plan(tmp_path, 100 * MEGA, dtype="fp32")

    assert memory.weights_bytes == Checkpoint(tmp_path).size_bytes + 512 * 64 * 4


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_tied_embedding_is_counted_once_where_a_gpu_shares_it(tmp_path: Path, batch_invariant: bool) -> None:
    tiny_models.save(tiny_models.build("tied"), tmp_path)
    values = {"model": str(tmp_path), "dtype": "fp32", "device": "cuda", "max_batch_size": 4, "batch_invariant": batch_invariant}

    memory = plan_memory(
        EngineConfig.of(values), read_config(tmp_path), Checkpoint(tmp_path), 100 * MEGA, gpu=GpuMemory(100 * MEGA, 100 * MEGA)
    )

    assert memory.weights_bytes == Checkpoint(tmp_path).size_bytes + (512 * 64 * 4 if batch_invariant else 0)


def test_same_numbers_give_the_same_plan(folder: Path) -> None:
    assert plan(folder, 50 * MEGA) == plan(folder, 50 * MEGA)


def test_arithmetic_tells_each_figure(folder: Path) -> None:
    told = "\n".join(plan(folder, 100 * MEGA).arithmetic)

    for part in ("available memory 0.100 GB", "in bf16", "64 blocks = 1024 tokens = 4 sequences of max_model_len=256"):
        assert part in told


def test_cache_has_the_planned_size(folder: Path) -> None:
    memory = plan(folder, 100 * MEGA)

    cache = KVCache(memory, num_layers=2, num_kv_heads=2, head_dim=16)

    assert cache.size_bytes == memory.pool_bytes
    assert cache.layers[1].k.shape == (memory.num_blocks, 2, BLOCK_SIZE, 16)
    assert cache.layers[1].v.dtype == torch.bfloat16


def test_pool_takes_memory_as_it_is_written(folder: Path) -> None:
    memory = plan(folder, 4_000 * MEGA, kv_cache_memory_bytes=512 * MEGA)

    cache = KVCache(memory, num_layers=2, num_kv_heads=2, head_dim=16)

    assert sum(resident_bytes(part) for layer in cache.layers for part in layer) < 50 * MEGA
    assert not cache.layers[1].v[-1].any()


@pytest.mark.parametrize("num_layers", [1, 3, 44])
def test_tensors_lie_apart_on_lines_and_at_different_places_of_a_page(folder: Path, num_layers: int) -> None:
    cache = KVCache(plan(folder, 1000 * MEGA, kv_cache_memory_bytes=160 * MEGA), num_layers, num_kv_heads=2, head_dim=16)
    parts = [part for layer in cache.layers for part in layer]
    assert parts[0].nbytes > 32 * MEGA

    begins = [part.data_ptr() for part in parts]
    assert all(begin % 64 == 0 for begin in begins)
    assert all(begin + part.nbytes <= after for begin, part, after in zip(begins, parts, begins[1:], strict=False))
    places = sorted((begin - begins[0]) % (2 << 20) for begin in begins)
    least = (2 << 20) // len(parts) // 64 * 64
    assert all(after - before >= least for before, after in itertools.pairwise(places))


def test_fp8_pool_holds_twice_the_tokens_of_bf16(folder: Path) -> None:
    given = {"kv_cache_memory_bytes": MEGA}
    plain, packed = plan(folder, 100 * MEGA, **given), plan(folder, 100 * MEGA, kv_cache_dtype="fp8", **given)

    assert packed.num_tokens == 2 * plain.num_tokens
    assert packed.weights_bytes == plain.weights_bytes
    assert any(line.startswith("block 2048 bytes") and line.endswith("x 1 bytes in fp8") for line in packed.arithmetic)
    assert KVCache(packed, num_layers=2, num_kv_heads=2, head_dim=16).size_bytes == packed.pool_bytes


# ---- dtype ----


@pytest.mark.parametrize(
    ("wanted", "checkpoint", "flags", "dtype"),
    [
        ("auto", "fp32", BF16_CPU, "bf16"),
        ("auto", "fp16", BF16_CPU, "bf16"),
        ("auto", "bf16", {"amx_bf16"}, "bf16"),
        ("auto", "fp16", {"avx2"}, "fp32"),
        ("auto", "bf16", (), "fp32"),
        ("fp32", "bf16", BF16_CPU, "fp32"),
        ("fp16", "fp16", (), "fp16"),
        ("bf16", "fp32", (), "bf16"),
    ],
)
def test_dtype_goes_by_wish_then_by_cpu(wanted: Any, checkpoint: Dtype, flags: Any, dtype: Dtype) -> None:
    assert resolve_dtype(wanted, checkpoint, frozenset(flags)) == dtype


def test_change_of_dtype_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    resolve_dtype("auto", "fp16", BF16_CPU)
    resolve_dtype("auto", "bf16", BF16_CPU)

    assert caplog.messages == ["the checkpoint is fp16, the model runs in bf16 (dtype=auto)"]


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor: 0\nflags\t\t: fpu avx2\n\nprocessor: 1\nflags\t\t: other\n", {"fpu", "avx2"}),
        ("Features\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("processor: 0\n", set()),
    ],
)
def test_cpu_flags_are_read(tmp_path: Path, text: str, flags: set[str]) -> None:
    (tmp_path / "cpuinfo").write_text(text)

    assert read_cpu_flags(tmp_path / "cpuinfo") == flags
    assert read_cpu_flags(tmp_path / "none") == frozenset()


# ---- available memory ----


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    1000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 1024000),
        ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}, 1024000),
        ({"sys/fs/cgroup/memory.max": "500000\n", "sys/fs/cgroup/memory.current": "200000\n"}, 300000),
        (
            {
                "sys/fs/cgroup/memory.max": "500000\n",
                "sys/fs/cgroup/memory.current": "200000\n",
                "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 50000\n",
            },
            350000,
        ),
        ({"sys/fs/cgroup/memory.max": "100\n", "sys/fs/cgroup/memory.current": "200\n"}, 0),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "400000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "100000\n",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 7\n",
            },
            300007,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "100000\n",
            },
            1024000,
        ),
    ],
    ids=["none", "v2-max", "v2", "v2-cached", "v2-over", "v1", "v1-max"],
)
def test_available_memory_minds_the_container(tmp_path: Path, files: dict[str, str], available: int) -> None:
    assert available_memory(machine(tmp_path, files)) == available


def test_system_without_the_figure_is_told(tmp_path: Path) -> None:
    with pytest.raises(MemoryPlanError, match="MemAvailable"):
        available_memory(machine(tmp_path, {"proc/meminfo": "MemTotal: 1 kB\n"}))


@pytest.mark.parametrize("variant", ["1.5", "1.6"])
def test_vision_towers_working_memory_is_planned(tmp_path: Path, variant: str) -> None:
    """For each image that a prompt may have its features; and what one takes on its way through the tower."""
    tiny_llava.save(tiny_llava.build(variant), tmp_path, variant)
    model = read_config(tmp_path)
    vision = VisionConfig.read(model.keys)
    assert vision is not None

    one, many = (plan(tmp_path, 1000 * MEGA, max_images=num) for num in (1, 11))

    assert many.working_bytes - one.working_bytes == 10 * vision.max_tokens * model.hidden_size * 2
    features_bytes = 2 * vision.max_tokens * model.hidden_size * 2
    pixels_bytes = vision.max_tiles * 3 * vision.tile**2 * 4
    text = plan_memory_without_images(tmp_path)
    assert one.working_bytes - text > pixels_bytes + features_bytes
    assert any("of it for images" in line for line in one.arithmetic)


def plan_memory_without_images(folder: Path) -> int:
    """Working memory of the text model alone."""
    tiny_models.rewrite_config(folder, vision_config=None)
    return plan(folder, 1000 * MEGA, max_images=1).working_bytes


@pytest.mark.parametrize("size", [(60, 33), (33, 60), (1, 100), (40, 40)])
def test_image_never_has_more_tokens_than_are_planned(tmp_path: Path, size: tuple[int, int]) -> None:
    tiny_llava.save(tiny_llava.build("1.6"), tmp_path, "1.6")
    vision = VisionConfig.read(read_config(tmp_path).keys)
    assert vision is not None

    assert vision.num_tokens(size) <= vision.max_tokens
    assert 1 + vision.grid(size)[0] * vision.grid(size)[1] <= vision.max_tiles
