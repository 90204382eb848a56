"""A Scheduler under watch: runs its plans on a pretend KV memory that notices every wrong key, and checks what must always hold."""

from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from lmi_dist.plan import PENDING, Chunk, Plan
from lmi_dist.scheduler import Scheduler, wants_token
from lmi_dist.sequence import Finished, Sequence

GARBAGE = -1


class KeyMemory:
    """What each slot of each block holds: the number of the exact text (salt, adapter, encoder's input, all tokens and images) that
    its key stands for."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], int] = {}
        self._texts: dict[tuple[Any, int], int] = {}

    def texts(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Numbers of the sequence's first 1, 2, .. num_tokens tokens. Two texts have the same number exactly if they are equal."""
        numbers: list[int] = []
        before: Any = (sequence.salt, sequence.adapter, sequence.encoder_ids)
        for token in _contents(sequence)[:num_tokens]:
            before = self._texts.setdefault((before, token), len(self._texts))
            numbers.append(before)
        return numbers

    def encoded(self, sequence: Sequence, table: Items[int]) -> dict[tuple[int, int], int]:
        """What the slots of these blocks hold once its encoder has run, whole blocks for simplicity."""
        input: Any = (sequence.salt, sequence.adapter, sequence.encoder_ids)
        return {
            (block, slot): self._texts.setdefault((input, -1 - index), len(self._texts))
            for index, block in enumerate(table)
            for slot in range(self.block_size)
        }

    def slot(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.table[position // self.block_size], position % self.block_size

    def block(self, block: int) -> list[int]:
        return [self.slots.get((block, slot), GARBAGE) for slot in range(self.block_size)]


@dataclass
class Flight:
    """A plan in flight, and how things stood before it."""

    plan: Plan
    rows: list[tuple[Sequence, Chunk]]
    before: dict[int, tuple[Any, ...]]  # of each live sequence
    counts_before: tuple[int, ...]
    is_ahead: bool
    is_undisturbed: bool = True  # by anything but plans


class WatchedScheduler:
    """The scheduler's verbs, each followed by its checks. `log` holds them all, so that `replay` can do the same again."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.prefill_chunk_tokens = settings["prefill_chunk_tokens"]
        self.scheduler = Scheduler(**settings)
        self.memory = KeyMemory(settings["block_size"])
        self.log: list[tuple[str, Any]] = []
        self.plans: list[Plan] = []
        self.live: dict[int, Sequence] = {}
        self.texts: dict[int, list[int]] = {}  # what each live sequence's tokens must be
        self.prompt_rows: dict[int, list[int]] = {}  # positions of the prompt rows that were delivered
        self.ends: Counter[int] = Counter()
        self.num_added = 0
        self.flights: list[Flight] = []  # oldest first
        self.features: set[bytes] = set()  # of images that the ranks keep

    @property
    def flight(self) -> Plan | None:
        """The newest plan in flight."""
        return self.flights[-1].plan if self.flights else None

    @property
    def is_repeatable(self) -> bool:
        """Whether the newest plan would be made again after it was dropped: nothing came between, and it sent nobody back."""
        newest = self.flights[-1]
        return newest.is_undisturbed and self.scheduler.preemptions == newest.counts_before[0]

    # ---- verbs ----

    def add(self, **fields: Any) -> Sequence:
        self.log.append(("add", fields))
        sequence = Sequence(**{**fields, "token_ids": list(fields["token_ids"])})
        self.scheduler.add(sequence)
        self.live[sequence.id] = sequence
        self.texts[sequence.id] = list(sequence.token_ids)
        self.prompt_rows[sequence.id] = []
        self.num_added += 1
        self._disturb()
        return sequence

    def finish(self, sequence_id: int) -> None:
        self.log.append(("finish", sequence_id))
        self.scheduler.finish(sequence_id)
        if sequence_id in self.live:
            self._ended(sequence_id)
            self._disturb()

    def set_chunk(self, num_tokens: int) -> None:
        self.log.append(("set_chunk", num_tokens))
        self.scheduler.prefill_chunk_tokens = self.prefill_chunk_tokens = num_tokens
        self._disturb()

    def plan(self) -> Plan:
        return self._plan(is_ahead=False)

    def plan_ahead(self) -> Plan:
        return self._plan(is_ahead=True)

    def _plan(self, *, is_ahead: bool) -> Plan:
        self.log.append(("plan_ahead" if is_ahead else "plan", None))
        before = {id: _standing(sequence) for id, sequence in self.live.items()}
        counts, num_decoding = self._counts(), self.scheduler.num_decoding
        plan = self.scheduler.plan_ahead() if is_ahead else self.scheduler.plan()
        self.plans.append(plan)
        if not plan.is_empty:
            rows = [(self.live[chunk.sequence], chunk) for chunk in plan.rows]
            self.flights.append(Flight(plan, rows, before, counts, is_ahead))
            self._check_plan(self.flights[-1])
            assert len(plan.decodes) == num_decoding or self.scheduler.preemptions > counts[0]
        elif is_ahead:
            self._check_standstill(before)
        else:
            assert not self.live
        return plan

    def commit(self, choices: Items[Items[int]]) -> list[Finished]:
        """`choices` are handed out round robin as the sampled tokens; only the first of each where another step is planned."""
        self.log.append(("commit", choices))
        flight = self.flights.pop(0)
        plan, most = flight.plan, 1 if self.flights else None
        owners = {chunk.sequence: sequence for sequence, chunk in flight.rows}
        self._keep_features(plan)
        for encode in plan.encodes:
            if encode.image is not None:
                self.features.add(encode.image.digest)
            self.memory.slots.update(self.memory.encoded(owners[encode.sequence], encode.table))
        for sequence, chunk in flight.rows:
            self._run(sequence, chunk)
        sampled = [chunk.sequence for _, chunk in flight.rows if wants_token(chunk)]
        tokens = {id: list(choices[index % len(choices)])[:most] for index, id in enumerate(sampled)}
        alive = [(s, c) for s, c in flight.rows if self.live.get(s.id) is s]
        self._disturb()
        finished = self.scheduler.commit(plan, tokens)
        self._check_commit(alive, tokens, finished)
        return finished

    def drop(self, num_written: int) -> None:
        """The forward of the newest plan fails after it wrote garbage for so many tokens."""
        self.log.append(("drop", num_written))
        flight = self.flights.pop()
        plan = flight.plan
        places = [(block, slot) for encode in plan.encodes for block in encode.table for slot in range(self.memory.block_size)]
        places += [self.memory.slot(c, c.start + i) for c in plan.rows for i in range(len(c.token_ids))]
        self.memory.slots.update(dict.fromkeys(places[:num_written], GARBAGE))
        if not flight.is_ahead:
            self._keep_features(plan)
        self.scheduler.drop(plan)
        self._check_drop(flight)

    def _disturb(self) -> None:
        for flight in self.flights:
            flight.is_undisturbed = False

    def _keep_features(self, plan: Plan) -> None:
        assert self.features >= set(plan.features)
        self.features = set(plan.features)

    def replay(self) -> list[Plan]:
        """The plans of a fresh scheduler that is told the same."""
        other = WatchedScheduler(**self.settings)
        for verb, argument in self.log:
            if verb == "add":
                other.add(**argument)
            elif argument is None:
                getattr(other, verb)()
            else:
                getattr(other, verb)(argument)
        return other.plans

    def drain(self, choices: Items[Items[int]] = ((7,),)) -> None:
        """Run until nothing is left, within a number of steps that only the work itself sets."""
        while self.flights:
            self.commit(choices)
        longest = max((s.prompt_length + s.max_tokens for s in self.live.values()), default=0)
        most_steps = 2 * longest * len(self.live)
        while self.live:
            assert most_steps > 0, f"starved: {list(self.live)}"
            most_steps -= 1
            self.plan()
            self.commit(choices)
            self.check()

    # ---- checks ----

    def check(self) -> None:
        """What holds between any two calls."""
        pool = self.scheduler.pool
        running = [s for s in self.live.values() if s.state == "running"]
        waiting = [s for s in self.live.values() if s.state == "waiting"]
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (len(running), len(waiting))
        assert self.scheduler.has_work == bool(self.live)
        assert len(running) <= self.settings["max_batch_size"]
        assert all(s.table == s.cross_table == () and s.num_scheduled == 0 for s in waiting)
        assert all(len(s.cross_table) == pool.blocks_for(len(s.encoder_ids)) for s in running)
        assert all(s.token_ids == self.texts[s.id] for s in self.live.values())
        assert all(s.table == (-1,) * self._num_passed(s) + _held(s) for s in running)
        holders = Counter(block for s in running for block in _held(s) + s.cross_table)
        blocks = range(pool.num_blocks)
        assert [pool.references(block) for block in blocks] == [holders[block] for block in blocks]
        assert pool.num_used == len(holders)
        assert pool.num_idle == sum(1 for block in blocks if pool.is_findable(block) and not holders[block])
        assert pool.num_available == pool.num_blocks - len(holders)
        self._check_sharing(running, holders)

    def _check_sharing(self, running: list[Sequence], holders: Counter[int]) -> None:
        pool = self.scheduler.pool
        for sequence in running:
            held = _held(sequence) + sequence.cross_table
            assert len(set(held)) == len(held)
            private = sequence.table[max(sequence.num_published, sequence.num_passed) :]
            assert all(holders[block] == 1 and not pool.is_findable(block) for block in private)
        findable = [self.memory.block(block)[-1] for block in range(pool.num_blocks) if pool.is_findable(block)]
        assert GARBAGE not in findable
        assert len(set(findable)) == len(findable)
        assert self.settings["prefix_caching"] or not findable

    def _check_plan(self, flight: Flight) -> None:
        plan = flight.plan
        assert len({chunk.sequence for chunk in plan.rows}) == len(plan.rows)
        assert plan.step == self.scheduler.num_steps + len(self.flights) - 1
        self._check_victims(flight)
        self._check_queue(flight)
        assert {chunk.sequence for chunk in plan.decodes} == self._that_decode(flight.before)
        assert all(len(chunk.token_ids) == chunk.num_outputs == 1 for chunk in plan.decodes)
        budget = self.settings["max_prefill_tokens"]
        budget = min(budget, self.prefill_chunk_tokens) if plan.decodes else budget
        sizes = [len(chunk.token_ids) for chunk in plan.chunks]
        assert 0 not in sizes
        assert sum(sizes) <= budget or (not self.settings["chunked_prefill"] and len(sizes) == 1)
        scored = [(s, c) for s, c in flight.rows if s.wants_prompt_logits and max(s.num_prompt_rows, c.start) < s.prompt_length]
        assert sum(chunk.num_outputs for _, chunk in scored) <= self.scheduler.max_prompt_rows
        self._check_encodes(flight, budget)
        written = [self.memory.slot(c, c.start + i)[0] for c in plan.rows for i in range(len(c.token_ids))]
        written += [block for encode in plan.encodes for block in encode.table]
        assert all(self.scheduler.pool.references(b) == 1 and not self.scheduler.pool.is_findable(b) for b in written)
        for sequence, chunk in flight.rows:
            self._check_chunk(sequence, chunk)

    def _that_decode(self, before: dict[int, tuple[Any, ...]]) -> set[int]:
        """Who has no prompt left to run, but for those whose last token is on its way."""
        running = [s for s in self.live.values() if s.state == before[s.id][0] == "running" and before[s.id][2] >= s.prefill_end]
        return {s.id for s in running if before[s.id][2] < len(s.token_ids) or s.num_generated + 1 < s.max_tokens}

    def _check_standstill(self, before: dict[int, tuple[Any, ...]]) -> None:
        """Nothing is planned ahead only where encoders run, blocks lack, or those who run have nothing to run."""
        pool = self.scheduler.pool
        decoding = self._that_decode(before)
        ends = {s.id: s.num_scheduled + (s.id in decoding) for s in self.live.values() if s.state == "running"}
        lacking = sum(max(0, pool.blocks_for(end) - len(self.live[id].table)) for id, end in ends.items())
        has_prompt = any(s.num_scheduled < s.prefill_end for s in self.live.values())
        assert self.flights[0].plan.encodes or lacking > pool.num_available or not (decoding or has_prompt)

    def _check_encodes(self, flight: Flight, budget: int) -> None:
        """Whole inputs, each of a sequence that comes in, in order and within a budget of their own."""
        plan = flight.plan
        texts = [(self.live[encode.sequence], encode) for encode in plan.encodes if encode.image is None]
        images = [encode.image for encode in plan.encodes if encode.image is not None]
        assert all(flight.before[s.id][0] == "waiting" and s.state == "running" for s, _ in texts)
        assert [(e.token_ids, e.table) for _, e in texts] == [(s.encoder_ids, s.cross_table) for s, _ in texts]
        assert len({*plan.features, *(image.digest for image in images)}) == len(plan.features) + len(images)
        owners = {encode.sequence for encode in plan.encodes}
        total = sum(len(s.encoder_ids) for s, _ in texts) + sum(image.num_tokens for image in images)
        assert total <= budget or len(plan.encodes) == 1 or (not self.settings["chunked_prefill"] and len(owners) == 1)
        assert owners <= {chunk.sequence for chunk in plan.chunks}

    def _check_victims(self, flight: Flight) -> None:
        """Who was sent back is younger than all that ran before and still do, and nobody came in for it. For a plan ahead nobody
        is."""
        ran = [s for id, s in self.live.items() if flight.before[id][0] == "running"]
        victims = [s.arrival for s in ran if s.state == "waiting"]
        stayed = [s.arrival for s in ran if s.state == "running"]
        if victims:
            assert not flight.is_ahead
            assert min(victims) > max(stayed)
            assert self.scheduler.num_running == len(stayed)

    def _check_queue(self, flight: Flight) -> None:
        """Who came in passed nobody but siblings that wait for their leader."""
        came_in = [s.arrival for id, s in self.live.items() if flight.before[id][0] == "waiting" and s.state == "running"]
        passed = [s for s in self.live.values() if s.state == "waiting" and came_in and s.arrival < max(came_in)]
        assert all(s.leading and s.leading.num_computed < s.leading.prompt_length for s in passed)

    def _check_chunk(self, sequence: Sequence, chunk: Chunk) -> None:
        end = chunk.start + len(chunk.token_ids)
        is_whole = end >= len(sequence.token_ids)
        assert list(chunk.token_ids) == (sequence.token_ids[chunk.start : end] or [PENDING])
        assert (chunk.prompt_length, chunk.adapter) == (sequence.prompt_length, sequence.adapter)
        assert (chunk.cross_table, chunk.cross_length) == (sequence.cross_table, len(sequence.encoder_ids))
        shown = {span.start + i: (span.digest, span.first_row + i) for span in chunk.spans for i in range(span.num_rows)}
        contents = dict(enumerate(_contents(sequence)))
        assert shown == {p: contents[p] for p in range(chunk.start, end) if not isinstance(contents.get(p, PENDING), int)}
        assert end <= len(chunk.table) * self.memory.block_size
        assert wants_token(chunk) == is_whole
        assert is_whole or self.settings["chunked_prefill"] or sequence.wants_prompt_logits
        if not sequence.wants_prompt_logits:
            assert chunk.num_outputs == int(is_whole)

    def _first_seen(self, position: int) -> int:
        """The first position that the token at `position` looks at."""
        window = self.settings.get("window", 0)
        return max(0, position - window + 1) if window else 0

    def _num_passed(self, sequence: Sequence) -> int:
        """Blocks that it must have given back: those before the next token's window, once a plan of it was committed."""
        is_new = any(flight.before.get(sequence.id, ("",))[0] == "waiting" for flight in self.flights)
        return 0 if is_new else self._first_seen(sequence.num_computed) // self.memory.block_size

    def _run(self, sequence: Sequence, chunk: Chunk) -> None:
        """The forward of one chunk: all keys before it must be its own text's. If the sequence has ended, nobody looks at what
        comes out, and its last token may be any."""
        end = chunk.start + len(chunk.token_ids)
        texts = self.memory.texts(sequence, end)
        if self.live.get(sequence.id) is not sequence:
            texts += [GARBAGE] * (end - len(texts))
            self.memory.slots.update({self.memory.slot(chunk, position): texts[position] for position in range(chunk.start, end)})
            return
        assert self.features >= {span.digest for span in chunk.spans}
        first = self._first_seen(chunk.start)
        held = [self.memory.slots.get(self.memory.slot(chunk, position)) for position in range(first, chunk.start)]
        assert held == texts[first : chunk.start], f"sequence {sequence.id} reads keys that are not its own"
        across = self.memory.encoded(sequence, chunk.cross_table)
        assert {place: self.memory.slots.get(place) for place in across} == across, (
            f"sequence {sequence.id} reads an encoder's keys that are not its own"
        )
        for position in range(chunk.start, end):
            self.memory.slots[self.memory.slot(chunk, position)] = texts[position]

    def _check_commit(self, rows: list[tuple[Sequence, Chunk]], tokens: dict[int, list[int]], finished: list[Finished]) -> None:
        ends = {end.sequence_id: end for end in finished}
        assert len(ends) == len(finished)
        for sequence, chunk in rows:
            end = chunk.start + len(chunk.token_ids)
            rows_end = min(end, sequence.prompt_length)
            if sequence.wants_prompt_logits:
                self.prompt_rows[sequence.id] += range(end - chunk.num_outputs, rows_end)
            new = tokens.get(sequence.id, [])
            kept = _kept(sequence, self.texts[sequence.id], new)
            self.texts[sequence.id] += new[:kept]
            assert sequence.token_ids == self.texts[sequence.id]
            assert (sequence.id in ends) == _has_ended(sequence)
            if sequence.id in ends:
                assert ends[sequence.id].num_kept == kept
                self._check_prompt_rows(sequence)
                self._ended(sequence.id)

    def _check_prompt_rows(self, sequence: Sequence) -> None:
        if sequence.wants_prompt_logits:
            assert self.prompt_rows[sequence.id] == list(range(sequence.prompt_length))

    def _check_drop(self, flight: Flight) -> None:
        """Everyone stands where it stood before the plan, but for those that were preempted for it."""
        if flight.is_undisturbed and self.scheduler.preemptions == flight.counts_before[0]:
            assert self._counts() == flight.counts_before
        for id, sequence in self.live.items():
            before = flight.before.get(id)
            if before is not None and before[0] == sequence.state and flight.is_undisturbed:
                assert _standing(sequence) == before

    def _counts(self) -> tuple[int, ...]:
        s = self.scheduler
        numbers = (s.preemptions, s.num_steps, s.prefix_query_tokens, s.prefix_hit_tokens)
        return (*numbers, s.pool.num_used, s.num_running, s.num_waiting)

    def _ended(self, sequence_id: int) -> None:
        sequence = self.live.pop(sequence_id)
        self.ends[sequence.arrival] += 1
        assert sequence.state == "out"
        assert sequence.table == ()


def _held(sequence: Sequence) -> tuple[int, ...]:
    return tuple(block for block in sequence.table if block >= 0)


def _contents(sequence: Sequence) -> list[Any]:
    """What each position stands for: a token id, or a row of an image."""
    contents: list[Any] = list(sequence.token_ids)
    for placed in sequence.images:
        contents[placed.start : placed.end] = [(placed.image.digest, row) for row in range(placed.image.num_tokens)]
    return contents


def _standing(sequence: Sequence) -> tuple[Any, ...]:
    return (
        sequence.state, sequence.table, sequence.num_scheduled, sequence.num_computed, sequence.num_published,
        sequence.prefill_end, sequence.num_prompt_rows, list(sequence.token_ids),
    )  # fmt: skip


def _kept(sequence: Sequence, text: list[int], new: list[int]) -> int:
    """How many of the new tokens a sequence with this text takes."""
    for index, token in enumerate(new):
        num_generated = len(text) + index + 1 - sequence.prompt_length
        if num_generated == sequence.max_tokens or (token in sequence.stop_ids and num_generated >= sequence.min_tokens):
            return index + 1
    return len(new)


def _has_ended(sequence: Sequence) -> bool:
    last_ends = sequence.token_ids[-1] in sequence.stop_ids and sequence.num_generated >= sequence.min_tokens
    return sequence.num_generated > 0 and (last_ends or sequence.num_generated == sequence.max_tokens)
