"""A Plan becomes tensors: who stands where, which slot each key takes, which rows are wanted."""

from dataclasses import replace

import driving
import pytest
import torch

from lmi_dist.batch import ForwardBatch, build, build_encoder
from lmi_dist.kv_cache import KVCache
from lmi_dist.plan import Chunk, Encode, Plan

DECODE = Chunk(sequence=7, token_ids=(5,), start=20, table=(9, 3), prompt_length=4, num_outputs=1)
FIRST = Chunk(sequence=8, token_ids=(1, 2, 3), start=0, table=(4,), prompt_length=6, num_outputs=0)
LAST = Chunk(sequence=9, token_ids=(6, 7, 8, 9), start=15, table=(2, 5, 6), prompt_length=19, num_outputs=2)
PLAN = Plan(step=0, decodes=(DECODE,), chunks=(FIRST, LAST))


@pytest.fixture
def cache() -> KVCache:
    return driving.make_cache(10)


@pytest.fixture
def batch(cache: KVCache) -> ForwardBatch:
    return build(PLAN, cache)


def test_nobody_has_an_encoder(batch: ForwardBatch) -> None:
    assert (batch.cross_lengths, batch.cross_tables) == (None, None)


def test_encoders_keys_have_tables_and_lengths(cache: KVCache) -> None:
    chunks = (replace(DECODE, cross_table=(6, 5), cross_length=17), replace(FIRST, cross_table=(7,), cross_length=2))

    batch = build(Plan(step=0, chunks=chunks), cache)

    assert batch.cross_lengths.tolist() == [17, 2]
    assert batch.cross_tables.tolist() == [[6, 5], [7, -1]]
    assert batch.tables.tolist() == [[9, 3], [4, -1]]


def test_encoder_reads_whole_texts(cache: KVCache) -> None:
    batch = build_encoder([Encode(1, tuple(range(18)), (3, 0)), Encode(2, (7, 8), (5,))], cache)

    assert batch.ids.tolist() == [*range(18), 7, 8]
    assert batch.slots.tolist() == [*range(48, 64), 0, 1, 80, 81]
    assert (batch.starts.tolist(), batch.key_lengths.tolist(), batch.output_rows.tolist()) == ([0, 18, 20], [18, 2], [])


def test_tokens_follow_the_plans_order(batch: ForwardBatch) -> None:
    assert batch.ids.tolist() == [5, 1, 2, 3, 6, 7, 8, 9]
    assert batch.positions.tolist() == [20, 0, 1, 2, 15, 16, 17, 18]


def test_output_rows_make_a_step_of_their_own(batch: ForwardBatch) -> None:
    """A sequence without any keeps its place in it, with no token."""
    outputs = batch.outputs()

    assert batch.output_rows.tolist() == [0, 6, 7]
    assert outputs.slots.tolist() == [3 * 16 + 4, 5 * 16 + 1, 5 * 16 + 2]
    assert outputs.starts.tolist() == [0, 1, 1, 3]
    assert (outputs.key_lengths is batch.key_lengths, outputs.tables is batch.tables) == (True, True)


def test_step_of_output_rows_alone_has_no_other(cache: KVCache) -> None:
    assert build(Plan(step=0, decodes=(DECODE,)), cache).output_starts is None


def test_slot_is_block_and_place(batch: ForwardBatch) -> None:
    assert batch.slots.tolist() == [3 * 16 + 4, 64, 65, 66, 2 * 16 + 15, 5 * 16, 5 * 16 + 1, 5 * 16 + 2]


def test_lengths_count_keys_after_the_step(batch: ForwardBatch) -> None:
    assert batch.starts.tolist() == [0, 1, 4, 8]
    assert batch.key_lengths.tolist() == [21, 3, 19]


def test_tables_are_padded_to_the_longest(batch: ForwardBatch) -> None:
    assert batch.tables.tolist() == [[9, 3, -1], [4, -1, -1], [2, 5, 6]]


def test_rope_length_is_the_prompts_or_the_tokens(batch: ForwardBatch) -> None:
    assert batch.rope_lengths.tolist() == [21, 6, 6, 6, 19, 19, 19, 19]


def test_output_rows_are_the_last_of_their_chunk(batch: ForwardBatch) -> None:
    assert batch.output_rows.tolist() == [0, 6, 7]


def test_integers_are_int32(batch: ForwardBatch) -> None:
    names = ("ids", "positions", "rope_lengths", "slots", "starts", "key_lengths", "tables", "output_rows")

    assert {getattr(batch, name).dtype for name in names} == {torch.int32}


def test_adapters_are_left_out_when_nobody_has_one(batch: ForwardBatch) -> None:
    assert batch.adapters is None


def test_each_token_has_its_sequences_adapter(cache: KVCache) -> None:
    adapted = Chunk(sequence=1, token_ids=(1, 2), start=0, table=(0,), prompt_length=2, num_outputs=1, adapter=4)

    assert build(Plan(step=0, chunks=(adapted, FIRST)), cache).adapters.tolist() == [4, 4, -1, -1, -1]  # type: ignore[union-attr]


def test_nobody_may_want_logits(cache: KVCache) -> None:
    assert build(Plan(step=0, chunks=(FIRST,)), cache).output_rows.tolist() == []
