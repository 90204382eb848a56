"""One model over several ranks: what transformers says, with equal bits on every rank and in every run, each with its part only."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import driving
import pytest
import ranks
import tiny_models
import torch
from tiny_models import Reference
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmi_dist import ConfigError, Engine, EngineConfig, Follower, Link, MemoryPlanError, Ranks, Request, SamplingParams, explain
from lmi_dist.local_link import FollowerLink, LeaderLink
from lmi_dist.weights import Checkpoint

TOLERANCE = 1e-4  # of the largest logit: fp32 sums in another order
PROMPT = "The quick brown fox"

# With and without grouped queries (at 4 ranks 2 key heads are held twice), biases, and sizes that no number of ranks divides.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama1": {},
    "llama2-gqa": {"vocab_size": 517, "intermediate_size": 99},
    "both-biases-tied": {"vocab_size": 515, "num_key_value_heads": 1},
}


@dataclass
class Case:
    folder: Path
    model: PreTrainedModel
    references: list[Reference]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @lru_cache
    def make(variant: str) -> Case:
        model, references = tiny_models.settled(variant, **VARIANTS[variant])
        return Case(tiny_models.save(model, tmp_path_factory.mktemp(variant)), model, references)

    return make


def part(link: Any, case: Case, dtype: str) -> tuple[str, list[driving.Course]]:
    return ranks.continue_prompts(link, case.folder, [each.prompt for each in case.references], dtype)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_say_what_transformers_says_in_equal_bits(case: Callable[[str], Case], size: int) -> None:
    cases = [case(variant) for variant in VARIANTS]
    rounds = [(each, dtype) for each in cases for dtype in ("fp32", "fp32", "bf16", "bf16")]

    results = ranks.run(size, lambda link, number: part(link, *rounds[number]), len(rounds))

    for number, (each, dtype) in enumerate(rounds):
        digests = {result[number][0] for result in results}
        assert len(digests) == 1, "equal bits between ranks"
        if number % 2:
            assert digests == {results[0][number - 1][0]}, "equal bits between runs"
        for course, reference in zip(results[0][number][1], each.references, strict=True):
            if dtype == "fp32":
                assert tuple(course.ids) == reference.ids
                error = (course.rows - reference.logits).abs().amax(1) / reference.logits.abs().amax(1)
                assert float(error.max()) < TOLERANCE
            elif number % 2:
                check_bf16(each, course, reference.prompt)


def check_bf16(case: Case, course: driving.Course, prompt: tuple[int, ...]) -> None:
    """Along the ids that the ranks have chosen: as exact as transformers, and another id only where the best two are near."""
    ids = prompt + tuple(course.ids[:-1])
    exact = tiny_models.teacher_forced(case.model, ids)[len(prompt) - 1 :]
    theirs = tiny_models.teacher_forced(AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16), ids)
    allowed = 2 * float((theirs[len(prompt) - 1 :] - exact).abs().max())

    assert float((course.rows - exact).abs().max()) <= allowed
    differs = course.rows.argmax(1) != exact.argmax(1)
    assert (tiny_models.gap(exact)[differs] < allowed).all()


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_column_makes_no_difference_to_ranks(case: Callable[[str], Case], kernels: str) -> None:
    each = case("llama2-gqa")
    request = Request(
        id="r", prompt=each.references[1].prompt, params=SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    )

    def answer(link: Any) -> list[int]:
        if isinstance(link, FollowerLink):
            Follower(link).run()
            return []
        engine = make_engine(link, each.folder, kernels=kernels)
        engine.add(request)
        ids = [token.id for output in drain(engine) for token in output.tokens]
        engine.close()
        return ids

    assert tuple(ranks.run(2, answer)[0]) == each.references[1].ids


def make_engine(link: LeaderLink, folder: Path, **values: Any) -> Engine:
    degree = link.ranks.size
    return Engine(EngineConfig.of({"model": str(folder), "dtype": "fp32", "tensor_parallel_degree": degree, **values}), link)


def drain(engine: Engine) -> list[Any]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


@pytest.mark.parametrize("culprit", [0, 1])
def test_step_that_fails_on_one_rank_ends_its_requests_only(case: Callable[[str], Case], culprit: int) -> None:
    folder = case("llama1").folder

    def break_once(model: Any) -> None:
        embed = model.embed

        def broken(batch: Any) -> torch.Tensor:
            model.embed = embed
            embed(batch)  # a sum has been done
            raise ValueError("boom")

        model.embed = broken

    def work(link: Any) -> tuple[str, list[int], list[int]]:
        if isinstance(link, FollowerLink):
            follower = Follower(link)
            if culprit:
                break_once(follower._runner.model)
            follower.run()
            return "", [], []
        engine = make_engine(link, folder)
        if not culprit:
            break_once(engine._runner.model)
        answers: list[list[int]] = []
        errors = []
        for name in ("first", "second", "third"):
            engine.add(Request(id=name, prompt=PROMPT, params=SamplingParams(max_tokens=8, temperature=0.0)))
            outputs = drain(engine)
            answers.append([token.id for output in outputs for token in output.tokens])
            errors += [str(output.error) for output in outputs if output.error]
        stats = engine.stats()
        assert (stats.num_failed_steps, stats.num_free_blocks) == (1, stats.num_blocks)
        engine.close()
        return "; ".join(errors), answers[1], answers[2]

    (message, second, third), _ = ranks.run(2, work)

    assert "ValueError: boom" in message
    assert ("rank 1 has dropped the step" in message) == (culprit == 1)
    assert second == third
    assert len(second) == 8


def test_step_without_a_rank_asks_to_try_again(case: Callable[[str], Case]) -> None:
    def work(link: Any) -> list[Any]:
        if isinstance(link, FollowerLink):
            Follower(link)
            return []  # and ends
        engine = make_engine(link, case("llama1").folder)
        engine.add(Request(id="r", prompt=PROMPT, params=SamplingParams(max_tokens=8, temperature=0.0)))
        return [(type(output.error).__name__, getattr(output.error, "code", 0)) for output in drain(engine)]

    assert ranks.run(2, work)[0] == [("LostRankError", 503)]


def test_what_rank_0_cannot_load_is_told_on_all(tmp_path: Path) -> None:
    def load(link: Any) -> str:
        try:
            Follower(link) if isinstance(link, FollowerLink) else make_engine(link, tmp_path / "nothing")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    first, second = ranks.run(2, load)

    assert first == second
    assert first.startswith("CheckpointError: ")


# ---- before the first byte is read ----


def test_engine_alone_cannot_be_several_ranks(case: Callable[[str], Case]) -> None:
    config = EngineConfig.of({"model": str(case("llama1").folder), "tensor_parallel_degree": 2})

    with pytest.raises(
        ConfigError, match=r"tensor_parallel_degree=2 must be the number of ranks.* started 1; start with mpirun -np 2"
    ):
        Engine(config)


def test_heads_that_do_not_divide_are_refused_before_loading(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    config = EngineConfig.of({"model": str(case("llama2-gqa").folder), "tensor_parallel_degree": 3})

    with pytest.raises(ConfigError, match=r"degree=3 .*: num_attention_heads=4 and num_key_value_heads=2 allow 1, 2, 4$"):
        explain(config)


def test_ranks_read_their_own_slices_only(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, plain, read = case("llama2-gqa").folder, Checkpoint.read, [0]

    def counting(self: Checkpoint, *args: Any) -> torch.Tensor:
        tensor = plain(self, *args)
        read[-1] += tensor.nbytes
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counting)
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        read.append(0)
        driving.make_runner(folder, link=Link(Ranks(rank, size)), tensor_parallel_degree=size)

    whole, *halves = read[1:]
    norms = 5 * 64 * 4  # of two layers and the end, [64] fp32, are on every rank
    assert sum(halves) == whole + norms
    assert max(halves) < 0.52 * whole


def test_memory_plan_is_of_one_rank(case: Callable[[str], Case]) -> None:
    values = {"model": str(case("llama2-gqa").folder), "dtype": "fp32"}

    alone, shared = (
        explain(EngineConfig.of({**values, "tensor_parallel_degree": n}), available_bytes=1 << 30).memory for n in (1, 2)
    )

    assert shared.available_bytes == alone.available_bytes // 2
    assert shared.block_bytes == alone.block_bytes // 2
    assert alone.weights_bytes / 2 < shared.weights_bytes < 0.52 * alone.weights_bytes
    assert "1 heads x" in " ".join(shared.arithmetic)


def test_explanation_tells_what_a_rank_has(case: Callable[[str], Case]) -> None:
    told = explain(EngineConfig.of({"model": str(case("llama2-gqa").folder), "tensor_parallel_degree": 4}))

    assert "4 ranks, each with 1 heads, 1 key heads, and what follows" in told.lines
    assert any("a rank" in line for line in told.lines)


def test_too_little_memory_for_a_rank_is_told(case: Callable[[str], Case]) -> None:
    config = EngineConfig.of({"model": str(case("llama2-gqa").folder), "tensor_parallel_degree": 2})

    with pytest.raises(MemoryPlanError, match=r"available memory 0\.001 GB a rank"):
        explain(config, available_bytes=2_000_000)
