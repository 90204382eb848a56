"""Plans arrive whole, though only what is new of them travels."""

from dataclasses import replace

import pytest

from lmi_dist.plan import Chunk, Plan
from lmi_dist.plan_stream import PlanReader, PlanWriter
from lmi_dist.scheduler import Scheduler, wants_token
from lmi_dist.sequence import Sequence


@pytest.mark.parametrize("window", [0, 24])
def test_every_plan_of_a_busy_scheduler_arrives(window: int) -> None:
    writer, reader = PlanWriter(), PlanReader()
    sizes = {"num_blocks": 12, "block_size": 4, "max_batch_size": 8, "max_prefill_tokens": 16, "prefill_chunk_tokens": 8}
    scheduler = Scheduler(**sizes, prefix_caching=True, window=window)
    for number in range(9):
        prompt = list(range(number, number + 3 + number))
        scheduler.add(Sequence(id=number, token_ids=prompt, prompt_length=len(prompt), max_tokens=20))

    while scheduler.has_work:
        plan = scheduler.plan()
        assert reader.read(writer.write(plan)) == plan
        if plan.step % 7 == 3 and plan.decodes and scheduler.num_steps % 2:
            scheduler.finish(plan.decodes[0].sequence)
        scheduler.commit(plan, {c.sequence: (plan.step % 50,) for c in plan.rows if wants_token(c)})

    assert scheduler.preemptions > 0


def test_dropped_plan_that_comes_again_arrives() -> None:
    writer, reader = PlanWriter(), PlanReader()
    decode = Chunk(1, (7,), 40, tuple(range(11)), 20, 1)
    plans = [Plan(5, (decode,)), Plan(5, (decode,)), Plan(6, (replace(decode, token_ids=(8,), start=41),))]

    assert [reader.read(writer.write(plan)) for plan in plans] == plans


def test_sequence_that_goes_on_costs_its_token() -> None:
    writer = PlanWriter()
    table = tuple(range(1000))
    first, second = (writer.write(Plan(step, (Chunk(1, (7,), 40 + step, table, 20, 1),))) for step in range(2))

    assert len(second) < 100 < 5000 < len(first)
