"""Decides who runs in the next step, with which tokens and in which blocks: Sequences in, Plans out, their new tokens back in.

Only ints: no torch, clock or randomness, so that the same calls give the same plans. `plan` reserves, then exactly one of
`commit` (the forward ran) and `drop` (it failed) follows; `add` and `finish` may be called at any time, in between too. With one
plan in flight `plan_ahead` makes the next, whose forward is taken to run after the other's.
"""

import collections.abc
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field

from lmi_dist.blocks import BlockPool, PrefixChain
from lmi_dist.plan import MAX_PROMPT_ROWS, Chunk, Encode, PlacedImage, Plan
from lmi_dist.sequence import Finished, Sequence


@dataclass(slots=True)
class _Step:
    """A plan in the making or in flight, with what it takes to commit or undo it."""

    decoding: list[tuple[Sequence, Chunk]] = field(default_factory=list)
    prefilling: list[tuple[Sequence, Chunk]] = field(default_factory=list)
    budget: int = 0  # prompt tokens that may still join
    encodes: list[tuple[Sequence, Encode]] = field(default_factory=list)
    encoder_budget: int = 0  # tokens that encoders may still read
    prompt_rows: int = 0  # of their logits that may still be wanted
    grown: list[tuple[Sequence, int]] = field(default_factory=list)  # with the number of blocks they had before
    admitted: list[Sequence] = field(default_factory=list)
    num_query_tokens: int = 0
    num_hit_tokens: int = 0
    has_preempted: bool = False
    plan: Plan | None = None


def wants_token(chunk: Chunk) -> bool:
    """Whether the chunk's last row is sampled, so that `commit` must be given at least one token for its sequence.

    The rows of a chunk are those of positions end - num_outputs .. end - 1, where end = start + len(token_ids), and the row of
    position p tells about token p + 1. Where prompt logits are wanted each prompt position has its row in exactly one committed
    chunk, also over a preemption, and chunks before the prompt's end have rows but no token.
    """
    return chunk.num_outputs > 0 and chunk.start + len(chunk.token_ids) >= chunk.prompt_length


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class Scheduler:
    """First come, first served, in mixed batches: a step runs the next token of all that decode, then prompt tokens up to a budget,
    `prefill_chunk_tokens` if anything decodes and else `max_prefill_tokens` (each at least 1; the latter bounds the former). The
    former may be set anew before each plan.

    A sequence is admitted when there are blocks for all tokens that it has, and one to spare for each that runs already. When the
    running ones need more blocks than there are, the youngest is preempted: it loses its place but no token, waits in front of all
    that came later and has its keys computed again, as prompt tokens, or found in the prefix cache. So the oldest running sequence
    gains at least one token in each step, and everything that was added ends.

    Where prompt logits are wanted, a step has at most `max_prompt_rows`: prompts are cut there even without chunked prefill.

    Where no layer looks further back than `window` keys (0: some do), blocks that fell out of it are given back.

    An encoder reads its input whole, in the step that admits its sequence: as many as fit a budget of the same size as that of
    prompt tokens but counted apart, and one in any case. Its keys lie in blocks of their own, found again only by the whole input.
    An image is encoded, under the same budget, when the first of its places is to run. The ranks keep its features until no
    running sequence has any of them to come; a sequence that was preempted before has them made again.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_batch_size: int,
        max_prefill_tokens: int,
        prefill_chunk_tokens: int,
        prefix_caching: bool,
        chunked_prefill: bool = True,
        max_prompt_rows: int = MAX_PROMPT_ROWS,
        window: int = 0,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens = max_prefill_tokens
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.prefix_caching = prefix_caching
        self.chunked_prefill = chunked_prefill
        self.max_prompt_rows = max_prompt_rows
        self.window = window
        self.num_steps = 0  # committed
        self.preemptions = 0
        self.prefix_query_tokens = 0  # of admitted sequences that may use the prefix cache, and
        self.prefix_hit_tokens = 0  # those of them that came from it
        self._num_arrivals = 0
        self._pool = BlockPool(num_blocks, block_size)
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []  # both by arrival
        self._running: list[Sequence] = []
        self._flights: list[_Step] = []  # oldest first
        self._features: tuple[bytes, ...] = ()  # digests of the images that the ranks have encoded and still keep

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_decoding(self) -> int:
        """Sequences whose next token is in the next plan, if none is preempted."""
        return sum([s.num_scheduled >= s.prefill_end and not _ends_in_flight(s) for s in self._running])

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def pool(self) -> BlockPool:
        """For its counts; only the scheduler changes it."""
        return self._pool

    def sequence(self, sequence_id: int) -> Sequence:
        """A sequence that waits or runs. Raises KeyError for any other."""
        return self._sequences[sequence_id]

    def fits(self, num_tokens: int, num_encoder_tokens: int = 0) -> bool:
        """Whether a sequence alone in the pool could have so many tokens in the cache (its last token never is)."""
        return self._pool.blocks_for(num_tokens) + self._pool.blocks_for(num_encoder_tokens) <= self._pool.num_blocks

    def add(self, sequence: Sequence) -> None:
        """Put it at the end of the queue. Raises AssertionError for what the engine should have refused: an id in use, no prompt,
        nothing to generate, more tokens than fit the pool."""
        most = sequence.prompt_length + sequence.max_tokens - 1
        if sequence.state != "out" or sequence.id in self._sequences:
            raise AssertionError(f"sequence {sequence.id} was added already")
        is_whole = 0 < sequence.prompt_length <= len(sequence.token_ids) <= most
        if not (is_whole and self.fits(most, len(sequence.encoder_ids))):
            raise AssertionError(
                f"sequence {sequence.id}: prompt_length={sequence.prompt_length} must be at least 1, max_tokens="
                f"{sequence.max_tokens} more than was generated, and their sum less one fit {self._pool.num_blocks} blocks beside "
                f"the encoder's {len(sequence.encoder_ids)}"
            )
        # By reference: a leader is older than its siblings, so that no circle of leaders can wait for itself.
        sequence.leading = None if sequence.leader is None else self._sequences.get(sequence.leader)
        sequence.chain = PrefixChain(self._pool.block_size, sequence.salt, sequence.adapter, sequence.encoder_ids, sequence.images)
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._sequences[sequence.id] = sequence
        sequence.state = "waiting"
        self._waiting.append(sequence)

    def finish(self, sequence_id: int) -> None:
        """End it from outside and take its blocks back; unknown ids are ignored. With a plan in flight too: who gets the blocks
        next writes to them when that has run, and the sequence's tokens are ignored then."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            (self._running if sequence.state == "running" else self._waiting).remove(sequence)
            self._end(sequence)

    def reset(self) -> None:
        """Forget all sequences, the plans in flight and what the pool holds. The counters go on."""
        for sequence in list(self._sequences.values()):
            self._end(sequence)
        self._waiting.clear()
        self._running.clear()
        self._flights.clear()
        self._features = ()
        self._pool = BlockPool(self._pool.num_blocks, self._pool.block_size)

    def plan(self) -> Plan:
        """What runs next; empty, and then not in flight, only without work. Raises AssertionError if a plan is in flight."""
        if self._flights:
            raise AssertionError(f"step {self.num_steps} is in flight; commit or drop its plan before the next")
        return self._plan()

    def plan_ahead(self) -> Plan:
        """What runs behind the plan in flight, whose tokens are not known yet: a decode's token is PENDING. A sequence that will
        have ended by its number of tokens is left out; one that turns out to have ended otherwise runs for nothing. Empty, and not
        in flight, if nothing is left to run, or if it cannot be told yet: a sequence would have to be preempted, or encoders run
        in the plan in flight. Raises AssertionError unless exactly one is in flight."""
        if len(self._flights) != 1:
            raise AssertionError(f"{len(self._flights)} plans are in flight; one is planned ahead of, no more")
        if self._flights[0].encodes or self._num_missing_blocks() > self._pool.num_available:
            return Plan(self.num_steps + 1)
        return self._plan()

    def _plan(self) -> Plan:
        step = _Step(prompt_rows=self.max_prompt_rows)
        unfinished_prefills = self._schedule_running(step)
        most = self.max_prefill_tokens
        step.budget = step.encoder_budget = min(self.prefill_chunk_tokens, most) if step.decoding else most
        self._schedule_prefills(step, unfinished_prefills)
        if not step.has_preempted:  # or the victim would take back at once what it was robbed of
            self._admit(step)
        decodes, chunks = (tuple([chunk for _, chunk in rows]) for rows in (step.decoding, step.prefilling))
        self._forget_features()
        plan = Plan(
            self.num_steps + len(self._flights), decodes, chunks, tuple([encode for _, encode in step.encodes]), self._features
        )
        if not plan.is_empty:
            step.plan = plan
            self._flights.append(step)
        return plan

    def commit(self, plan: Plan, tokens: Mapping[int, collections.abc.Sequence[int]]) -> list[Finished]:
        """Record that the plan, the older one in flight, has run. `tokens` holds the new ids of each sequence whose chunk
        `wants_token`, in order, several at once allowed where nothing was planned ahead; a sequence takes them up to its end and
        ignores the rest. Returns who has ended by that.
        Raises AssertionError, with nothing changed, if the plan is not in flight or a sequence lacks its tokens."""
        step = self._in_flight(plan, 0)
        rows = [(s, chunk) for s, chunk in step.decoding + step.prefilling if s.state == "running"]
        for sequence, chunk in rows:
            if not tokens.get(sequence.id) and wants_token(chunk):
                raise AssertionError(f"sequence {sequence.id} must get at least one token when step {plan.step} is committed")
            if sequence.num_scheduled > len(sequence.token_ids) and len(tokens[sequence.id]) > 1:
                raise AssertionError(f"sequence {sequence.id} must get one token, for step {plan.step + 1} is planned already")
        del self._flights[0]
        self.num_steps += 1
        self.prefix_query_tokens += step.num_query_tokens
        self.prefix_hit_tokens += step.num_hit_tokens
        for sequence, encode in step.encodes:
            if encode.image is not None:
                self._features += (encode.image.digest,)
            else:
                self._publish_encoded(sequence, encode)
        finished: list[Finished] = []
        for sequence, chunk in rows:
            self._record(sequence, chunk)
            self._pass_blocks(sequence)
            if wants_token(chunk):
                self._extend(sequence, tokens[sequence.id], finished)
        if finished:
            self._running = [sequence for sequence in self._running if sequence.state == "running"]
        return finished

    def drop(self, plan: Plan) -> None:
        """Undo the plan, the newer one in flight, because its forward failed: blocks given back, admissions undone, counts and step
        as before, so that the next plan is equal. Only what the forward may have written over does not come back: who was preempted
        for it stays preempted (it waits, with all its tokens), and evicted blocks stay forgotten. Raises AssertionError if it is
        not in flight."""
        step = self._in_flight(plan, -1)
        del self._flights[-1]
        for sequence, chunk in step.decoding + step.prefilling:
            if sequence.state == "running":
                sequence.num_scheduled = chunk.start
        # Newest first: the pool then hands out the same blocks again.
        for sequence in reversed(step.admitted):
            if sequence.state == "running":
                self._running.remove(sequence)
                self._send_back(sequence)
        for sequence, num_before in reversed(step.grown):
            if sequence.state == "running":
                self._pool.give_back(sequence.table[num_before:])
                sequence.table = sequence.table[:num_before]

    def _in_flight(self, plan: Plan, place: int) -> _Step:
        if not self._flights or self._flights[place].plan is not plan:
            raise AssertionError(f"the plan of step {plan.step} is not in flight; each plan is committed or dropped once, in order")
        return self._flights[place]

    # ---- planning ----

    def _schedule_running(self, step: _Step) -> list[Sequence]:
        """Give everyone that runs, oldest first, blocks for its known tokens, and its next token to those that decode. Returns the
        others. The youngest may be preempted on the way, so the list can get shorter, but only behind the current one."""
        running, size = self._running, self._pool.block_size
        others: list[Sequence] = []
        index = 0
        while index < len(running):
            sequence = running[index]
            if _needed(sequence) > len(sequence.table) * size and not self._grow(sequence, step):
                break
            start = sequence.num_scheduled
            if start < sequence.prefill_end:
                others.append(sequence)
            elif not _ends_in_flight(sequence):
                sequence.num_scheduled = start + 1
                step.decoding.append((sequence, sequence.chunk(start, start + 1, 1)))
            index += 1
        return others

    def _grow(self, sequence: Sequence, step: _Step) -> bool:
        """Blocks for all that it needs, at the youngest's cost if need be; False if that was the sequence itself."""
        num_before = len(sequence.table)
        num_missing = self._pool.blocks_for(_needed(sequence)) - num_before
        while self._pool.num_available < num_missing:
            victim = self._running.pop()
            self._send_back(victim)
            self.preemptions += 1
            step.has_preempted = True
            if victim is sequence:
                return False
        sequence.table += self._pool.take(num_missing)
        step.grown.append((sequence, num_before))
        return True

    def _num_missing_blocks(self) -> int:
        """That those who run need for their next tokens."""
        return sum([max(0, self._pool.blocks_for(_needed(sequence)) - len(sequence.table)) for sequence in self._running])

    def _schedule_prefills(self, step: _Step, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            num_tokens = self._share_of_budget(sequence, sequence.num_scheduled, sequence.prefill_end, step)
            num_tokens, images = self._images_to_encode(sequence, sequence.num_scheduled, num_tokens, step)
            if num_tokens == 0:
                break
            self._encode_images(sequence, images, step)
            self._schedule_chunk(sequence, num_tokens, step)

    def _admit(self, step: _Step) -> None:
        """Let the first waiting ones in while budget, batch and pool last. Who waits for a leader is passed by, nobody else."""
        index = 0
        while step.budget > 0 and index < len(self._waiting) and len(self._running) < self.max_batch_size:
            sequence = self._waiting[index]
            if self._waits_for_leader(sequence):
                index += 1
                continue
            hits = self._pool.find(sequence.chain, sequence.token_ids, self._num_findable(sequence))
            cross_hits = self._find_encoded(sequence)
            num_hit_tokens = len(hits) * self._pool.block_size
            num_tokens = self._share_of_budget(sequence, num_hit_tokens, len(sequence.token_ids), step)
            num_tokens, images = self._images_to_encode(sequence, num_hit_tokens, num_tokens, step)
            num_encoded = 0 if cross_hits else len(sequence.encoder_ids)
            if num_tokens == 0 or (step.encodes and num_encoded > step.encoder_budget):
                break
            if not self._place(sequence, hits, cross_hits):
                break
            del self._waiting[index]
            step.admitted.append(sequence)
            if self._num_findable(sequence):
                step.num_query_tokens += len(sequence.token_ids)
                step.num_hit_tokens += num_hit_tokens
            if num_encoded:
                step.encoder_budget -= num_encoded
                step.encodes.append((sequence, Encode(sequence.id, sequence.encoder_ids, sequence.cross_table)))
            self._encode_images(sequence, images, step)
            self._schedule_chunk(sequence, num_tokens, step)

    def _images_to_encode(
        self, sequence: Sequence, start: int, num_tokens: int, step: _Step
    ) -> tuple[int, tuple[PlacedImage, ...]]:
        """The images whose features these tokens lack, and how many of the tokens may run: those before the first image that the
        encoders' budget has no room for. A prompt that must not be cut runs with all of its images, or waits."""
        end = start + num_tokens
        known = {*self._features, *(encode.image.digest for _, encode in step.encodes if encode.image is not None)}
        lacking = {p.image.digest: p for p in reversed(sequence.images) if start < p.end and p.start < end}
        images = tuple(placed for placed in reversed(lacking.values()) if placed.image.digest not in known)
        budget = step.encoder_budget
        for index, placed in enumerate(images):
            budget -= placed.image.num_tokens
            may_exceed = not step.encodes and (index == 0 or not self.chunked_prefill)
            if budget < 0 and not may_exceed:
                return (max(0, placed.start - start), images[:index]) if self.chunked_prefill else (0, ())
        return num_tokens, images

    def _encode_images(self, sequence: Sequence, images: tuple[PlacedImage, ...], step: _Step) -> None:
        for placed in images:
            step.encoder_budget -= placed.image.num_tokens
            step.encodes.append((sequence, Encode(sequence.id, image=placed.image)))

    def _forget_features(self) -> None:
        """Of what the ranks keep, only what a running sequence has still to read; it is theirs to forget the rest."""
        if self._features:
            needed = {p.image.digest for s in self._running for p in s.images if s.num_computed < p.end}
            self._features = tuple([digest for digest in self._features if digest in needed])

    def _find_encoded(self, sequence: Sequence) -> tuple[int, ...]:
        """The blocks of the encoder's keys if all of them are cached; else it reads its input again."""
        if not (sequence.encoder_ids and self.prefix_caching):
            return ()
        return self._pool.find_all(sequence.chain.cross_digests(self._pool.blocks_for(len(sequence.encoder_ids))))

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        """Only if there will be blocks to share: without the prefix cache a sibling computes its prompt itself."""
        leader = sequence.leading
        if leader is None or leader.state == "out" or leader.num_computed >= leader.prompt_length:
            return False
        return self._num_findable(sequence) >= self._pool.block_size or (self.prefix_caching and bool(sequence.encoder_ids))

    def _num_findable(self, sequence: Sequence) -> int:
        """First tokens that may come from the prefix cache: never the last, whose logits are needed (so a prompt that is cached
        as a whole has its last block computed anew, in a block of its own), and none whose logits the client still waits for."""
        if not self.prefix_caching:
            return 0
        most = len(sequence.token_ids) - 1
        return min(most, sequence.num_prompt_rows) if sequence.wants_prompt_logits else most

    def _place(self, sequence: Sequence, hits: tuple[int, ...], cross_hits: tuple[int, ...]) -> bool:
        """Move it in, with blocks for all its tokens, if that leaves one for each that runs; else those would soon preempt it."""
        pool = self._pool
        num_new = pool.blocks_for(len(sequence.token_ids)) - len(hits)
        num_cross = pool.blocks_for(len(sequence.encoder_ids)) - len(cross_hits)
        cached = hits + cross_hits
        if num_new + num_cross + pool.num_unreferenced(cached) + len(self._running) > pool.num_available:
            return False
        pool.share(cached)
        sequence.table = hits + pool.take(num_new)
        sequence.cross_table = cross_hits + pool.take(num_cross)
        sequence.num_scheduled = sequence.num_computed = len(hits) * pool.block_size
        sequence.num_published = len(hits)
        sequence.prefill_end = len(sequence.token_ids)
        sequence.state = "running"
        insort(self._running, sequence, key=_arrival)
        return True

    def _share_of_budget(self, sequence: Sequence, start: int, end: int, step: _Step) -> int:
        """Tokens of a prompt to run now. One that must not be cut runs if it fits the budget or is the first of its step."""
        num_tokens = end - start
        if self.chunked_prefill:
            num_tokens = min(num_tokens, step.budget)
        elif num_tokens > step.budget and step.prefilling:
            return 0
        if _wants_rows(sequence):
            num_tokens = min(num_tokens, max(0, sequence.num_prompt_rows - start) + step.prompt_rows)
        return num_tokens

    def _schedule_chunk(self, sequence: Sequence, num_tokens: int, step: _Step) -> None:
        start = sequence.num_scheduled
        end = start + num_tokens
        num_outputs = max(0, end - max(start, _first_row(sequence)))
        sequence.num_scheduled = end
        step.budget -= num_tokens
        step.prompt_rows -= num_outputs if _wants_rows(sequence) else 0
        step.prefilling.append((sequence, sequence.chunk(start, end, num_outputs)))

    # ---- recording ----

    def _record(self, sequence: Sequence, chunk: Chunk) -> None:
        """The chunk's keys are in the cache now, and its full blocks may be found."""
        end = chunk.start + len(chunk.token_ids)
        sequence.num_computed = end
        if sequence.wants_prompt_logits:
            sequence.num_prompt_rows = max(sequence.num_prompt_rows, min(end, sequence.prompt_length))
        if self.prefix_caching:
            while (sequence.num_published + 1) * self._pool.block_size <= end:
                index = sequence.num_published
                self._pool.publish(sequence.table[index], sequence.chain.digest(index, sequence.token_ids))
                sequence.num_published = index + 1

    def _pass_blocks(self, sequence: Sequence) -> None:
        """Give back the blocks that no later token looks at: the next one stands behind the computed ones and sees itself and
        window - 1 of them."""
        if self.window:
            num_before, num_passed = sequence.num_passed, max(0, sequence.num_computed + 1 - self.window) // self._pool.block_size
            self._pool.give_back(sequence.table[num_before:num_passed])
            sequence.table = (-1,) * num_passed + sequence.table[num_passed:]
            sequence.num_passed = num_passed

    def _publish_encoded(self, sequence: Sequence, encode: Encode) -> None:
        if self.prefix_caching and sequence.state == "running":
            for block, digest in zip(encode.table, sequence.chain.cross_digests(len(encode.table)), strict=True):
                self._pool.publish(block, digest)

    def _extend(self, sequence: Sequence, new_ids: collections.abc.Sequence[int], finished: list[Finished]) -> None:
        for num_kept, token in enumerate(new_ids, start=1):
            sequence.token_ids.append(token)
            num_generated = len(sequence.token_ids) - sequence.prompt_length
            is_stop = token in sequence.stop_ids and num_generated >= sequence.min_tokens
            if is_stop or num_generated >= sequence.max_tokens:
                finished.append(Finished(sequence.id, "eos_token" if is_stop else "length", num_kept))
                self._end(sequence)
                return
        if len(new_ids) > 1:  # all but the last lack their keys yet: a chunk, not a decode
            sequence.prefill_end = len(sequence.token_ids)

    def _end(self, sequence: Sequence) -> None:
        """Everything but its place in the queue, which the caller sees to."""
        self._give_up_blocks(sequence)
        sequence.state = "out"
        sequence.leading = None
        del self._sequences[sequence.id]

    def _send_back(self, sequence: Sequence) -> None:
        """From running, where the caller removed it, to its place by arrival among those that wait."""
        self._give_up_blocks(sequence)
        sequence.state = "waiting"
        insort(self._waiting, sequence, key=_arrival)

    def _give_up_blocks(self, sequence: Sequence) -> None:
        self._pool.give_back(sequence.cross_table)
        self._pool.give_back(sequence.table[sequence.num_passed :])
        sequence.table = sequence.cross_table = ()
        sequence.num_scheduled = sequence.num_computed = sequence.num_published = sequence.num_passed = sequence.prefill_end = 0


def _ends_in_flight(sequence: Sequence) -> bool:
    """Whether the token that is still to come from a plan in flight is its last by their number."""
    return sequence.num_scheduled == len(sequence.token_ids) and sequence.num_generated + 1 >= sequence.max_tokens


def _needed(sequence: Sequence) -> int:
    """Tokens that need a block: those known, and the one to come that is to run next."""
    return len(sequence.token_ids) + (sequence.num_scheduled == len(sequence.token_ids) and not _ends_in_flight(sequence))


def _first_row(sequence: Sequence) -> int:
    """The first position whose logits are still wanted: the prompt's next one, or only that of the last known token."""
    return sequence.num_prompt_rows if _wants_rows(sequence) else len(sequence.token_ids) - 1


def _wants_rows(sequence: Sequence) -> bool:
    """Whether logits of its prompt are still to be delivered."""
    return sequence.wants_prompt_logits and sequence.num_prompt_rows < sequence.prompt_length
