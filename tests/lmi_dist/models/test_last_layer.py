"""Behind the last layer only wanted rows count: it works out those alone, and of the other tokens their keys."""

from collections.abc import Callable

import driving
import pytest
import torch
from tiny_models import Settled
from tiny_variants import VARIANTS

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import BLOCK_SIZE
from lmi_dist.models.decoder import Decoder, DecoderLayer
from lmi_dist.plan import Chunk, Plan


def chunk(ids: tuple[int, ...], start: int, end: int, num_outputs: int) -> Chunk:
    return Chunk(0, ids[start:end], start, tuple(range(-(-end // BLOCK_SIZE))), len(ids), num_outputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_wanted_rows_have_the_bits_that_they_have_among_all(settled: Callable[[str], Settled], variant: str) -> None:
    """A prompt in one chunk, and in two of which the first wants nothing; then a token whose layers read all keys."""
    case = settled(variant)
    runner, ids = driving.make_runner(case.folder, dtype="bf16"), case.references[0].prompt
    every = driving.logits_at_every_position(runner, (*ids, 5)).clone()

    def last_rows(*chunks: Chunk) -> list[torch.Tensor]:
        return [runner.forward(Plan(step=0, chunks=(each,)))[-each.num_outputs :].clone() for each in chunks if each.num_outputs]

    (whole,) = last_rows(chunk(ids, 0, len(ids), 1))
    runner.forward(Plan(step=0, chunks=(chunk(ids, 0, 7, 0),)))
    cut, after = last_rows(chunk(ids, 7, len(ids), 2), chunk((*ids, 5), len(ids), len(ids) + 1, 1))

    assert torch.equal(whole, every[-2:-1])
    assert torch.equal(cut, every[-3:-1])
    assert torch.equal(after, every[-1:])


def test_last_layer_works_out_wanted_rows_alone(settled: Callable[[str], Settled], monkeypatch: pytest.MonkeyPatch) -> None:
    case = settled("llama2-gqa")
    runner, ids = driving.make_runner(case.folder, dtype="bf16"), case.references[0].prompt
    assert isinstance(runner.model, Decoder)
    rows: dict[DecoderLayer, list[int]] = {layer: [] for layer in runner.model.layers}
    call = type(runner.model.layers[0]).__call__

    def counted(self: DecoderLayer, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        rows[self].append(len(x))
        return call(self, x, batch)

    monkeypatch.setattr(type(runner.model.layers[0]), "__call__", counted)
    runner.forward(Plan(step=0, chunks=(chunk(ids, 0, 7, 0),)))
    runner.forward(Plan(step=0, chunks=(chunk(ids, 7, len(ids), 1),)))

    *inner, last = rows.values()
    assert inner == [[7, len(ids) - 7]] * len(inner)
    assert last == [1]
