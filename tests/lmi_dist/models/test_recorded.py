"""Every architecture's decode steps recorded and replayed give the bits of the plain forward."""

from collections.abc import Callable

import driving
import pytest
import ranks
import torch
from tiny_models import Settled
from tiny_variants import VARIANTS

from lmi_dist.link import Link
from lmi_dist.local_link import FollowerLink
from lmi_dist.runner import Runner

NUM_STEPS = 12


def courses_of(runner: Runner, case: Settled) -> dict[int, driving.Course]:
    """Of both prompts and the first one's half, which decode together."""
    first, second = (reference.prompt for reference in case.references)
    return driving.run(runner, driving.make_scheduler(runner), {0: first, 1: second, 2: first[: len(first) // 2]}, NUM_STEPS)


@pytest.mark.parametrize(("variant", "dtype"), [(name, ("fp32", "bf16")[i % 2]) for i, name in enumerate(VARIANTS)])
def test_recorded_steps_give_the_plain_forwards_bits(settled: Callable[[str], Settled], variant: str, dtype: str) -> None:
    case = settled(variant)
    plain = courses_of(driving.make_runner(case.folder, dtype=dtype, enforce_eager=True), case)
    runner = driving.make_runner(case.folder, dtype=dtype)

    courses = courses_of(runner, case)

    assert runner.decodes is not None
    assert runner.decodes.obstacle == ""
    assert runner.decodes.num_replayed >= NUM_STEPS - 2
    assert all(torch.equal(courses[number].rows, plain[number].rows) for number in plain)


def test_ranks_record_their_sums_with_the_rest(settled: Callable[[str], Settled]) -> None:
    """Turns are counted in the segment, not in the recording: plain and recorded steps take turns here."""
    case = settled("llama2-gqa")

    def run(link: Link, number: int) -> tuple[int, list[torch.Tensor]]:
        runner = driving.make_runner(case.folder, link=link, tensor_parallel_degree=2, enforce_eager=number == 0)
        decodes, rows = runner.decodes, []
        if isinstance(link, FollowerLink):
            while (plan := link.next_plan()) is not None:
                runner.forward(plan)
        else:
            rows = [course.rows for course in courses_of(ranks.publishing(runner, link), case).values()]
            link.close()
        return (0 if decodes is None else decodes.num_replayed), rows

    leader, follower = ranks.run(2, run, 2)

    (_, plain), (num_replayed, recorded) = leader
    assert num_replayed == follower[1][0] >= NUM_STEPS - 2
    assert all(torch.equal(*pair) for pair in zip(plain, recorded, strict=True))
