"""The integers of a decode step in one place that does not move, where a recorded forward reads them: the step's header.

All of it is one block of memory, so that a device gets it by one copy. A step of fewer sequences than a recording's leaves rows of
padding: their key goes nowhere (slot -1) and they see none (key_length 0), so that they change nothing and give nothing of use.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import BLOCK_SIZE
from lmi_dist.kv_cache import KVCache
from lmi_dist.plan import Chunk

COLUMNS = ("ids", "positions", "rope_lengths", "slots", "key_lengths", "cross_lengths")
PADDING = (0, 0, 1, -1, 0, 0)


def is_decode(chunks: Sequence[Chunk]) -> bool:
    """Whether each has one token and wants its logits, and none has what a header has no place for."""
    return all(len(chunk.token_ids) == chunk.num_outputs == 1 and chunk.adapter < 0 and not chunk.spans for chunk in chunks)


class DecodeBatch:
    """The header of up to `max_size` sequences of up to `max_blocks` blocks; `has_cross`: their encoders' lie beside them."""

    def __init__(self, max_size: int, max_blocks: int, cache: KVCache, *, has_cross: bool) -> None:
        width = 2 * max_blocks if has_cross else max_blocks
        self._cache, self._has_cross, self._max_blocks = cache, has_cross, max_blocks
        self._memory = np.full(max_size * (len(COLUMNS) + width), -1, np.int32)
        self._columns = self._memory[: max_size * len(COLUMNS)].reshape(len(COLUMNS), max_size)
        self._tables = self._memory[max_size * len(COLUMNS) :].reshape(max_size, width)
        self._written: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())] * max_size  # what each row of tables holds
        self._counting = torch.arange(max_size + 1, dtype=torch.int32)

    def batch(self, size: int) -> ForwardBatch:
        """Its first `size` rows, as a forward reads them."""
        columns = dict(zip(COLUMNS, torch.from_numpy(self._columns[:, :size]), strict=True))
        tables = torch.from_numpy(self._tables[:size])
        lengths = columns.pop("cross_lengths")
        return ForwardBatch(
            **columns,
            starts=self._counting[: size + 1],
            tables=tables[:, : self._max_blocks],
            output_rows=self._counting[:size],
            cross_lengths=lengths if self._has_cross else None,
            cross_tables=tables[:, self._max_blocks :] if self._has_cross else None,
            cache=self._cache,
        )

    def fill(self, chunks: Sequence[Chunk], size: int) -> None:
        """Write a step's decodes, and padding up to `size` rows."""
        num = len(chunks)
        for row, chunk in enumerate(chunks):
            if self._written[row] != (chunk.table, chunk.cross_table):
                self._write_tables(row, chunk)
        self._columns[:, num:size] = np.array(PADDING)[:, None]
        values = [(chunk.token_ids[0], chunk.start, chunk.prompt_length, chunk.cross_length) for chunk in chunks]
        ids, positions, prompt_lengths, cross_lengths = np.array(values, np.int32).T
        blocks = self._tables[np.arange(num), positions // BLOCK_SIZE]
        lengths = positions + 1
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        self._columns[:, :num] = ids, positions, np.maximum(prompt_lengths, lengths), slots, lengths, cross_lengths

    def _write_tables(self, row: int, chunk: Chunk) -> None:
        for begin, table in ((0, chunk.table), (self._max_blocks, chunk.cross_table if self._has_cross else ())):
            self._tables[row, begin : begin + len(table)] = table
        self._written[row] = chunk.table, chunk.cross_table
