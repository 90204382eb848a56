"""T5 of every version against transformers on tiny random checkpoints, and equal bits in any company (CPU column)."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import driving
import pytest
import ranks
import tiny_models
import tiny_t5
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Reference, Settled
from tiny_t5 import VARIANTS

from lmi_dist import Engine, EngineConfig, Output, Request, RequestError, SamplingParams
from lmi_dist.errors import CheckpointError, ConfigError
from lmi_dist.models import read_config
from lmi_dist.plan import Chunk, Encode, Plan
from lmi_dist.runner import Runner


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Settled]:
    """A variant's checkpoint folder, transformers' model and its greedy continuations; made once."""

    @lru_cache
    def make(variant: str) -> Settled:
        model, references = tiny_t5.settled(variant)
        return Settled(tiny_t5.save(model, tmp_path_factory.mktemp(variant), variant), model, references)

    return make


def run(variant: str, runner: Runner, prompts: dict[int, tuple[int, ...]], **scheduler: Any) -> dict[int, driving.Course]:
    start = VARIANTS[variant].get("decoder_start_token_id", tiny_t5.START)
    return driving.run(runner, driving.make_scheduler(runner, **scheduler), prompts, start=start)


def logits_at_every_position(runner: Runner, reference: Reference, start: int = tiny_t5.START) -> torch.Tensor:
    """[T,V] when the decoder is given the reference's ids."""
    tokens = (start, *reference.ids)
    across, own = tuple(range(5)), tuple(range(5, 10))
    chunk = Chunk(0, tokens, 0, own, len(tokens), len(tokens), cross_table=across, cross_length=len(reference.prompt))
    return runner.forward(Plan(step=0, chunks=(chunk,), encodes=(Encode(0, reference.prompt, across),)))


# ---- against transformers ----


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_continuation_equals_transformers(settled: Callable[[str], Settled], variant: str, kernels: str) -> None:
    folder, _, references = settled(variant)
    runner = driving.make_runner(folder, kernels)

    courses = run(variant, runner, {number: reference.prompt for number, reference in enumerate(references)})

    for number, reference in enumerate(references):
        assert tuple(courses[number].ids) == reference.ids
        assert tiny_models.relative_error(courses[number].rows, reference.logits) < tiny_models.TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_is_as_exact_as_transformers(settled: Callable[[str], Settled], variant: str) -> None:
    folder, model, references = settled(variant)
    exact = tiny_t5.teacher_forced(model, references[1])
    theirs = tiny_t5.teacher_forced(model.from_pretrained(folder, dtype=torch.bfloat16), references[1])
    start = VARIANTS[variant].get("decoder_start_token_id", tiny_t5.START)

    ours = logits_at_every_position(driving.make_runner(folder, dtype="bf16"), references[1], start)

    allowed = 2 * float((theirs - exact).abs().max())
    assert float((ours - exact).abs().max()) <= allowed
    differs = ours.argmax(1) != exact.argmax(1)
    assert (tiny_models.gap(exact)[differs] < allowed).all()


def test_fp16_survives_what_outgrows_it(settled: Callable[[str], Settled], tmp_path: Path) -> None:
    _, model, references = settled("flan")
    large = tiny_t5.build("flan")
    large.load_state_dict(model.state_dict())
    with torch.no_grad():
        for stack in (large.encoder, large.decoder):
            stack.block[0].layer[-1].DenseReluDense.wo.weight.mul_(3e4)
    exact = tiny_t5.teacher_forced(large, references[1])

    ours = logits_at_every_position(driving.make_runner(tiny_t5.save(large, tmp_path, "flan"), dtype="fp16"), references[1])

    assert tiny_models.relative_error(ours, exact) < 0.02  # ten bits of mantissa


# ---- equal bits ----


@pytest.fixture(scope="module")
def alone(settled: Callable[[str], Settled]) -> Callable[[str, str], tuple[Runner, list[driving.Course]]]:
    """A runner, and the courses of both prompts when each runs alone."""

    @lru_cache
    def make(variant: str, dtype: str) -> tuple[Runner, list[driving.Course]]:
        folder, _, references = settled(variant)
        runner = driving.make_runner(folder, dtype=dtype, cpu_threads=2)
        return runner, [run(variant, runner, {0: each.prompt})[0] for each in references]

    return make


OTHERS = {2 + i: tiny_models.prompt_of(3 + 5 * i % 70, seed=i) for i in range(14)}
COMPANIES: dict[str, tuple[dict[int, tuple[int, ...]], dict[str, Any]]] = {
    "mixed batch": (OTHERS, {"prefill_chunk_tokens": 100}),
    "one encoder a step": (dict(list(OTHERS.items())[:3]), {"max_prefill_tokens": 1, "prefill_chunk_tokens": 1}),
    "preempted": ({}, {"num_blocks": 15}),
    "preempted and cached": ({}, {"num_blocks": 15, "prefix_caching": True}),
}


@pytest.mark.parametrize("company", COMPANIES)
@pytest.mark.parametrize(("variant", "dtype"), [(name, ("fp32", "bf16")[i % 2]) for i, name in enumerate(VARIANTS)])
def test_bits_do_not_depend_on_company(settled: Any, alone: Any, variant: str, dtype: str, company: str) -> None:
    runner, expected = alone(variant, dtype)
    others, settings = COMPANIES[company]
    prompts = {number: reference.prompt for number, reference in enumerate(settled(variant)[2])}

    courses = run(variant, runner, prompts | others, **settings)

    for number, course in enumerate(expected):
        assert torch.equal(courses[number].rows, course.rows)


@pytest.mark.parametrize("variant", ["t5", "flan"])
def test_cached_encoder_gives_equal_bits(settled: Any, alone: Any, variant: str) -> None:
    runner, expected = alone(variant, "fp32")
    scheduler = driving.make_scheduler(runner, prefix_caching=True)
    prompts = {number: reference.prompt for number, reference in enumerate(settled(variant)[2])}
    driving.run(runner, scheduler, prompts, start=tiny_t5.START)
    encoded: list[Encode] = []
    forward = runner.forward

    def watched(plan: Plan) -> torch.Tensor:
        encoded.extend(plan.encodes)
        return forward(plan)

    runner.forward = watched
    try:
        courses = driving.run(runner, scheduler, prompts, start=tiny_t5.START)
    finally:
        runner.forward = forward

    assert not encoded
    for number, course in enumerate(expected):
        assert torch.equal(courses[number].rows, course.rows)


# ---- two ranks ----


def test_two_ranks_say_what_transformers_says(settled: Callable[[str], Settled]) -> None:
    cases = [settled(name) for name in ("t5", "flan", "v1.1")]
    rounds = [(each.folder, [reference.prompt for reference in each.references]) for each in (*cases, cases[0])]
    drive = partial(driving.run, start=tiny_t5.START)

    first, second = ranks.run(2, lambda link, number: ranks.continue_prompts(link, *rounds[number], drive=drive), len(rounds))

    assert [digest for digest, _ in first] == [digest for digest, _ in second], "equal bits between ranks"
    assert first[0][0] == first[-1][0], "equal bits between runs"
    for each, (_, courses) in zip(cases, first, strict=False):
        for course, reference in zip(courses, each.references, strict=True):
            assert tuple(course.ids) == reference.ids
            assert tiny_models.relative_error(course.rows, reference.logits) < tiny_models.TOLERANCE


# ---- in the engine ----


@pytest.fixture(scope="module")
def engine(settled: Callable[[str], Settled]) -> Engine:
    return Engine(EngineConfig(model=str(settled("flan")[0]), dtype="fp32", max_model_len=80, max_batch_size=4, cpu_threads=1))


def answer(engine: Engine, prompt: str | tuple[int, ...], **params: Any) -> list[Output]:
    """The outputs of one request, greedy and of eight tokens if not said otherwise."""
    wishes = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params})
    engine.add(Request(id="a", prompt=prompt, params=wishes))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def ids_of(outputs: list[Output], index: int = 0) -> tuple[int, ...]:
    return tuple(token.id for output in outputs if output.index == index for token in output.tokens)


def test_engine_answers_what_the_encoder_has_read(settled: Any, engine: Engine) -> None:
    reference = settled("flan")[2][1]

    outputs = answer(engine, reference.prompt)

    assert ids_of(outputs) == reference.ids[:8]
    assert outputs[-1].num_prompt_tokens == len(reference.prompt)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_candidates_share_one_encoder_run(settled: Any, engine: Engine) -> None:
    outputs = answer(engine, tiny_models.prompt_of(40), n=3, temperature=1.0, seed=5)

    assert len({ids_of(outputs, index) for index in range(3)}) == 3


def test_prompt_logprobs_are_those_of_the_decoders_start(engine: Engine) -> None:
    outputs = answer(engine, tiny_models.prompt_of(40), prompt_logprobs=0)

    (told,) = [output.prompt_tokens for output in outputs if output.prompt_tokens]
    assert [(token.id, token.logprob) for token in told] == [(tiny_t5.START, None)]


def test_repetition_penalty_looks_at_the_answer_only(settled: Any, engine: Engine) -> None:
    _, model, references = settled("flan")
    with torch.inference_mode():
        ids = torch.tensor([references[0].prompt])
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, repetition_penalty=3.0)[0, 1:].tolist()

    assert ids_of(answer(engine, references[0].prompt, repetition_penalty=3.0)) == tuple(expected)


@pytest.mark.parametrize(("length", "message"), [(81, "prompt has 81 tokens, but at most 80 fit"), (0, "prompt is empty")])
def test_what_the_encoder_cannot_read_is_refused(engine: Engine, length: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        answer(engine, tiny_models.prompt_of(length))


def test_longest_input_and_answer_fit_together(settled: Any) -> None:
    config = EngineConfig(model=str(settled("flan")[0]), dtype="fp32", max_model_len=80, max_batch_size=1, cpu_threads=1)
    engine = Engine(config)

    outputs = answer(engine, tiny_models.prompt_of(80), max_tokens=None)

    assert (outputs[-1].finish_reason, outputs[-1].num_generated_tokens) == ("length", 79)
    assert engine.stats().num_preemptions == 0


# ---- kinds of checkpoints ----


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
@pytest.mark.parametrize("variant", ["t5", "flan"])
def test_embedding_may_go_by_any_of_its_names(settled: Any, tmp_path: Path, variant: str, name: str) -> None:
    _, model, references = settled(variant)
    tiny_t5.save(model, tmp_path, variant)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, name: tensors.pop("shared.weight").clone()}, tmp_path / "model.safetensors")

    logits = logits_at_every_position(driving.make_runner(tmp_path), references[0])

    assert tiny_models.relative_error(logits, tiny_t5.teacher_forced(model, references[0])) < tiny_models.TOLERANCE


def test_surplus_copies_are_ignored(settled: Any, tmp_path: Path) -> None:
    _, model, references = settled("t5")
    tiny_t5.save(model, tmp_path, "t5")
    tensors = load_file(tmp_path / "model.safetensors")
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    never = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(32, 4)}
    save_file({**tensors, **{name: tensors["shared.weight"].clone() for name in names}, **never}, tmp_path / "model.safetensors")

    logits = logits_at_every_position(driving.make_runner(tmp_path), references[0])

    assert tiny_models.relative_error(logits, tiny_t5.teacher_forced(model, references[0])) < tiny_models.TOLERANCE


# ---- config.json ----


def test_positions_bound_nothing(settled: Any) -> None:
    config = read_config(settled("t5")[0])

    assert (config.model_len(None), config.model_len(4096)) == (512, 4096)


@pytest.mark.parametrize(("values", "start"), [({}, 0), ({"decoder_start_token_id": None, "pad_token_id": 3}, 3)])
def test_decoder_starts_with_its_token(settled: Any, tmp_path: Path, values: dict[str, Any], start: int) -> None:
    tiny_t5.save(settled("t5")[1], tmp_path, "t5")
    (tmp_path / "generation_config.json").unlink()
    tiny_models.rewrite_config(tmp_path, **values)

    assert read_config(tmp_path).decoder_start_token_id == start


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"feed_forward_proj": "gated-tanh"}, ConfigError, "feed_forward_proj='gated-tanh' is not supported"),
        ({"d_ff": None}, ConfigError, "d_ff is missing"),
        ({"relative_attention_max_distance": 16}, ConfigError, "_max_distance=16 must be an integer of at least 17"),
        ({"d_kv": 20}, ConfigError, "head_dim=20 must be a multiple of 8"),
        ({"num_layers": 1, "num_decoder_layers": 2}, CheckpointError, r"8 not part of this architecture \(encoder\.block\.1\."),
        ({"num_decoder_layers": 3}, CheckpointError, r"13 missing \(decoder\.block\.2\.layer\.0\.layer_norm\.weight"),
        ({"tie_word_embeddings": False}, CheckpointError, r"1 missing \(lm_head\.weight\)"),
    ],
)  # fmt: skip
def test_unlike_config_is_refused_by_name(settled: Any, tmp_path: Path, values: Any, error: Any, message: str) -> None:
    tiny_t5.save(settled("t5")[1], tmp_path, "t5")
    tiny_models.rewrite_config(tmp_path, **values)

    with pytest.raises(error, match=message):
        driving.make_runner(tmp_path)
