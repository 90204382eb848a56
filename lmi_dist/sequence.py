"""Sequence: one text that grows, its place in the queue and its blocks. Only ints; what it gains is decided in scheduler.py."""

from dataclasses import dataclass, field
from typing import Literal

from lmi_dist.blocks import PrefixChain
from lmi_dist.plan import PENDING, Chunk, PlacedImage, Span


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One text that grows: its tokens, when it ends, and where it stands. Only its Scheduler changes it once it was added.

    Four counts of tokens: known (`token_ids`), scheduled (their keys are in the cache or will be when the plans in flight have run;
    at most one more than is known), computed (their keys are in the cache), published (counted in blocks; others may find them).
    """

    id: int
    token_ids: list[int]  # the prompt, then what was generated
    prompt_length: int
    max_tokens: int  # generated at most
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0  # a stop id ends the sequence only if at least so many were generated, itself included
    salt: str = ""
    wants_prompt_logits: bool = False  # each prompt token gets its row of logits once, so cached blocks cannot stand in for it
    leader: int | None = None  # a sequence added before with the same prompt, whose blocks this one waits for
    adapter: int = -1
    encoder_ids: tuple[int, ...] = ()  # what an encoder reads as a whole before the first token; all tokens attend to its keys
    images: tuple[PlacedImage, ...] = ()  # in order; at their places the token ids count for nothing

    state: Literal["out", "waiting", "running"] = field(default="out", init=False)  # out: not added yet, or ended
    arrival: int = field(default=0, init=False)
    table: tuple[int, ...] = field(default=(), init=False)
    cross_table: tuple[int, ...] = field(default=(), init=False)  # the blocks of the encoder's keys
    num_scheduled: int = field(default=0, init=False)
    num_computed: int = field(default=0, init=False)
    num_published: int = field(default=0, init=False)  # blocks
    num_passed: int = field(default=0, init=False)  # blocks before the window: given back, -1 in the table
    prefill_end: int = field(default=0, init=False)  # tokens that were known when it was admitted; beyond them it decodes
    num_prompt_rows: int = field(default=0, init=False)  # prompt tokens whose logits were delivered, if wanted
    chain: PrefixChain = field(init=False, repr=False)
    leading: "Sequence | None" = field(default=None, init=False, repr=False)  # the leader itself; its id may be used again

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_length

    def chunk(self, start: int, end: int, num_outputs: int) -> Chunk:
        """Its tokens at positions start .. end - 1 for a plan. One that is not known yet is PENDING, and alone."""
        return Chunk(
            sequence=self.id,
            token_ids=tuple(self.token_ids[start:end]) or (PENDING,),
            start=start,
            table=self.table,
            prompt_length=self.prompt_length,
            num_outputs=num_outputs,
            adapter=self.adapter,
            cross_table=self.cross_table,
            cross_length=len(self.encoder_ids),
            spans=self._spans(start, end) if self.images else (),
        )

    def _spans(self, start: int, end: int) -> tuple[Span, ...]:
        """The rows of its images that stand at positions start .. end - 1."""
        cuts = [(max(start, placed.start), min(end, placed.end), placed) for placed in self.images]
        return tuple([Span(first, p.image.digest, first - p.start, last - first) for first, last, p in cuts if first < last])


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence that `commit` ended. Of the tokens given to that commit its first `num_kept` count, the rest was cut off."""

    sequence_id: int
    reason: Literal["eos_token", "length"]
    num_kept: int
