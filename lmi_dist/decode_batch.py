"""The integers of a decode step in one place that does not move, where a recorded forward reads them: the step's header.

All of it is one block of memory, so that a device gets it by one copy. A step of fewer sequences than a recording's leaves rows of
padding: their key goes nowhere (slot -1) and they see none (key_length 0), so that they change nothing and give nothing of use.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lmi_dist import ops
from lmi_dist.batch import Chosen, ForwardBatch
from lmi_dist.config import BLOCK_SIZE, EngineConfig
from lmi_dist.device import Device
from lmi_dist.kv_cache import KVCache
from lmi_dist.plan import Chunk
from lmi_dist.staging import pinned

MAX_SEQUENCES = 64  # in a recorded step on a CPU: a larger one takes so long that Python's part is small

COLUMNS = ("ids", "positions", "slots", "key_lengths", "cross_lengths", "sources")
PADDING = (0, 0, -1, 0, 0, 0)


def recorded_sizes(config: EngineConfig, device: Device) -> Sequence[int]:
    """Numbers of sequences whose decode steps are recorded on this device with the column in use, ascending; none if all steps run
    from Python."""
    chosen = ops.chosen()
    if config.enforce_eager or chosen.name == "torch":  # which has no calls to record
        return ()
    if device.type == "cpu":
        if chosen.takes_torchs_product:  # which only a CUDA graph records
            return ()
        return range(1, min(config.max_batch_size, MAX_SEQUENCES) + 1)
    return config.graph_sizes


def is_decode(chunks: Sequence[Chunk]) -> bool:
    """Whether each has one token, the prompt's last or a later one, with logits, and nothing that a header has no place for."""
    return all(
        len(chunk.token_ids) == chunk.num_outputs == 1
        and chunk.start + 1 >= chunk.prompt_length
        and chunk.adapter < 0
        and not chunk.spans
        for chunk in chunks
    )


class DecodeBatch:
    """The header of up to `max_size` sequences of up to `max_blocks` blocks; `has_cross`: their encoders' lie beside them."""

    def __init__(self, max_size: int, max_blocks: int, cache: KVCache, *, has_cross: bool) -> None:
        width = 2 * max_blocks if has_cross else max_blocks
        self._cache, self._has_cross, self._max_blocks = cache, has_cross, max_blocks
        self._here = torch.full((max_size * (len(COLUMNS) + width),), -1, dtype=torch.int32)
        self._there = self._here.to(cache.device)  # itself on a CPU
        self._num_columns, self._shape = max_size * len(COLUMNS), (max_size, width)
        self._columns, self._tables = (part.numpy() for part in self._parts(self._here))
        self._written: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())] * max_size  # what each row of tables holds
        self._counting = torch.arange(max_size + 1, dtype=torch.int32, device=cache.device)

    def _parts(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns, a row each, and the tables, a row a sequence."""
        columns, tables = memory[: self._num_columns], memory[self._num_columns :]
        return columns.view(len(COLUMNS), -1), tables.view(self._shape)

    def batch(self, size: int) -> ForwardBatch:
        """Its first `size` rows, as a forward reads them."""
        parts = self._parts(self._there)
        columns, tables = dict(zip(COLUMNS, parts[0][:, :size], strict=True)), parts[1][:size]
        lengths = columns.pop("cross_lengths")
        del columns["sources"]
        return ForwardBatch(
            **columns,
            starts=self._counting[: size + 1],
            tables=tables[:, : self._max_blocks],
            output_rows=self._counting[:size],
            cross_lengths=lengths if self._has_cross else None,
            cross_tables=tables[:, self._max_blocks :] if self._has_cross else None,
            cache=self._cache,
        )

    def fill(self, chunks: Sequence[Chunk], size: int, chosen: Chosen | None = None) -> None:
        """Write a step's decodes, and padding up to `size` rows. `chosen`: where its PENDING tokens are. A device gets all of it in
        its stream's order, behind the steps before; the next may be written at once."""
        num = len(chunks)
        for row, chunk in enumerate(chunks):
            if self._written[row] != (chunk.table, chunk.cross_table):
                self._write_tables(row, chunk)
        self._columns[:, num:size] = np.array(PADDING)[:, None]
        values = [(chunk.token_ids[0], chunk.start, chunk.cross_length) for chunk in chunks]
        ids, positions, cross_lengths = np.array(values, np.int32).T
        blocks = self._tables[np.arange(num), positions // BLOCK_SIZE]
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        self._columns[:-1, :num] = ids, positions, slots, positions + 1, cross_lengths
        sources = None if chosen is None else chosen.sources(chunks, range(num), ids)
        if sources is not None:
            self._columns[-1, :num] = sources
        self._bring(size)
        if chosen is not None and sources is not None:
            there = self._parts(self._there)[0]
            there[0, :num] = chosen.fill(there[0, :num], there[-1, :num])

    def _bring(self, size: int) -> None:
        """The columns, and the tables of `size` rows, to the device, by way of memory that stays as it is until they are there."""
        if self._there is self._here:
            return
        used = self._num_columns + size * self._shape[1]
        staged = pinned(used, torch.int32, self._cache.device)
        staged.copy_(self._here[:used])
        self._there[:used].copy_(staged, non_blocking=True)

    def _write_tables(self, row: int, chunk: Chunk) -> None:
        for begin, table in ((0, chunk.table), (self._max_blocks, chunk.cross_table if self._has_cross else ())):
            self._tables[row, begin : begin + len(table)] = table
        self._written[row] = chunk.table, chunk.cross_table
