"""A KV pool in fp8, end to end: near to the exact model, the same bits in any company, with the checkpoint's scales."""

from pathlib import Path
from typing import Any

import driving
import pytest
import ranks
import tiny_models
import tiny_t5
import torch
from safetensors.torch import load_file, save_file
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lmi_dist import EngineConfig, ops
from lmi_dist.errors import CheckpointError, ConfigError
from lmi_dist.plan import Chunk, Encode, Plan
from lmi_dist.runner import Runner

FP8: dict[str, Any] = {"kv_cache_dtype": "fp8"}
# 3 bits of mantissa: a number is off by at most 2^-4 of itself. A weighted mean of values keeps that, keys move the weights by as
# much again while scores are of the order of 1, as in these random models; both in each of the two layers.
TOLERANCE = 2 * 2 * 2**-4
# Against a model that rounds alike: fp32's own difference may put a number at a border on its other side, some in ten thousand.
SAME_ROUNDING = 2e-3
PROMPTS = {number: tiny_models.prompt_of(length, seed=number) for number, length in enumerate((70, 5, 33))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path_factory.mktemp("llama"))


def round_to_fp8(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> Any:
    """Attention as transformers has it, to keys and values that have been through fp8."""
    k, v = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (k, v))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, *rest, **options)


@pytest.fixture(scope="module")
def rounded() -> torch.Tensor:
    """What transformers' model says of the longest prompt if its attention rounds."""
    ALL_ATTENTION_FUNCTIONS.register("rounded", round_to_fp8)
    ALL_MASK_ATTENTION_FUNCTIONS.register("rounded", sdpa_mask)
    model = tiny_models.build("llama2-gqa")
    model.set_attn_implementation("rounded")
    return tiny_models.teacher_forced(model, PROMPTS[0])


def logits_of(runner: Runner) -> torch.Tensor:
    return driving.logits_at_every_position(runner, PROMPTS[0])


@pytest.mark.parametrize("kernels", ["cpu", "torch", "sim"])
def test_fp8_cache_is_transformers_with_rounded_keys_and_values(folder: Path, rounded: torch.Tensor, kernels: str) -> None:
    exact = tiny_models.teacher_forced(tiny_models.build("llama2-gqa"), PROMPTS[0])

    with ops.using("cpu", 1):  # what the runner chooses ends with the test
        logits = logits_of(driving.make_runner(folder, kernels, **FP8))

    assert tiny_models.relative_error(logits, rounded) < SAME_ROUNDING
    assert SAME_ROUNDING < tiny_models.relative_error(logits, exact) < TOLERANCE


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fp8_logits_have_equal_bits_in_any_company(folder: Path, dtype: str) -> None:
    runner = driving.make_runner(folder, dtype=dtype, **FP8)

    def run(prompts: dict[int, tuple[int, ...]], **values: Any) -> tuple[dict[int, torch.Tensor], Any]:
        scheduler = driving.make_scheduler(runner, **values)
        return {number: course.rows for number, course in driving.run(runner, scheduler, prompts, 48).items()}, scheduler

    alone = {number: run({number: prompt})[0][number] for number, prompt in PROMPTS.items()}
    batched, _ = run(PROMPTS)
    chunked, _ = run(PROMPTS, max_prefill_tokens=7, prefill_chunk_tokens=7)
    preempted, short = run(PROMPTS, num_blocks=9)
    cached = driving.make_scheduler(runner, prefix_caching=True)
    driving.run(runner, cached, PROMPTS, 48)
    found = {number: course.rows for number, course in driving.run(runner, cached, PROMPTS, 48).items()}

    assert short.preemptions > 0
    assert cached.prefix_hit_tokens > 0
    for other in (batched, chunked, preempted, found):
        assert all(torch.equal(other[number], alone[number]) for number in PROMPTS)


def test_stand_in_gives_equal_bits_in_chunks(folder: Path) -> None:
    with ops.using("cpu", 1):
        runner = driving.make_runner(folder, "sim", dtype="bf16", batch_invariant=True, **FP8)
        whole = driving.run(runner, driving.make_scheduler(runner), {0: PROMPTS[2]}, 4)
        cut = driving.run(runner, driving.make_scheduler(runner, max_prefill_tokens=9, prefill_chunk_tokens=9), PROMPTS, 4)

    assert torch.equal(cut[2].rows, whole[0].rows)


def test_cross_attention_reads_fp8_of_the_same_pool(tmp_path: Path) -> None:
    model = tiny_t5.build("t5")
    reference = tiny_t5.refer(model, PROMPTS[0], 16)
    tokens = (tiny_t5.START, *reference.ids)
    chunk = Chunk(0, tokens, 0, tuple(range(5, 10)), len(tokens), len(tokens), cross_table=tuple(range(5)), cross_length=70)

    runner = driving.make_runner(tiny_t5.save(model, tmp_path, "t5"), **FP8)
    logits = runner.forward(Plan(step=0, chunks=(chunk,), encodes=(Encode(0, PROMPTS[0], tuple(range(5))),)))

    assert runner.cache.layers[0].k.dtype == torch.float8_e4m3fn
    exact = tiny_t5.teacher_forced(model, reference)
    assert tiny_models.TOLERANCE < tiny_models.relative_error(logits, exact) < TOLERANCE


def test_two_ranks_say_the_same_in_fp8(folder: Path) -> None:
    prompts = list(PROMPTS.values())[:2]
    alone = driving.make_runner(folder, **FP8)

    first, second = ranks.run(2, lambda link: ranks.continue_prompts(link, folder, prompts, **FP8))

    expected = driving.run(alone, driving.make_scheduler(alone), dict(enumerate(prompts)))
    assert first[0] == second[0], "equal bits between ranks"
    for number, course in enumerate(first[1]):
        assert tiny_models.relative_error(course.rows[:1], expected[number].rows[:1]) < TOLERANCE


# ---- scales of a checkpoint ----


def with_scales(source: Path, folder: Path, pattern: str, value: float, shape: tuple[int, ...] = ()) -> Path:
    """The checkpoint with values and outputs of attention a thousand times larger and smaller, and scales for its caches."""
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        tensors[f"{prefix}.v_proj.weight"] *= 1e4
        tensors[f"{prefix}.o_proj.weight"] /= 1e4
        for kind in "kv":
            name = pattern.format(prefix=prefix, kind=kind)
            tensors[name] = torch.full(shape, value if kind == "v" else 1.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


@pytest.mark.parametrize("pattern", ["{prefix}.{kind}_scale", "{prefix}.attn.{kind}_scale", "{prefix}.{kind}_proj.{kind}_scale"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_checkpoints_scale_keeps_large_values_apart(folder: Path, tmp_path: Path, pattern: str, shape: tuple[int, ...]) -> None:
    exact = tiny_models.teacher_forced(tiny_models.build("llama2-gqa"), PROMPTS[0])

    scaled = logits_of(driving.make_runner(with_scales(folder, tmp_path, pattern, 1e4, shape), **FP8))

    assert tiny_models.TOLERANCE < tiny_models.relative_error(scaled, exact) < TOLERANCE


def test_wrong_scale_shows(folder: Path, tmp_path: Path) -> None:
    """What the scale above is for: with another one the values do not fit; a cache in dtype has no use for it."""
    exact = tiny_models.teacher_forced(tiny_models.build("llama2-gqa"), PROMPTS[0])
    other = with_scales(folder, tmp_path, "{prefix}.{kind}_scale", 1e-3)

    assert tiny_models.relative_error(logits_of(driving.make_runner(other, **FP8)), exact) > TOLERANCE
    assert tiny_models.relative_error(logits_of(driving.make_runner(other)), exact) < tiny_models.TOLERANCE


@pytest.mark.parametrize(
    ("value", "shape", "sentence"),
    [
        (0.0, (), r"self_attn\.v_scale=0\.0 must be finite and above 0"),
        (float("inf"), (), r"self_attn\.v_scale=inf must be finite and above 0"),
        (1.0, (2,), r"self_attn\.k_scale has shape \[2\], expected \[1\]"),
    ],
)
def test_bad_scale_is_refused_by_name(folder: Path, tmp_path: Path, value: float, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        driving.make_runner(with_scales(folder, tmp_path, "{prefix}.{kind}_scale", value, shape), **FP8)


# ---- the setting ----


@pytest.mark.parametrize(("word", "meant"), [("auto", "auto"), ("fp8", "fp8"), ("FP8_E4M3", "fp8")])
def test_cache_dtype_has_these_words(word: str, meant: str) -> None:
    assert EngineConfig.of({"model": "some/model", "kv_cache_dtype": word}).kv_cache_dtype == meant


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("fp8_e5m2", "known but not built; use fp8, which is E4M3"),
        ("int8", "must be one of auto, fp8, fp8_e4m3"),
    ],
)
def test_other_cache_dtypes_are_refused_by_name(word: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"kv_cache_dtype='{word}' is refused: {rule}"):
        EngineConfig.of({"model": "some/model", "kv_cache_dtype": word})
