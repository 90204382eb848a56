"""The Plan: what rank 0 decided for one step, in plain ints, for every rank to execute. Knows no torch and no text."""

import marshal
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, NamedTuple

PENDING = -1  # in place of a token id: what the step before chooses for this sequence, which only the device knows yet
MAX_PROMPT_ROWS = 256  # prompt tokens of a step whose logits are wanted: a row has the size of the vocabulary


@dataclass(frozen=True, slots=True)
class Image:
    """An image as the vision tower takes it. `digest` names pixels and size; `num_tokens` places of the text are its features'.
    pixels: fp32 of `shape`, [tiles,3,height,width]; `size`: height and width of the image itself."""

    digest: bytes
    num_tokens: int
    shape: tuple[int, ...]
    size: tuple[int, int]
    pixels: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image in a sequence: its features stand at positions start .. end - 1."""

    start: int
    image: Image

    @property
    def end(self) -> int:
        return self.start + self.image.num_tokens


class Span(NamedTuple):
    """Of a chunk's positions start .. start + num_rows - 1, the features first_row and on of the image `digest`."""

    start: int
    digest: bytes
    first_row: int
    num_rows: int


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
    spans: tuple[Span, ...] = ()  # where image features stand in place of token ids


@dataclass(frozen=True, slots=True)
class Encode:
    """One encoder input that runs whole in this step: the text of a T5, whose keys go to `table`, or the image of a LLaVA, whose
    features each rank keeps as long as its plans say so."""

    sequence: int
    token_ids: tuple[int, ...] = ()
    table: tuple[int, ...] = ()
    image: Image | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: encoder inputs first, then one mixed batch of `decodes` and prompt `chunks`, in this order."""

    step: int
    decodes: tuple[Chunk, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    encodes: tuple[Encode, ...] = ()
    features: tuple[bytes, ...] = ()  # digests of images encoded before, whose features are still needed; all others go

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
        chunks = [(*_CHUNK(chunk), [tuple(span) for span in chunk.spans]) for chunk in self.chunks]
        encodes = [(*_ENCODE(encode), encode.image and _IMAGE(encode.image)) for encode in self.encodes]
        parts = (list(map(_CHUNK, self.decodes)), chunks, encodes, self.features)
        return marshal.dumps((self.step, *parts), MARSHAL_VERSION)

    @classmethod
    def of_bytes(cls, data: Any) -> "Plan":
        """What `to_bytes` wrote. Only for bytes of our own rank 0: marshal trusts what it reads."""
        step, decodes, chunks, encodes, features = marshal.loads(data)
        return cls(
            step,
            tuple([Chunk(*values) for values in decodes]),
            tuple([replace(Chunk(*values), spans=tuple([Span(*span) for span in spans])) for *values, spans in chunks]),
            tuple([replace(Encode(*values), image=image and Image(*image)) for *values, image in encodes]),
            features,
        )


MARSHAL_VERSION = 2  # the last that writes values without looking for those it has written before
# all fields but the last, which a decode has not, and which for the others needs more than marshal knows
_CHUNK = attrgetter(*[field.name for field in fields(Chunk)][:-1])
_ENCODE = attrgetter(*[field.name for field in fields(Encode)][:-1])
_IMAGE = attrgetter(*[field.name for field in fields(Image)])
