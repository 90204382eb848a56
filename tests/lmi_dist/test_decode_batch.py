"""A decode step's header holds what the plain batch of the same chunks holds, and inert rows behind it."""

from dataclasses import replace

import driving
import pytest
import torch

from lmi_dist.batch import Chosen, ForwardBatch, build
from lmi_dist.decode_batch import DecodeBatch, is_decode
from lmi_dist.plan import PENDING, Chunk, Plan, Span

CACHE = driving.make_cache()
FIELDS = ("ids", "positions", "slots", "starts", "key_lengths", "output_rows", "cross_lengths")


def decode(position: int, table: tuple[int, ...], **values: object) -> Chunk:
    return Chunk(0, (position + 100,), position, table, **{"prompt_length": 1, "num_outputs": 1, **values})  # type: ignore[arg-type]


def header(*chunks: Chunk, size: int = 0, has_cross: bool = False, first: tuple[Chunk, ...] = ()) -> ForwardBatch:
    own = DecodeBatch(4, 3, CACHE, has_cross=has_cross)
    if first:
        own.fill(first, len(first))
    own.fill(chunks, size or len(chunks))
    return own.batch(size or len(chunks))


def assert_same(batch: ForwardBatch, chunks: tuple[Chunk, ...]) -> None:
    plain = build(Plan(0, chunks), CACHE)
    for name in FIELDS:
        ours, theirs = getattr(batch, name), getattr(plain, name)
        assert ours is theirs is None or (ours.dtype, ours.tolist()) == (torch.int32, theirs.tolist()), name
    for ours, theirs in ((batch.tables, plain.tables), (batch.cross_tables, plain.cross_tables)):
        assert ours is theirs is None or torch.equal(ours[:, : theirs.shape[1]][theirs >= 0], theirs[theirs >= 0])


CHUNKS = (decode(17, (5, 3)), decode(0, (0,)), decode(47, (-1, 7, 2)))
CROSS = tuple(decode(i, (i,), cross_table=(3, 4 + i), cross_length=17 + i) for i in range(3))


def test_header_holds_what_the_batch_does() -> None:
    assert_same(header(*CHUNKS), CHUNKS)


def test_header_holds_the_encoders_keys() -> None:
    assert_same(header(*CROSS, has_cross=True), CROSS)


def test_row_takes_over_from_another_sequence() -> None:
    assert_same(header(*CHUNKS[::-1], first=CHUNKS), CHUNKS[::-1])
    assert_same(header(*CROSS[::-1], first=CROSS, has_cross=True), CROSS[::-1])


def test_pending_tokens_come_from_where_they_were_chosen() -> None:
    """In the header and in the plain batch, beside tokens that are known and in whatever order they were chosen."""
    chunks = tuple(replace(chunk, sequence=i) for i, chunk in enumerate(CHUNKS))
    pending = (replace(chunks[0], token_ids=(PENDING,)), chunks[1], replace(chunks[2], token_ids=(PENDING,)))
    chosen = Chosen(torch.tensor([7, 8, 9], dtype=torch.int32), {2: 0, 5: 1, 0: 2})
    prompt = Chunk(9, (1, 2, 3), 0, (4,), 3, 1)
    own = DecodeBatch(4, 3, CACHE, has_cross=False)

    own.fill(pending, 4, chosen)

    assert own.batch(4).ids.tolist() == [9, 100, 7, 0]
    assert build(Plan(0, pending, (prompt,)), CACHE, None, chosen).ids.tolist() == [9, 100, 7, 1, 2, 3]
    assert build(Plan(0, chunks), CACHE, None, chosen).ids.tolist() == [117, 100, 147]


def test_padding_writes_no_key_and_sees_none() -> None:
    batch = header(*CHUNKS[:1], size=4, first=CHUNKS)

    assert batch.slots.tolist() == [3 * 16 + 1, -1, -1, -1]
    assert batch.key_lengths.tolist() == [18, 0, 0, 0]
    assert batch.positions.tolist() == [17, 0, 0, 0]
    assert batch.ids.tolist() == [117, 0, 0, 0]


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (decode(3, (0,)), True),
        (decode(3, (0,), prompt_length=4), True),
        (decode(3, (0,), prompt_length=5), False),
        (decode(3, (0,), num_outputs=0), False),
        (decode(3, (0,), adapter=1), False),
        (decode(3, (0,), spans=(Span(3, b"", 0, 1),)), False),
        (Chunk(0, (1, 2), 0, (0,), 2, 2), False),
        (Chunk(0, (1, 2), 0, (0,), 2, 1), False),
    ],
)
def test_only_single_last_tokens_with_logits_are_decodes(chunk: Chunk, expected: bool) -> None:
    assert is_decode((CHUNKS[0], chunk)) is expected
