"""Llama and Mistral against transformers on tiny random checkpoints, and the promise of equal bits in any company (CPU column)."""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import driving
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, Reference
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmi_dist import ops
from lmi_dist.errors import CheckpointError, ConfigError
from lmi_dist.plan import Chunk, Plan
from lmi_dist.runner import Runner

TOLERANCE = 1e-4  # of the largest logit: fp32 sums in another order
Settled = tuple[Path, PreTrainedModel, list[Reference]]


@pytest.fixture(autouse=True)
def _column_as_before() -> Iterator[None]:
    """A runner chooses for the whole process; what comes after these tests finds what was before."""
    with ops.using("cpu", 1):
        yield


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Settled]:
    """A variant's checkpoint folder, transformers' model and its greedy continuations; made once."""

    @lru_cache
    def make(variant: str) -> Settled:
        model, references = tiny_models.settled(variant)
        return tiny_models.save(model, tmp_path_factory.mktemp(variant)), model, references

    return make


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The worst position's max|difference| / max|reference|."""
    return float(((ours - reference).abs().amax(1) / reference.abs().amax(1)).max())


def prompts_of(references: list[Reference]) -> dict[int, tuple[int, ...]]:
    return {number: reference.prompt for number, reference in enumerate(references)}


def logits_at_every_position(runner: Runner, ids: tuple[int, ...]) -> torch.Tensor:
    table = tuple(range(-(-len(ids) // 16)))
    return runner.forward(Plan(step=0, chunks=(Chunk(0, ids, 0, table, len(ids), len(ids)),)))


# ---- against transformers ----


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_continuation_equals_transformers(settled: Callable[[str], Settled], variant: str, kernels: str) -> None:
    folder, _, references = settled(variant)
    runner = driving.make_runner(folder, kernels)

    courses = driving.run(runner, driving.make_scheduler(runner), prompts_of(references))

    for number, reference in enumerate(references):
        assert tuple(courses[number].ids) == reference.ids
        assert relative_error(courses[number].rows, reference.logits) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_is_as_exact_as_transformers(settled: Callable[[str], Settled], variant: str) -> None:
    folder, model, references = settled(variant)
    ids = references[1].prompt + references[1].ids
    exact = tiny_models.teacher_forced(model, ids)
    theirs = tiny_models.teacher_forced(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), ids)

    ours = logits_at_every_position(driving.make_runner(folder, dtype="bf16"), ids)

    allowed = 2 * float((theirs - exact).abs().max())
    assert float((ours - exact).abs().max()) <= allowed
    differs = ours.argmax(1) != exact.argmax(1)
    assert (tiny_models.gap(exact)[differs] < allowed).all()


def test_tied_checkpoint_may_hold_its_head(tmp_path: Path) -> None:
    model = tiny_models.build("tied")
    folder = tiny_models.save(model, tmp_path, safe_serialization=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(512, 64)}, folder / "model.safetensors")
    ids = tiny_models.prompt_of(20)

    logits = logits_at_every_position(driving.make_runner(folder), ids)

    assert relative_error(logits, tiny_models.teacher_forced(model, ids)) < TOLERANCE


# ---- equal bits ----


@pytest.fixture(scope="module")
def alone(settled: Callable[[str], Settled]) -> Callable[[str, str], tuple[Runner, list[driving.Course]]]:
    """A runner, and the courses of both prompts when each runs alone, its prompt in one piece."""

    @lru_cache
    def run(variant: str, dtype: str) -> tuple[Runner, list[driving.Course]]:
        folder, _, references = settled(variant)
        runner = driving.make_runner(folder, dtype=dtype, cpu_threads=2)
        courses = [driving.run(runner, driving.make_scheduler(runner), {0: each.prompt})[0] for each in references]
        return runner, courses

    return run


def assert_same_bits(courses: dict[int, driving.Course], expected: list[driving.Course]) -> None:
    for number, course in enumerate(expected):
        assert torch.equal(courses[number].rows, course.rows)


@pytest.mark.parametrize(("variant", "dtype"), [(name, ("fp32", "bf16")[i % 2]) for i, name in enumerate(VARIANTS)])
class TestBits:
    """A sequence's logits are the same bits, whatever runs beside it and however it was cut."""

    @pytest.fixture
    def case(self, settled: Any, alone: Any, variant: str, dtype: str) -> tuple[Runner, list[driving.Course], dict[int, Any]]:
        return *alone(variant, dtype), prompts_of(settled(variant)[2])

    def test_chunked_prompt_has_equal_bits(self, case: Any) -> None:
        runner, expected, prompts = case
        scheduler = driving.make_scheduler(runner, max_prefill_tokens=7, prefill_chunk_tokens=7)

        assert_same_bits(driving.run(runner, scheduler, prompts), expected)

    def test_batched_with_others_has_equal_bits(self, case: Any) -> None:
        runner, expected, prompts = case
        others = {2 + i: tiny_models.prompt_of(3 + 5 * i % 70, seed=i) for i in range(30)}

        courses = driving.run(runner, driving.make_scheduler(runner, prefill_chunk_tokens=100), prompts | others)

        assert_same_bits(courses, expected)

    def test_preempted_sequence_has_equal_bits(self, case: Any) -> None:
        runner, expected, prompts = case
        scheduler = driving.make_scheduler(runner, num_blocks=9)

        courses = driving.run(runner, scheduler, prompts)

        assert scheduler.preemptions > 0
        assert_same_bits(courses, expected)

    def test_prefix_cached_prompt_has_equal_bits(self, case: Any) -> None:
        runner, expected, prompts = case
        scheduler = driving.make_scheduler(runner, prefix_caching=True)
        driving.run(runner, scheduler, prompts)

        courses = driving.run(runner, scheduler, prompts)

        assert scheduler.prefix_hit_tokens >= 48
        assert_same_bits(courses, expected)


@pytest.mark.parametrize("variant", ["dynamic", "longrope"])
def test_prompts_of_other_regimes_share_no_keys(settled: Callable[[str], Settled], variant: str) -> None:
    folder, model, references = settled(variant)
    runner = driving.make_runner(folder)
    scheduler = driving.make_scheduler(runner, prefix_caching=True)
    long = references[1].prompt
    driving.run(runner, scheduler, {0: long, 1: long[:33]}, num_steps=4)

    again = driving.run(runner, scheduler, {0: long[:38], 1: (*long, 9, 8, 7)}, num_steps=8)

    for number, prompt in ((0, long[:38]), (1, (*long, 9, 8, 7))):
        assert relative_error(again[number].rows, tiny_models.refer(model, prompt, 8).logits) < TOLERANCE


# ---- kinds of checkpoints ----


def pickled(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """As transformers 4 wrote it: two .bin shards with an index."""
    (folder / "model.safetensors").unlink()
    tensors = {name: x.to(dtype) for name, x in model.state_dict().items()}
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    places = {name: file for file, part in shards.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("kind", ["sharded", "bin", "fp16", "old-keys"])
@pytest.mark.parametrize("variant", ["attention-bias", "yarn"])
def test_any_kind_of_checkpoint_gives_its_logits(tmp_path: Path, variant: str, kind: str) -> None:
    model = tiny_models.build(variant)
    model = model.half() if kind == "fp16" else model
    folder = tiny_models.save(model, tmp_path, max_shard_size="50KB" if kind == "sharded" else "5GB")
    if kind == "bin":
        pickled(model, folder, torch.float32)
    if kind == "old-keys":
        config = json.loads((folder / "config.json").read_text())
        tiny_models.rewrite_config(folder, **tiny_models.old_style(config))
    ids = tiny_models.prompt_of(30)

    logits = logits_at_every_position(driving.make_runner(folder), ids)

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative_error(logits, tiny_models.teacher_forced(reference, ids)) < TOLERANCE


def test_llama1_frequencies_in_checkpoint_are_ignored(tmp_path: Path) -> None:
    model = tiny_models.build("llama1")
    tiny_models.save(model, tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file({**load_file(tmp_path / "model.safetensors"), **extra}, tmp_path / "model.safetensors")

    driving.make_runner(tmp_path)


# ---- refusals ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "tanh"}, "hidden_act='tanh' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 must be 1"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantize=gptq is known but not built yet"),
    ],
)
def test_unsupported_config_is_refused_by_name(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    tiny_models.save(tiny_models.build("llama1"), tmp_path)
    tiny_models.rewrite_config(tmp_path, **values)

    with pytest.raises(ConfigError, match=message):
        driving.make_runner(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 3}, r"9 missing \(model\.layers\.2\.input_layernorm\.weight, .*, \.\.\.\)"),
        ({"num_hidden_layers": 1}, r"9 not part of this architecture \(model\.layers\.1\."),
        ({"intermediate_size": 96}, r"mlp\.gate_proj\.weight has shape \[112, 64\], expected \[96, 64\]"),
        ({"attention_bias": True}, r"8 missing \(model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
)
def test_checkpoint_unlike_its_config_is_told(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    tiny_models.save(tiny_models.build("llama1"), tmp_path)
    tiny_models.rewrite_config(tmp_path, **values)

    with pytest.raises(CheckpointError, match=message):
        driving.make_runner(tmp_path)
