"""The scheduler's rules by example, then any order of calls on a watched one (tests/support/scheduler_model.py)."""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from scheduler_model import WatchedScheduler

from lmi_dist.plan import Chunk, Encode, Image, PlacedImage, Plan, Span
from lmi_dist.scheduler import Scheduler, wants_token
from lmi_dist.sequence import Finished, Sequence


def watched(**changes: Any) -> WatchedScheduler:
    usual = {
        "num_blocks": 32, "block_size": 4, "max_batch_size": 8, "max_prefill_tokens": 100, "prefill_chunk_tokens": 100,
        "prefix_caching": True, "chunked_prefill": True,
    }  # fmt: skip
    return WatchedScheduler(**{**usual, **changes})


def add(w: WatchedScheduler, id: int, prompt: list[int], max_tokens: int = 8, **fields: Any) -> Sequence:
    return w.add(id=id, token_ids=prompt, prompt_length=len(prompt), max_tokens=max_tokens, **fields)


def step(w: WatchedScheduler, *tokens: int) -> Plan:
    """Plan and commit, each sequence getting `tokens` (7 if none are given)."""
    plan = w.plan()
    w.commit([tokens or (7,)])
    w.check()
    return plan


def cuts(chunks: tuple[Chunk, ...]) -> list[tuple[int, int, int]]:
    """(sequence, first position, number of tokens) of each chunk."""
    return [(chunk.sequence, chunk.start, len(chunk.token_ids)) for chunk in chunks]


def ids(chunks: tuple[Chunk, ...]) -> list[int]:
    return [chunk.sequence for chunk in chunks]


# ---- steps and budgets ----


def test_prompt_runs_then_decodes() -> None:
    w = watched()
    sequence = add(w, 1, [1, 2, 3, 4, 5])

    first, second = step(w, 8), step(w, 9)

    assert cuts(first.chunks) == [(1, 0, 5)]
    assert first.chunks[0].num_outputs == 1
    assert second.decodes == (Chunk(1, (8,), 5, sequence.table, 5, 1),)
    assert sequence.token_ids == [1, 2, 3, 4, 5, 8, 9]
    assert (first.step, second.step) == (0, 1)


def test_no_work_gives_empty_plan() -> None:
    w = watched()

    plan = w.scheduler.plan()

    assert plan.is_empty
    assert w.scheduler.plan().is_empty  # an empty plan needs no commit


def test_long_prompt_is_cut_by_budget() -> None:
    w = watched(max_prefill_tokens=6)
    add(w, 1, list(range(14)))

    plans = [step(w) for _ in range(3)]

    assert [cuts(plan.chunks) for plan in plans] == [[(1, 0, 6)], [(1, 6, 6)], [(1, 12, 2)]]
    assert [plan.chunks[0].num_outputs for plan in plans] == [0, 0, 1]


def test_decoding_shrinks_the_budget() -> None:
    w = watched(max_prefill_tokens=20, prefill_chunk_tokens=3)
    add(w, 1, [1])
    step(w)
    add(w, 2, list(range(10)))

    plan = step(w)

    assert ids(plan.decodes) == [1]
    assert cuts(plan.chunks) == [(2, 0, 3)]


def test_max_prefill_bounds_the_chunk() -> None:
    w = watched(max_prefill_tokens=4, prefill_chunk_tokens=50)
    add(w, 1, [1])
    step(w)
    add(w, 2, list(range(10)))

    assert cuts(step(w).chunks) == [(2, 0, 4)]


def test_chunk_may_be_set_before_each_plan() -> None:
    w = watched()
    add(w, 1, [1])
    step(w)
    add(w, 2, list(range(10)))

    w.set_chunk(3)
    first = w.plan()
    w.set_chunk(5)
    second = w.plan_ahead()

    assert [cuts(plan.chunks) for plan in (first, second)] == [[(2, 0, 3)], [(2, 3, 5)]]


def test_decoding_ones_are_counted_before_they_are_planned() -> None:
    """Neither who still has a prompt to run nor whose last token is on its way."""
    w = watched(prefill_chunk_tokens=2)
    add(w, 1, [1], max_tokens=9)
    add(w, 2, [2], max_tokens=2)
    step(w)
    add(w, 3, [3, 4, 5])

    before = w.scheduler.num_decoding
    w.plan()

    assert (before, w.scheduler.num_decoding) == (2, 1)


def test_budget_goes_first_come_first() -> None:
    w = watched(max_prefill_tokens=10)
    for id in (1, 2, 3):
        add(w, id, [id] * 6)

    assert cuts(step(w).chunks) == [(1, 0, 6), (2, 0, 4)]
    assert w.scheduler.num_waiting == 1


def test_uncut_prompt_runs_over_budget() -> None:
    w = watched(max_prefill_tokens=5, chunked_prefill=False)
    add(w, 1, [1] * 12)
    add(w, 2, [2] * 12)

    assert cuts(step(w).chunks) == [(1, 0, 12)]
    assert cuts(step(w).chunks) == [(2, 0, 12)]


def test_uncut_prompts_share_the_budget() -> None:
    w = watched(max_prefill_tokens=10, chunked_prefill=False)
    for id in (1, 2, 3):
        add(w, id, [id] * 4)

    assert cuts(step(w).chunks) == [(1, 0, 4), (2, 0, 4)]


def test_nobody_passes_who_lacks_blocks() -> None:
    w = watched(num_blocks=6)
    add(w, 1, [1] * 12, 4)
    step(w)
    add(w, 2, [2] * 12, 4)
    add(w, 3, [3], 1)

    assert ids(step(w).rows) == [1]
    assert w.scheduler.num_waiting == 2


def test_batch_size_bounds_running() -> None:
    w = watched(max_batch_size=2)
    for id in (1, 2, 3):
        add(w, id, [id], max_tokens=2)

    first = step(w)
    step(w)  # ends both
    third = step(w)

    assert ids(first.chunks) == [1, 2]
    assert ids(third.chunks) == [3]


def test_adapter_reaches_the_chunk() -> None:
    w = watched()
    add(w, 1, [1, 2], adapter=3)

    assert [chunk.adapter for chunk in step(w).rows + step(w).rows] == [3, 3]


# ---- ends ----


def test_stop_id_ends_with_eos() -> None:
    w = watched()
    sequence = add(w, 1, [1, 2], stop_ids=frozenset({9}))
    w.plan()

    assert w.commit([(9,)]) == [Finished(1, "eos_token", 1)]
    assert sequence.token_ids == [1, 2, 9]
    assert not w.scheduler.has_work


def test_max_tokens_end_with_length() -> None:
    w = watched()
    add(w, 1, [1, 2], max_tokens=2)
    step(w)
    w.plan()

    assert w.commit([(5,)]) == [Finished(1, "length", 1)]


def test_min_tokens_hold_stop_back() -> None:
    w = watched()
    sequence = add(w, 1, [1, 2], stop_ids=frozenset({9}), min_tokens=3)

    step(w, 9)
    step(w, 9)
    w.plan()

    assert w.commit([(9,)]) == [Finished(1, "eos_token", 1)]
    assert sequence.num_generated == 3


def test_tokens_behind_the_end_are_cut() -> None:
    w = watched()
    sequence = add(w, 1, [1, 2], stop_ids=frozenset({9}))
    w.plan()

    assert w.commit([(4, 9, 5, 9)]) == [Finished(1, "eos_token", 2)]
    assert sequence.token_ids == [1, 2, 4, 9]


def test_several_tokens_continue_as_chunk() -> None:
    w = watched()
    sequence = add(w, 1, [1, 2])
    step(w, 4, 5, 6)

    plan = step(w, 7)

    assert cuts(plan.chunks) == [(1, 2, 3)]
    assert plan.chunks[0].num_outputs == 1
    assert sequence.token_ids == [1, 2, 4, 5, 6, 7]


def test_several_tokens_wait_for_budget() -> None:
    w = watched(max_prefill_tokens=3)
    for id in (1, 2):
        add(w, id, [id])
    step(w, 4, 5, 6)

    assert cuts(step(w).chunks) == [(1, 1, 3)]
    assert cuts(step(w).chunks) == [(2, 1, 3)]


def test_finished_sequence_gives_blocks_back() -> None:
    w = watched(prefix_caching=False)
    add(w, 1, [1] * 9, max_tokens=1)
    w.plan()

    w.commit([(5,)])

    assert w.scheduler.pool.num_used == 0


# ---- promises between engine and scheduler ----


def test_second_plan_is_refused() -> None:
    w = watched()
    add(w, 1, [1])
    w.plan()

    with pytest.raises(AssertionError, match="step 0 is in flight"):
        w.scheduler.plan()


@pytest.mark.parametrize("verb", ["commit", "drop"])
def test_plan_is_settled_only_once(verb: str) -> None:
    w = watched()
    add(w, 1, [1])
    plan = step(w)

    with pytest.raises(AssertionError, match="step 0 is not in flight"):
        w.scheduler.drop(plan) if verb == "drop" else w.scheduler.commit(plan, {1: [2]})


@pytest.mark.parametrize("tokens", [{}, {1: []}])
def test_missing_token_changes_nothing(tokens: dict[int, list[int]]) -> None:
    w = watched()
    sequence = add(w, 1, [1, 2])
    plan = w.plan()

    with pytest.raises(AssertionError, match="sequence 1 must get at least one token"):
        w.scheduler.commit(plan, tokens)

    w.commit([(5,)])
    assert sequence.token_ids == [1, 2, 5]


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": [], "prompt_length": 0, "max_tokens": 4},
        {"token_ids": [1], "prompt_length": 1, "max_tokens": 0},
        {"token_ids": [1] * 5, "prompt_length": 5, "max_tokens": 5},
        {"token_ids": [1, 2, 3], "prompt_length": 1, "max_tokens": 2},
    ],
)
def test_impossible_sequence_is_refused(fields: dict[str, Any]) -> None:
    scheduler = watched(num_blocks=2).scheduler

    with pytest.raises(AssertionError, match="sequence 1: prompt_length="):
        scheduler.add(Sequence(id=1, **fields))

    assert not scheduler.has_work


def test_known_id_is_refused() -> None:
    w = watched()
    add(w, 1, [1])

    with pytest.raises(AssertionError, match="sequence 1 was added already"):
        w.scheduler.add(Sequence(id=1, token_ids=[1], prompt_length=1, max_tokens=1))


def test_fits_counts_the_whole_pool() -> None:
    scheduler = watched(num_blocks=2).scheduler

    assert scheduler.fits(8)
    assert not scheduler.fits(9)


def test_sequence_filling_the_pool_ends() -> None:
    w = watched(num_blocks=2)
    sequence = add(w, 1, [1] * 4, max_tokens=5)

    w.drain()

    assert len(sequence.token_ids) == 9
    assert w.scheduler.preemptions == 0


# ---- preemption ----


def crowded(**changes: Any) -> tuple[WatchedScheduler, Sequence, Sequence]:
    """Two sequences that fill a pool of 4 blocks of 4 after a few steps: 3 + 3 tokens, growing together."""
    w = watched(num_blocks=4, **changes)
    old, young = add(w, 1, [1] * 3, 10), add(w, 2, [2] * 3, 10)
    for _ in range(6):
        step(w)
    assert (len(old.token_ids), len(young.token_ids)) == (9, 9)
    return w, old, young


def test_youngest_is_preempted_for_oldest() -> None:
    w, old, young = crowded()

    plan = step(w)

    assert ids(plan.rows) == [1]
    assert (old.state, young.state) == ("running", "waiting")
    assert w.scheduler.preemptions == 1


def test_youngest_in_need_preempts_itself() -> None:
    w = watched(num_blocks=4)
    add(w, 1, [1] * 2, 8)
    young = add(w, 2, [2] * 4, 8)
    for _ in range(4):
        step(w)
    assert w.scheduler.num_running == 2

    plans = [step(w) for _ in range(2)]

    assert ids(plans[0].decodes) == [1, 2]
    assert ids(plans[1].decodes) == [1]
    assert young.state == "waiting"


def test_preempted_sequence_keeps_its_text() -> None:
    w, _, young = crowded()
    text = list(young.token_ids)
    step(w)
    assert young.token_ids == text

    w.drain()

    assert young.token_ids == [2] * 3 + [7] * 10


def test_recomputation_counts_as_prefill() -> None:
    w, old, young = crowded(prefix_caching=False, prefill_chunk_tokens=2, max_prefill_tokens=6)
    step(w)
    w.finish(old.id)

    plans = [step(w), step(w)]

    assert [cuts(plan.chunks) for plan in plans] == [[(2, 0, 6)], [(2, 6, 3)]]
    assert [plan.chunks[0].num_outputs for plan in plans] == [0, 1]
    assert [plan.chunks[0].prompt_length for plan in plans] == [3, 3]
    assert young.num_generated == 7


def test_preempted_returns_through_the_cache() -> None:
    w, old, young = crowded()
    step(w)
    w.finish(old.id)

    plan = step(w)

    assert cuts(plan.chunks) == [(2, 4, 5)]  # the end of what it had went to the older one
    assert young.num_generated == 7


def test_preempted_waits_before_later_ones() -> None:
    w, _, young = crowded()
    add(w, 3, [3], 2)
    step(w)

    w.finish(1)
    plan = step(w)

    assert ids(plan.chunks) == [young.id]
    assert w.scheduler.num_waiting == 1


def test_victim_is_not_admitted_at_once() -> None:
    w, _, _ = crowded()

    assert step(w).chunks == ()


def test_admission_spares_a_block_each() -> None:
    w = watched(num_blocks=3)
    add(w, 1, [1] * 4)
    add(w, 2, [2] * 8, max_tokens=4)

    first = step(w)

    assert ids(first.chunks) == [1]
    assert w.scheduler.num_waiting == 1


# ---- prefix cache ----


def test_cached_prompt_is_not_recomputed() -> None:
    w = watched()
    prompt = list(range(10))
    add(w, 1, prompt)
    first = step(w)
    add(w, 2, prompt)

    second = step(w)

    assert cuts(second.chunks) == [(2, 8, 2)]
    assert second.chunks[0].table[:2] == first.chunks[0].table[:2]
    assert (w.scheduler.prefix_query_tokens, w.scheduler.prefix_hit_tokens) == (20, 8)


def test_last_block_is_computed_anew() -> None:
    w = watched()
    prompt = list(range(8))
    add(w, 1, prompt)
    first = step(w)
    add(w, 2, prompt)

    second = step(w)

    assert cuts(second.chunks) == [(2, 4, 4)]
    assert second.chunks[0].table[1] != first.chunks[0].table[1]


def test_same_step_prompts_share_nothing() -> None:
    w = watched()
    for id in (1, 2):
        add(w, id, list(range(10)))

    plan = step(w)

    assert cuts(plan.chunks) == [(1, 0, 10), (2, 0, 10)]
    assert not set(plan.chunks[0].table) & set(plan.chunks[1].table)


def test_blocks_are_found_after_commit() -> None:
    w = watched(max_prefill_tokens=8)
    prompt = list(range(12))
    add(w, 1, prompt)
    step(w)
    w.finish(1)  # 8 of its 12 tokens are computed
    add(w, 2, prompt)

    assert cuts(step(w).chunks) == [(2, 8, 4)]


def test_generated_blocks_are_found_too() -> None:
    w = watched()
    first = add(w, 1, [1, 2, 3], max_tokens=7)
    w.drain()
    add(w, 2, [*first.token_ids, 5])

    assert cuts(step(w).chunks) == [(2, 8, 3)]


@pytest.mark.parametrize("fields", [{"salt": "other"}, {"adapter": 0}])
def test_other_salt_finds_nothing(fields: dict[str, Any]) -> None:
    w = watched()
    add(w, 1, list(range(10)))
    step(w)
    add(w, 2, list(range(10)), **fields)

    assert cuts(step(w).chunks) == [(2, 0, 10)]


def test_switched_off_cache_finds_nothing() -> None:
    w = watched(prefix_caching=False)
    add(w, 1, list(range(10)))
    step(w)
    add(w, 2, list(range(10)))

    assert cuts(step(w).chunks) == [(2, 0, 10)]
    assert (w.scheduler.prefix_query_tokens, w.scheduler.pool.num_idle) == (0, 0)


def test_cached_prompt_spares_the_budget() -> None:
    w = watched(max_prefill_tokens=12, prefill_chunk_tokens=4)
    add(w, 1, list(range(11)))
    step(w)
    add(w, 2, list(range(11)))
    add(w, 3, [3])

    assert cuts(step(w).chunks) == [(2, 8, 3), (3, 0, 1)]


# ---- prompt logits ----


def test_prompt_logits_ask_each_row() -> None:
    w = watched(max_prefill_tokens=6)
    add(w, 1, list(range(10)), wants_prompt_logits=True)

    chunks = [step(w).chunks[0] for _ in range(2)]

    assert [(chunk.start, chunk.num_outputs) for chunk in chunks] == [(0, 6), (6, 4)]
    assert [wants_token(chunk) for chunk in chunks] == [False, True]
    assert step(w).decodes[0].num_outputs == 1


@pytest.mark.parametrize("chunked_prefill", [True, False])
def test_prompt_logits_of_a_step_are_bounded(chunked_prefill: bool) -> None:
    w = watched(max_prompt_rows=4, chunked_prefill=chunked_prefill)
    add(w, 1, list(range(10)), wants_prompt_logits=True)

    plans = [step(w) for _ in range(3)]

    assert [[chunk.num_outputs for chunk in plan.chunks] for plan in plans] == [[4], [4], [2]]


def test_prompt_logits_of_several_share_the_bound() -> None:
    w = watched(max_prompt_rows=6)
    for id in (1, 2):
        add(w, id, [id] * 5, wants_prompt_logits=True)
    add(w, 3, [3] * 9)

    assert cuts(step(w).chunks) == [(1, 0, 5), (2, 0, 1), (3, 0, 9)]


def test_prompt_logits_use_no_cache() -> None:
    w = watched()
    add(w, 1, list(range(10)))
    step(w)
    add(w, 2, list(range(10)), wants_prompt_logits=True)

    assert cuts(step(w).chunks) == [(2, 0, 10)]
    assert w.scheduler.prefix_query_tokens == 10


def test_prompt_logits_publish_their_blocks() -> None:
    w = watched()
    add(w, 1, list(range(10)), wants_prompt_logits=True)
    step(w)
    add(w, 2, list(range(10)))

    assert cuts(step(w).chunks) == [(2, 8, 2)]


def test_delivered_rows_are_asked_once() -> None:
    w = watched(num_blocks=5, prefix_caching=False)
    add(w, 1, [1] * 3, 10)
    step(w)
    young = add(w, 2, [2] * 4, 8, wants_prompt_logits=True)
    step(w)
    while young.state == "running":
        step(w)
    w.finish(1)

    chunk = step(w).chunks[0]

    assert (chunk.sequence, chunk.start, chunk.num_outputs) == (2, 0, 1)
    assert len(chunk.token_ids) > chunk.prompt_length


def test_half_delivered_rows_go_on() -> None:
    w = watched(num_blocks=5, max_prefill_tokens=12, prefill_chunk_tokens=1)
    add(w, 1, [1] * 3, 10)
    step(w)
    young = add(w, 2, [2] * 12, 2, wants_prompt_logits=True)
    step(w)
    while young.state == "running":
        step(w)
    num_delivered = young.num_prompt_rows
    assert 4 < num_delivered < 8
    w.finish(1)

    chunk = step(w).chunks[0]

    assert (chunk.sequence, chunk.start, chunk.num_outputs) == (2, 4, 12 - num_delivered)


# ---- leaders ----


def test_sibling_waits_for_its_leader() -> None:
    w = watched(max_prefill_tokens=6)
    prompt = list(range(9))
    add(w, 1, prompt)
    add(w, 2, prompt, leader=1)

    plans = [step(w) for _ in range(3)]

    assert [cuts(plan.chunks) for plan in plans] == [[(1, 0, 6)], [(1, 6, 3)], [(2, 8, 1)]]


def test_others_pass_a_waiting_sibling() -> None:
    w = watched()
    add(w, 1, list(range(9)))
    add(w, 2, list(range(9)), leader=1)
    add(w, 3, [3])

    assert ids(step(w).chunks) == [1, 3]
    assert ids(step(w).chunks) == [2]


def test_sibling_goes_when_leader_gone() -> None:
    w = watched(max_prefill_tokens=6)
    add(w, 1, list(range(9)))
    add(w, 2, list(range(9)), leader=1)
    step(w)

    w.finish(1)

    assert cuts(step(w).chunks) == [(2, 4, 5)]


@pytest.mark.parametrize(
    ("prompt", "changes", "fields"),
    [
        (list(range(9)), {"prefix_caching": False}, {}),
        (list(range(9)), {}, {"wants_prompt_logits": True}),
        ([1, 2, 3, 4], {}, {}),  # no full block to share: the last token is always computed
    ],
)
def test_sibling_without_gain_does_not_wait(prompt: list[int], changes: dict[str, Any], fields: dict[str, Any]) -> None:
    w = watched(**changes)
    add(w, 1, prompt)
    add(w, 2, prompt, leader=1, **fields)

    assert ids(step(w).chunks) == [1, 2]


def test_unknown_leader_is_no_leader() -> None:
    w = watched()
    add(w, 1, list(range(9)), leader=2)
    add(w, 2, list(range(9)), leader=1)

    assert ids(step(w).chunks) == [1]
    w.drain()


# ---- failed forwards, clients that leave ----


def test_dropped_plan_is_planned_again() -> None:
    w = watched(max_prefill_tokens=9)
    add(w, 1, [1] * 4)
    step(w)
    add(w, 2, [2] * 12)
    plan = w.plan()

    w.drop(5)
    w.check()

    assert w.plan() == plan
    assert (w.scheduler.num_steps, w.scheduler.prefix_query_tokens) == (1, 4)


def test_dropped_growth_gets_same_blocks() -> None:
    w = watched()
    for id in (1, 2, 3):
        add(w, id, [id] * 4)
    step(w)
    plan = w.plan()  # each decodes into a new block

    w.drop(3)

    assert w.plan() == plan


def test_drop_undoes_the_admission() -> None:
    w = watched()
    sequence = add(w, 1, list(range(9)))
    w.plan()

    w.drop(9)

    assert (sequence.state, sequence.table) == ("waiting", ())
    assert w.scheduler.pool.num_available == 32


def test_dropped_prompt_is_not_found() -> None:
    w = watched()
    add(w, 1, list(range(9)))
    w.plan()
    w.drop(9)
    w.finish(1)
    add(w, 2, list(range(9)))

    assert cuts(step(w).chunks) == [(2, 0, 9)]


def test_drop_leaves_the_victim_waiting() -> None:
    w, old, young = crowded()
    text = list(young.token_ids)
    w.plan()

    w.drop(1)
    w.check()

    assert (old.state, young.state) == ("running", "waiting")
    assert young.token_ids == text
    assert w.scheduler.preemptions == 1


@pytest.mark.parametrize("verb", ["commit", "drop"])
def test_leaving_in_flight_frees_blocks(verb: str) -> None:
    w = watched(prefix_caching=False)
    stays, leaves = add(w, 1, [1] * 5), add(w, 2, [2] * 5)
    w.plan()

    w.finish(leaves.id)
    w.drop(10) if verb == "drop" else w.commit([(5,)])
    w.check()

    assert leaves.token_ids == [2] * 5
    assert w.scheduler.pool.num_used == len(stays.table)


def test_id_is_free_after_leaving() -> None:
    w = watched()
    add(w, 1, [1] * 5)
    w.plan()
    w.finish(1)
    second = add(w, 1, [2] * 5)

    w.commit([(5,)])

    assert second.token_ids == [2] * 5
    assert ids(step(w).chunks) == [1]


def test_unknown_id_is_ignored() -> None:
    w = watched()

    w.scheduler.finish(3)

    with pytest.raises(KeyError):
        w.scheduler.sequence(3)


def test_sequence_is_found_by_id() -> None:
    w = watched()
    sequence = add(w, 1, [1])

    assert w.scheduler.sequence(1) is sequence


def test_reset_forgets_everything() -> None:
    w = watched(max_batch_size=1)
    for id in (1, 2):
        add(w, id, list(range(9)))
    step(w)
    plan = w.scheduler.plan()
    scheduler = w.scheduler

    scheduler.reset()

    assert not scheduler.has_work
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.pool.num_used, scheduler.pool.num_idle) == (0, 0, 0, 0)
    with pytest.raises(AssertionError, match="not in flight"):
        scheduler.commit(plan, {})
    scheduler.add(Sequence(id=1, token_ids=list(range(9)), prompt_length=9, max_tokens=1))
    assert cuts(scheduler.plan().chunks) == [(1, 0, 9)]


# ---- sliding window ----


def test_blocks_that_fell_out_of_the_window_are_given_back() -> None:
    w = watched(window=6)
    sequence = add(w, 1, list(range(14)), max_tokens=30)

    step(w)
    after_prompt = sequence.table
    for _ in range(28):
        step(w)

    assert after_prompt[:2] == (-1, -1)  # the token at 14 sees 9 to 14: blocks 0 and 1 end before
    assert sequence.table[:9] == (-1,) * 9
    assert w.scheduler.pool.num_used == 2


def test_passed_blocks_can_still_be_found() -> None:
    w = watched(window=6)
    add(w, 1, list(range(14)), max_tokens=3)
    w.drain()
    again = add(w, 2, list(range(14)))

    plan = step(w)

    assert cuts(plan.chunks) == [(2, 12, 2)]
    assert again.table[:2] == (-1, -1)


# ---- encoders ----

TEXT = tuple(range(50, 60))  # three blocks


def test_encoder_runs_once_with_the_first_tokens() -> None:
    w = watched()
    sequence = add(w, 1, [0], encoder_ids=TEXT)

    first, second = step(w), step(w)

    assert first.encodes == (Encode(1, TEXT, sequence.cross_table),)
    assert not second.encodes
    assert {(c.cross_table, c.cross_length) for c in first.chunks + second.decodes} == {(sequence.cross_table, 10)}
    assert len(sequence.cross_table) == 3


def test_encoders_have_a_budget_of_their_own() -> None:
    w = watched(max_prefill_tokens=20)
    for id in range(3):
        add(w, id, [0] * 2, encoder_ids=tuple(range(10 * id, 10 * id + 10)))

    plans = step(w), step(w)

    assert [[encode.sequence for encode in plan.encodes] for plan in plans] == [[0, 1], [2]]


def test_encoder_over_budget_runs_first_of_its_step() -> None:
    w = watched(max_prefill_tokens=4)
    for id in (1, 2):
        add(w, id, [0], encoder_ids=(*TEXT, id))

    plans = step(w), step(w)

    assert [[encode.sequence for encode in plan.encodes] for plan in plans] == [[1], [2]]


def test_same_input_is_encoded_once() -> None:
    w = watched()
    add(w, 1, [0], encoder_ids=TEXT, max_tokens=1)
    step(w)
    add(w, 2, [0], encoder_ids=TEXT)
    add(w, 3, [0], encoder_ids=TEXT[:9])

    assert [encode.sequence for encode in step(w).encodes] == [3]


def test_siblings_share_their_encoders_keys() -> None:
    w = watched()
    leader, sibling = (add(w, id, [0], leader=leader, encoder_ids=TEXT) for id, leader in ((1, None), (2, 1)))

    plans = step(w), step(w)

    assert [len(plan.encodes) for plan in plans] == [1, 0]
    assert leader.cross_table == sibling.cross_table


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_tokens_are_found_only_behind_the_same_input(prefix_caching: bool) -> None:
    w = watched(prefix_caching=prefix_caching)
    prompt = list(range(9))
    for id, text in ((1, TEXT), (2, TEXT), (3, TEXT[::-1]), (4, ())):
        add(w, id, prompt, max_tokens=1, encoder_ids=text)
        step(w)

    assert [plan.chunks[0].start for plan in w.plans] == [0, 8 if prefix_caching else 0, 0, 0]


def test_preempted_sequence_is_encoded_again() -> None:
    w = watched(num_blocks=7, prefix_caching=False)
    add(w, 1, [1] * 8, max_tokens=9)
    young = add(w, 2, [0], encoder_ids=TEXT)
    step(w), step(w)
    while young.state == "running":
        step(w)

    w.finish(1)

    assert [encode.token_ids for encode in step(w).encodes] == [TEXT]


def test_dropped_encoder_is_not_found() -> None:
    w = watched()
    add(w, 1, [0], encoder_ids=TEXT)
    plan = w.plan()
    w.drop(10)

    assert w.plan() == plan


def test_encoder_must_fit_beside_the_text() -> None:
    scheduler = watched(num_blocks=4).scheduler

    assert (scheduler.fits(4, 12), scheduler.fits(5, 12)) == (True, False)
    with pytest.raises(AssertionError, match="beside the encoder's 12"):
        scheduler.add(Sequence(id=1, token_ids=[0], prompt_length=1, max_tokens=5, encoder_ids=(1,) * 12))


# ---- images ----


def image(name: str, num_tokens: int) -> Image:
    return Image(digest=name.encode(), num_tokens=num_tokens, shape=(), size=(1, 1), pixels=b"")


CAT, DOG = image("cat", 3), image("dog", 5)
PLACE = 9  # the token that stands where features do


def pictured(text: list[int], *images: tuple[int, Image]) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """The text with images in it, each so many of its tokens behind the one before."""
    prompt, placed = [], []
    rest = list(text)
    for num_before, each in images:
        prompt += rest[:num_before]
        rest = rest[num_before:]
        placed.append(PlacedImage(len(prompt), each))
        prompt += [PLACE] * each.num_tokens
    return prompt + rest, tuple(placed)


def add_pictured(w: WatchedScheduler, id: int, text: list[int], *images: tuple[int, Image], **fields: Any) -> Sequence:
    prompt, placed = pictured(text, *images)
    return add(w, id, prompt, images=placed, **fields)


def names(plan: Plan) -> list[bytes]:
    return [encode.image.digest for encode in plan.encodes if encode.image is not None]


def test_image_is_encoded_once_over_many_chunks() -> None:
    w = watched(max_prefill_tokens=2)
    add_pictured(w, 1, [1, 2, 3, 4], (3, DOG))

    plans = [step(w) for _ in range(6)]

    assert [names(plan) for plan in plans] == [[], [b"dog"], [], [], [], []]
    assert [plan.features for plan in plans] == [(), (), (b"dog",), (b"dog",), (), ()]
    assert plans[2].chunks[0].spans == (Span(4, b"dog", 1, 2),)


def test_prompts_share_an_image_of_one_step() -> None:
    w = watched()
    for id in (1, 2):
        add_pictured(w, id, [id, 2], (1, CAT))

    assert names(step(w)) == [b"cat"]


def test_chunk_ends_where_the_encoders_budget_does() -> None:
    w = watched(max_prefill_tokens=7)
    add_pictured(w, 1, [1, 2], (0, DOG), (0, CAT))

    first, second = step(w), step(w)

    assert (cuts(first.chunks), names(first)) == ([(1, 0, 5)], [b"dog"])
    assert (cuts(second.chunks), names(second)) == ([(1, 5, 5)], [b"cat"])


def test_uncut_prompt_has_all_its_images() -> None:
    w = watched(max_prefill_tokens=2, chunked_prefill=False)
    add_pictured(w, 1, [1, 2], (0, DOG), (0, CAT))

    assert names(step(w)) == [b"dog", b"cat"]


def test_prefix_is_found_only_with_the_same_image() -> None:
    w = watched()
    for id, each in ((1, CAT), (2, CAT), (3, image("dog", 3))):
        add_pictured(w, id, [1, 2, 3, 4, 5, 6], (1, each), max_tokens=1)
        step(w)

    assert [plan.chunks[0].start for plan in w.plans] == [0, 8, 0]
    assert [names(plan) for plan in w.plans] == [[b"cat"], [], [b"dog"]]


def test_cached_half_of_an_image_is_encoded_for_the_rest() -> None:
    w = watched()
    add_pictured(w, 1, [1, 2], (2, DOG), max_tokens=1)
    step(w)
    add(w, 2, [7], max_tokens=1)
    step(w)  # nobody needs the features any more
    add_pictured(w, 3, [1, 2], (2, DOG))

    plan = step(w)

    assert (cuts(plan.chunks), names(plan)) == ([(3, 4, 3)], [b"dog"])


def test_preempted_sequence_has_its_image_again() -> None:
    w = watched(num_blocks=5, prefix_caching=False)
    add(w, 1, [1] * 7, max_tokens=9)
    young = add_pictured(w, 2, [1, 2], (0, CAT))
    step(w)
    while young.state == "running":
        step(w)

    w.finish(1)

    assert names(step(w)) == [b"cat"]


def test_dropped_image_is_encoded_again() -> None:
    w = watched()
    add_pictured(w, 1, [1, 2], (0, CAT))
    plan = w.plan()
    w.drop(10)

    assert w.plan() == plan


# ---- any order of calls ----

PROMPTS = st.builds(
    lambda num_shared, tail: [*([0, 1, 2, 3] * 5)[:num_shared], *tail],
    st.integers(0, 18),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
)
CHOICES = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=4)


class AnyOrder(RuleBasedStateMachine):
    """Random adds, chunk sizes, plans, commits, drops and finishes; WatchedScheduler checks each. At the end all must end."""

    w: WatchedScheduler

    @initialize(
        num_blocks=st.integers(4, 12),
        block_size=st.sampled_from([2, 4]),
        max_batch_size=st.integers(1, 6),
        max_prefill_tokens=st.integers(1, 24),
        prefill_chunk_tokens=st.integers(1, 12),
        prefix_caching=st.sampled_from([True, True, True, False]),
        chunked_prefill=st.sampled_from([True, True, True, False]),
        max_prompt_rows=st.sampled_from([1, 5, 256]),
        window=st.sampled_from([0, 0, 1, 3, 7, 12]),
    )
    def start(self, **choices: Any) -> None:
        self.w = WatchedScheduler(**choices)

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 20),
        min_tokens=st.integers(0, 3),
        stop_ids=st.sampled_from([frozenset(), frozenset({4}), frozenset({4, 5})]),
        salt=st.sampled_from(["", "", "", "s"]),
        adapter=st.sampled_from([-1, -1, -1, 0]),
        wants_prompt_logits=st.sampled_from([False, False, True]),
        encoder_ids=st.sampled_from([(), (), (1,), (1, 2, 3, 4, 5), (5,) * 9]),
        images=st.sampled_from([(), (), ((0, CAT),), ((1, DOG), (0, CAT)), ((2, CAT), (0, CAT))]),
        num_siblings=st.sampled_from([0, 0, 2]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        num_siblings: int,
        encoder_ids: tuple[int, ...],
        images: tuple[tuple[int, Image], ...],
        **fields: Any,
    ) -> None:
        block_size = self.w.settings["block_size"]
        encoder_ids = () if images else encoder_ids  # no model has both
        encoder_ids = encoder_ids[: (self.w.settings["num_blocks"] - 1) * block_size]
        room = (self.w.settings["num_blocks"] + -len(encoder_ids) // block_size) * block_size
        prompt, placed = pictured(prompt, *images)
        prompt, placed = (prompt, placed) if len(prompt) <= room else (prompt[:room], ())
        max_tokens = min(max_tokens, room - len(prompt) + 1)
        leader = None
        for _ in range(1 + num_siblings):
            id = min(set(range(len(self.w.live) + 1)) - set(self.w.live))  # ids are used again as soon as possible
            add(self.w, id, prompt, max_tokens, leader=leader, encoder_ids=encoder_ids, images=placed, **fields)
            leader = id if leader is None else leader

    @rule(num_tokens=st.integers(1, 12))
    def set_chunk(self, num_tokens: int) -> None:
        self.w.set_chunk(num_tokens)

    @precondition(lambda self: self.w.live and self.w.flight is None)
    @rule()
    def plan(self) -> None:
        self.w.plan()

    @precondition(lambda self: len(self.w.flights) == 1)
    @rule()
    def plan_ahead(self) -> None:
        self.w.plan_ahead()

    @precondition(lambda self: self.w.flight is not None)
    @rule(choices=CHOICES)
    def commit(self, choices: list[list[int]]) -> None:
        self.w.commit(choices)

    @precondition(lambda self: self.w.live and self.w.flight is None)
    @rule(choices=CHOICES, num_steps=st.integers(1, 8))
    def run(self, choices: list[list[int]], num_steps: int) -> None:
        for _ in range(num_steps):
            if self.w.live:
                self.w.plan()
                self.w.commit(choices)
                self.w.check()

    @precondition(lambda self: self.w.live)
    @rule(choices=CHOICES, num_steps=st.integers(1, 8))
    def run_ahead(self, choices: list[list[int]], num_steps: int) -> None:
        """As an engine does whose steps overlap."""
        for _ in range(num_steps):
            if self.w.live and not self.w.flights:
                self.w.plan()
            if len(self.w.flights) == 1:
                self.w.plan_ahead()
            if self.w.flights:
                self.w.commit(choices)
            self.w.check()

    @precondition(lambda self: self.w.flight is not None)
    @rule(num_written=st.integers(0, 30))
    def drop(self, num_written: int) -> None:
        plan, is_repeatable = self.w.flight, self.w.is_repeatable
        self.w.drop(num_written)
        if is_repeatable:
            assert (self.w.plan_ahead() if self.w.flights else self.w.plan()) == plan

    @precondition(lambda self: self.w.live)
    @rule(pick=st.integers(0, 50))
    def finish(self, pick: int) -> None:
        self.w.finish(sorted(self.w.live)[pick % len(self.w.live)])

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "w"):
            self.w.check()

    def teardown(self) -> None:
        if hasattr(self, "w"):
            self.w.drain()
            assert self.w.scheduler.pool.num_used == 0
            assert self.w.ends == dict.fromkeys(range(self.w.num_added), 1)
            assert self.w.replay() == self.w.plans


# Without a clock: a busy machine is no reason to fail.
TIMELESS: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def test_any_order_keeps_promises() -> None:
    run_state_machine_as_test(AnyOrder, settings=settings(max_examples=120, stateful_step_count=40, derandomize=True, **TIMELESS))


@pytest.mark.soak
def test_any_order_keeps_promises_long() -> None:
    run_state_machine_as_test(AnyOrder, settings=settings(max_examples=2000, stateful_step_count=80, **TIMELESS))


def test_scheduler_needs_no_watcher() -> None:
    """The bare verbs, as the engine calls them."""
    scheduler = Scheduler(
        num_blocks=4, block_size=16, max_batch_size=2, max_prefill_tokens=32, prefill_chunk_tokens=16, prefix_caching=True
    )
    scheduler.add(Sequence(id=7, token_ids=[1, 2, 3], prompt_length=3, max_tokens=2))

    ended = [scheduler.commit(scheduler.plan(), {7: [token]}) for token in (4, 5)]

    assert ended == [[], [Finished(7, "length", 1)]]
