"""Every architecture's decode steps recorded and replayed give the bits of the plain forward."""

from collections.abc import Callable

import driving
import pytest
import torch
from tiny_models import Settled
from tiny_variants import VARIANTS

from lmi_dist.runner import Runner

NUM_STEPS = 12


def courses_of(runner: Runner, case: Settled) -> dict[int, driving.Course]:
    """Of both prompts and the first one's half, which decode together."""
    first, second = (reference.prompt for reference in case.references)
    return driving.run(runner, driving.make_scheduler(runner), {0: first, 1: second, 2: first[: len(first) // 2]}, NUM_STEPS)


RECORDED = [name for name, (kind, _) in VARIANTS.items() if kind in ("llama", "mistral", "mixtral", "phi3", "qwen2")]
RECORDED = [name for name in RECORDED if "dynamic" not in name and "longrope" not in name]


@pytest.mark.parametrize(("variant", "dtype"), [(name, ("fp32", "bf16")[i % 2]) for i, name in enumerate(RECORDED)])
def test_recorded_steps_give_the_plain_forwards_bits(settled: Callable[[str], Settled], variant: str, dtype: str) -> None:
    case = settled(variant)
    plain = courses_of(driving.make_runner(case.folder, dtype=dtype, enforce_eager=True), case)
    runner = driving.make_runner(case.folder, dtype=dtype)

    courses = courses_of(runner, case)

    assert runner.decodes is not None
    assert runner.decodes.obstacle == ""
    assert runner.decodes.num_replayed >= NUM_STEPS - 2
    assert all(torch.equal(courses[number].rows, plain[number].rows) for number in plain)
