"""ForwardBatch: a Plan as tensors, made once a step. Everything that depends only on lengths is worked out here, not in a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lmi_dist.config import BLOCK_SIZE
from lmi_dist.kv_cache import KVCache
from lmi_dist.plan import Chunk, Encode, Plan

Ints = NDArray[np.int32]


class Rope(NamedTuple):
    """Rotary angles of a step: token t takes row rows[t] of cos and sin: fp32 [rows,half]."""

    cos: torch.Tensor
    sin: torch.Tensor
    rows: torch.Tensor  # int32 [T]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """What a forward needs to know. Tokens of a sequence are consecutive; all integers are int32."""

    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    rope_lengths: torch.Tensor  # [T] the length by which a rotary scaling goes that looks at lengths
    slots: torch.Tensor  # [T] where the token's key goes: block * P + place
    starts: torch.Tensor  # [B+1] sequence b owns tokens starts[b] .. starts[b+1]-1
    key_lengths: torch.Tensor  # [B] keys after this step
    tables: torch.Tensor  # [B,max_blocks] padded with -1
    output_rows: torch.Tensor  # [R] tokens whose logits are wanted
    cache: KVCache
    embeddings: torch.Tensor | None = None  # [T,E] in place of ids, where inputs were merged
    images: tuple[tuple[int, torch.Tensor], ...] = ()  # first token, and the features [tokens,E] in place of it and those behind
    cross_lengths: torch.Tensor | None = None  # [B] keys of the encoder; None: nobody has one
    cross_tables: torch.Tensor | None = None  # [B,max_blocks] padded with -1
    adapters: torch.Tensor | None = None  # [T] adapter's slot, -1: none; None: nobody has one
    rope: Rope | None = None  # filled in by the model's rotary embedding


def build(plan: Plan, cache: KVCache, features: Mapping[bytes, torch.Tensor] | None = None) -> ForwardBatch:
    """The tensors of a plan's decodes and chunks, in that order. `features`: those of its images [tokens,E], by digest."""
    batch = _build(plan.rows, cache)
    return replace(batch, images=_images(plan.rows, batch.starts, features)) if features else batch


def build_encoder(encodes: Sequence[Encode], cache: KVCache) -> ForwardBatch:
    """The tensors of texts that an encoder reads, each as a whole; no logits are wanted."""
    return _build([Chunk(e.sequence, e.token_ids, 0, e.table, len(e.token_ids), 0) for e in encodes], cache)


def _build(chunks: Sequence[Chunk], cache: KVCache) -> ForwardBatch:
    lengths = _ints([len(chunk.token_ids) for chunk in chunks])
    starts = np.concatenate(([0], np.cumsum(lengths)))
    tables = _tables([chunk.table for chunk in chunks])
    cross_lengths = _ints([chunk.cross_length for chunk in chunks])
    owners = np.repeat(np.arange(len(chunks)), lengths)  # [T] the chunk of each token
    firsts = _ints([chunk.start for chunk in chunks])
    positions = np.arange(len(owners)) + (firsts - starts[:-1])[owners]
    prompt_lengths = _ints([chunk.prompt_length for chunk in chunks])
    return ForwardBatch(
        ids=_tensor(np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int32)),
        positions=_tensor(positions),
        rope_lengths=_tensor(np.maximum(prompt_lengths[owners], positions + 1)),
        slots=_tensor(tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE),
        starts=_tensor(starts),
        key_lengths=_tensor(firsts + lengths),
        tables=_tensor(tables),
        output_rows=_tensor(_output_rows(chunks, starts)),
        cross_lengths=_tensor(cross_lengths) if cross_lengths.any() else None,
        cross_tables=_tensor(_tables([chunk.cross_table for chunk in chunks])) if cross_lengths.any() else None,
        adapters=_adapters(chunks, owners),
        cache=cache,
    )


def _tables(rows: Sequence[tuple[int, ...]]) -> Ints:
    """The blocks of each sequence, padded to the longest. int32 [B,max_blocks]"""
    sizes = np.array([len(row) for row in rows])
    tables = np.full((len(rows), sizes.max()), -1, np.int32)
    tables[np.arange(sizes.max()) < sizes[:, None]] = np.fromiter(chain.from_iterable(rows), np.int32)
    return tables


def _output_rows(chunks: Sequence[Chunk], starts: NDArray[np.int_]) -> NDArray[np.int_]:
    ends = starts[1:]
    wanted = [np.arange(end - chunk.num_outputs, end) for chunk, end in zip(chunks, ends, strict=True) if chunk.num_outputs]
    return np.concatenate(wanted) if wanted else np.empty(0, np.int_)


def _adapters(chunks: Sequence[Chunk], owners: NDArray[np.int_]) -> torch.Tensor | None:
    slots = _ints([chunk.adapter for chunk in chunks])
    return None if (slots < 0).all() else _tensor(slots[owners])


def _images(
    chunks: Sequence[Chunk], starts: torch.Tensor, features: Mapping[bytes, torch.Tensor]
) -> tuple[tuple[int, torch.Tensor], ...]:
    spans = [(begin - chunk.start, span) for chunk, begin in zip(chunks, starts.tolist(), strict=False) for span in chunk.spans]
    return tuple([(o + s.start, features[s.digest][s.first_row : s.first_row + s.num_rows]) for o, s in spans])


def _ints(values: list[int]) -> Ints:
    return np.array(values, np.int32)


def _tensor(values: NDArray[np.int_] | Ints) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32, copy=False))
