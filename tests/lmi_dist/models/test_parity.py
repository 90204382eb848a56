"""Every architecture against transformers on tiny random checkpoints, and the promise of equal bits in any company (CPU column).

The table is tests/support/tiny_variants.py: a new architecture is a kind and its variants there.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import driving
import pytest
import ranks
import tiny_models
import torch
from tiny_models import Settled
from tiny_variants import KINDS, VARIANTS
from transformers import AutoModelForCausalLM

from lmi_dist.runner import Runner

# ---- against transformers ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_continuation_equals_transformers(settled: Callable[[str], Settled], variant: str) -> None:
    folder, _, references = settled(variant)
    runner = driving.make_runner(folder)

    courses = driving.run(runner, driving.make_scheduler(runner), {0: references[0].prompt, 1: references[1].prompt})

    for number, reference in enumerate(references):
        assert tuple(courses[number].ids) == reference.ids
        assert tiny_models.relative_error(courses[number].rows, reference.logits) < tiny_models.TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_torch_equals_transformers_at_every_position(settled: Callable[[str], Settled], variant: str) -> None:
    folder, model, references = settled(variant)
    ids = references[1].prompt + references[1].ids[:-1]

    logits = driving.logits_at_every_position(driving.make_runner(folder, "torch"), ids)

    assert tiny_models.relative_error(logits, tiny_models.teacher_forced(model, ids)) < tiny_models.TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_is_as_exact_as_transformers(settled: Callable[[str], Settled], variant: str) -> None:
    folder, model, references = settled(variant)
    ids = references[1].prompt + references[1].ids
    exact = tiny_models.teacher_forced(model, ids)
    theirs = tiny_models.teacher_forced(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), ids)

    ours = driving.logits_at_every_position(driving.make_runner(folder, dtype="bf16"), ids)

    allowed = 2 * float((theirs - exact).abs().max())
    assert float((ours - exact).abs().max()) <= allowed
    differs = ours.argmax(1) != exact.argmax(1)
    assert (tiny_models.gap(exact)[differs] < allowed).all()


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
        return *alone(variant, dtype), {number: each.prompt for number, each in enumerate(settled(variant).references)}

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
        scheduler = driving.make_scheduler(runner, num_blocks=9, window=0)  # or a windowed model has enough

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
        assert tiny_models.relative_error(again[number].rows, tiny_models.refer(model, prompt, 8).logits) < tiny_models.TOLERANCE


# ---- two ranks ----

# three heads are refused (test_published.py has such); angles of a rotary scaling have nothing to do with ranks
ALONE = {"odd-sizes", "linear", "dynamic", "dynamic-mqa", "llama3", "yarn", "yarn-mscale", "longrope", "longrope-factor"}


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_say_what_transformers_says(settled: Callable[[str], Settled], kind: str) -> None:
    cases = [settled(name) for name, (own, _) in VARIANTS.items() if own == kind and name not in ALONE]
    rounds = [(each.folder, [reference.prompt for reference in each.references]) for each in (*cases, cases[0])]

    first, second = ranks.run(2, lambda link, number: ranks.continue_prompts(link, *rounds[number]), len(rounds))

    assert [digest for digest, _ in first] == [digest for digest, _ in second], "equal bits between ranks"
    assert first[0][0] == first[-1][0], "equal bits between runs"
    for each, (_, courses) in zip(cases, first, strict=False):
        for course, reference in zip(courses, each.references, strict=True):
            assert tuple(course.ids) == reference.ids
            assert tiny_models.relative_error(course.rows, reference.logits) < tiny_models.TOLERANCE
