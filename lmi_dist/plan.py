"""The Plan: what rank 0 decided for one step, in plain ints, for every rank to execute. Knows no torch and no text."""

import marshal
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

MAX_PROMPT_ROWS = 256  # prompt tokens of a step whose logits are wanted: a row has the size of the vocabulary


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence that run in this step; a decode is a chunk of one token.

    token_ids[i] stands at position start + i; keys 0 .. start - 1 are in the cache already. `table` holds the sequence's blocks and
    covers all positions of the chunk; it begins with a -1 for each block that fell out of the window of all layers. Logits are
    wanted for the last `num_outputs` tokens (0: the prompt goes on).
    `prompt_length` is the length of the client's prompt, also after a preemption: rotary scalings that look at a length use
    max(prompt_length, position + 1), so that a token's key does not depend on how the prompt was cut.
    """

    sequence: int
    token_ids: tuple[int, ...]
    start: int
    table: tuple[int, ...]
    prompt_length: int
    num_outputs: int
    adapter: int = -1  # slot of its adapter, -1: none
    cross_table: tuple[int, ...] = ()  # blocks of the encoder's keys (cross attention)
    cross_length: int = 0


@dataclass(frozen=True, slots=True)
class Encode:
    """One encoder input (text of a T5, image of a LLaVA) that runs whole in this step; its keys go to `table`."""

    sequence: int
    token_ids: tuple[int, ...]
    table: tuple[int, ...]
    image: bytes = b""


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: encoder inputs first, then one mixed batch of `decodes` and prompt `chunks`, in this order."""

    step: int
    decodes: tuple[Chunk, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    encodes: tuple[Encode, ...] = ()

    @property
    def rows(self) -> tuple[Chunk, ...]:
        """All chunks in the order of the batch."""
        return self.decodes + self.chunks

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def is_empty(self) -> bool:
        return not (self.decodes or self.chunks or self.encodes)

    def to_bytes(self) -> bytes:
        """For `of_bytes` of another rank: ints, bytes and tuples as marshal writes them, the quickest way there is."""
        parts = (list(map(_CHUNK, self.decodes)), list(map(_CHUNK, self.chunks)), list(map(_ENCODE, self.encodes)))
        return marshal.dumps((self.step, *parts), MARSHAL_VERSION)

    @classmethod
    def of_bytes(cls, data: Any) -> "Plan":
        """What `to_bytes` wrote. Only for bytes of our own rank 0: marshal trusts what it reads."""
        step, decodes, chunks, encodes = marshal.loads(data)
        return cls(
            step,
            tuple([Chunk(*values) for values in decodes]),
            tuple([Chunk(*values) for values in chunks]),
            tuple([Encode(*values) for values in encodes]),
        )


MARSHAL_VERSION = 2  # the last that writes values without looking for those it has written before
_CHUNK = attrgetter(*[field.name for field in fields(Chunk)])
_ENCODE = attrgetter(*[field.name for field in fields(Encode)])
