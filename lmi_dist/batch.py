"""ForwardBatch: a Plan as tensors, made once a step. Everything that depends only on lengths is worked out here, not in a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from lmi_dist import ops
from lmi_dist.config import BLOCK_SIZE
from lmi_dist.kv_cache import KVCache
from lmi_dist.plan import PENDING, Chunk, Encode, Plan
from lmi_dist.staging import to_device

Ints = NDArray[np.int32]


class Rope(NamedTuple):
    """Rotary angles of a step: token t takes row rows[t] of cos and sin: fp32 [rows,half]."""

    cos: torch.Tensor
    sin: torch.Tensor
    rows: torch.Tensor  # int32 [T]


class Chosen(NamedTuple):
    """Tokens that the step before chooses, where they are: on the device. ids: int32 [R]; rows: which is whose, by sequence."""

    ids: torch.Tensor
    rows: Mapping[int, int]

    def sources(self, chunks: Sequence[Chunk], first_tokens: Sequence[int] | NDArray[np.int_], ids: Ints) -> Ints | None:
        """Where each token's id stands in self.ids followed by `ids`, if any is PENDING. first_tokens: of each chunk, among `ids`;
        ids: [T]. Returns [T]."""
        pending = [
            (first, self.rows[c.sequence]) for c, first in zip(chunks, first_tokens, strict=True) if c.token_ids[0] == PENDING
        ]
        if not pending:
            return None
        sources = np.arange(len(self.ids), len(self.ids) + len(ids), dtype=np.int32)
        places, rows = np.array(pending, np.int32).T
        sources[places] = rows
        return sources

    def fill(self, ids: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """ids: int32 [T] with all that were PENDING in their places."""
        return torch.cat((self.ids, ids)).index_select(0, sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """What a forward needs to know. Tokens of a sequence are consecutive; all integers are int32."""

    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T] where the token's key goes: block * P + place
    starts: torch.Tensor  # [B+1] sequence b owns tokens starts[b] .. starts[b+1]-1
    key_lengths: torch.Tensor  # [B] keys after this step
    tables: torch.Tensor  # [B,max_blocks] padded with -1
    output_rows: torch.Tensor  # [R] tokens whose logits are wanted
    cache: KVCache
    output_starts: torch.Tensor | None = None  # [B+1] sequence b owns output rows so and so; None: all tokens are output rows
    rope_lengths: torch.Tensor | None = None  # [T] by which a rotary scaling goes that looks at lengths; None: position + 1
    embeddings: torch.Tensor | None = None  # [T,E] in place of ids, where inputs were merged
    images: tuple[tuple[int, torch.Tensor], ...] = ()  # first token, and the features [tokens,E] in place of it and those behind
    cross_lengths: torch.Tensor | None = None  # [B] keys of the encoder; None: nobody has one
    cross_tables: torch.Tensor | None = None  # [B,max_blocks] padded with -1
    adapters: torch.Tensor | None = None  # [T] adapter's slot, -1: none; None: nobody has one
    rope: Rope | None = None  # filled in by the model's rotary embedding
    prompts: ops.Prompts | None = None  # what flash-attn does, if the operator wants it to

    def outputs(self) -> "ForwardBatch":
        """The step of the output rows alone; the keys of the others are in the cache. For layers: without ids."""
        assert self.output_starts is not None, "there are others"

        def chosen(of_tokens: torch.Tensor) -> torch.Tensor:
            return of_tokens.index_select(0, self.output_rows)

        return replace(
            self,
            slots=chosen(self.slots),
            starts=self.output_starts,
            adapters=None if self.adapters is None else chosen(self.adapters),
            rope=None if self.rope is None else self.rope._replace(rows=chosen(self.rope.rows)),
            prompts=None,
        )


def build(
    plan: Plan, cache: KVCache, features: Mapping[bytes, torch.Tensor] | None = None, chosen: Chosen | None = None
) -> ForwardBatch:
    """The tensors of a plan's decodes and chunks, in that order. `features`: those of its images [tokens,E], by digest. `chosen`:
    where its PENDING tokens are."""
    batch = _build(plan.rows, cache, chosen)
    if plan.chunks and ops.chosen().takes_flash_attn:
        batch = replace(batch, prompts=_prompts(plan, cache.device))
    return replace(batch, images=_images(plan.rows, features)) if features else batch


def build_encoder(encodes: Sequence[Encode], cache: KVCache) -> ForwardBatch:
    """The tensors of texts that an encoder reads, each as a whole; no logits are wanted."""
    return _build([Chunk(e.sequence, e.token_ids, 0, e.table, len(e.token_ids), 0) for e in encodes], cache)


def _build(chunks: Sequence[Chunk], cache: KVCache, chosen: Chosen | None = None) -> ForwardBatch:
    lengths = _ints([len(chunk.token_ids) for chunk in chunks])
    starts = np.concatenate(([0], np.cumsum(lengths)))
    tables = _tables([chunk.table for chunk in chunks])
    cross_lengths = _ints([chunk.cross_length for chunk in chunks])
    owners = np.repeat(np.arange(len(chunks)), lengths)  # [T] the chunk of each token
    firsts = _ints([chunk.start for chunk in chunks])
    positions = np.arange(len(owners)) + (firsts - starts[:-1])[owners]
    prompt_lengths = _ints([chunk.prompt_length for chunk in chunks])
    arrays = {
        "ids": np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int32),
        "positions": positions,
        "rope_lengths": np.maximum(prompt_lengths[owners], positions + 1),
        "slots": tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        "starts": starts,
        "key_lengths": firsts + lengths,
        "tables": tables,
        "output_rows": _output_rows(chunks, starts),
    }
    if len(arrays["output_rows"]) < len(owners):
        arrays["output_starts"] = np.cumsum([0, *(chunk.num_outputs for chunk in chunks)])
    if cross_lengths.any():
        arrays |= {"cross_lengths": cross_lengths, "cross_tables": _tables([chunk.cross_table for chunk in chunks])}
    adapters = _ints([chunk.adapter for chunk in chunks])
    if (adapters >= 0).any():
        arrays["adapters"] = adapters[owners]
    sources = None if chosen is None else chosen.sources(chunks, starts[:-1], arrays["ids"])
    if sources is not None:
        arrays["sources"] = sources
    there = to_device({name: array.astype(np.int32, copy=False) for name, array in arrays.items()}, cache.device)
    if chosen is not None and sources is not None:
        there["ids"] = chosen.fill(there["ids"], there.pop("sources"))
    return ForwardBatch(cache=cache, **cast(dict[str, Any], there))


def _prompts(plan: Plan, device: torch.device) -> ops.Prompts:
    """The plan's chunks, in calls of at most GATHERED_KEYS keys, or of one sequence."""
    first, calls, group = len(plan.decodes), list[ops.PromptCall](), list[Chunk]()
    num_keys, row = 0, first
    for chunk in (*plan.chunks, None):
        if group and (chunk is None or num_keys + _num_keys(chunk) > ops.GATHERED_KEYS):
            calls.append(_prompt_call(group, row, device))
            row = calls[-1].rows.stop
            group, num_keys = [], 0
        if chunk is not None:
            group.append(chunk)
            num_keys += _num_keys(chunk)
    return ops.Prompts(first, calls)


def _prompt_call(chunks: Sequence[Chunk], first_row: int, device: torch.device) -> ops.PromptCall:
    lengths, key_lengths = [len(chunk.token_ids) for chunk in chunks], [_num_keys(chunk) for chunk in chunks]
    positions = np.concatenate([np.arange(num) for num in key_lengths])
    owners = np.repeat(np.arange(len(chunks)), key_lengths)
    arrays = {
        "starts": np.cumsum([0, *lengths]),
        "key_starts": np.cumsum([0, *key_lengths]),
        # of one that fell out of the window it is -1: the pool's last, whose numbers are not looked at
        "blocks": _tables([chunk.table for chunk in chunks])[owners, positions // BLOCK_SIZE],
        "places": positions % BLOCK_SIZE,
    }
    rows = slice(first_row, first_row + sum(lengths))
    there: dict[str, Any] = to_device({name: array.astype(np.int32, copy=False) for name, array in arrays.items()}, device)
    return ops.PromptCall(rows=rows, max_rows=max(lengths), max_keys=max(key_lengths), **there)


def _num_keys(chunk: Chunk) -> int:
    return chunk.start + len(chunk.token_ids)


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


def _images(chunks: Sequence[Chunk], features: Mapping[bytes, torch.Tensor]) -> tuple[tuple[int, torch.Tensor], ...]:
    begins = accumulate((len(chunk.token_ids) for chunk in chunks), initial=0)
    spans = [(begin - chunk.start, span) for chunk, begin in zip(chunks, begins, strict=False) for span in chunk.spans]
    return tuple([(o + s.start, features[s.digest][s.first_row : s.first_row + s.num_rows]) for o, s in spans])


def _ints(values: list[int]) -> Ints:
    return np.array(values, np.int32)
