"""From logits to token ids and log probabilities: penalties, bias, sampling. Knows params and ids, neither text nor blocks.

Random numbers are a counter-based function of (the candidate's seed, the token's position in its sequence), so what a candidate
draws does not depend on the batch, on preemption or on how its prompt was cut. Log probabilities are those of the model: of the raw
logits, before penalties, bias and temperature.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lmi_dist import ops
from lmi_dist.request import SamplingParams

MASK64 = (1 << 64) - 1

# One request must not make numbers that the batch's call would refuse: fp32 with room for sums and products, and never all banned.
MOST, LEAST = 1e30, 1e-30
BANNED = -1e35


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token; `logprob` and `top` (id and log probability, most probable first) only where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def candidate_seed(seed: int, index: int) -> int:
    """The seed of candidate `index` of a request: splitmix64 (Steele et al. 2014) over both."""
    mixed = _splitmix64(seed & MASK64)
    return _splitmix64(mixed ^ index)


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


class History:
    """The ids that penalties look at, each once, with how often it was generated (0: only in the prompt). One token costs O(1)."""

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        self.ids = array("i", dict.fromkeys(prompt_ids))
        self.counts = array("i", bytes(4 * len(self.ids)))
        self._places = {id: place for place, id in enumerate(self.ids)}

    def record(self, id: int) -> None:
        place = self._places.setdefault(id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(id)
            self.counts.append(0)
        self.counts[place] += 1


@dataclass(slots=True)
class Draws:
    """What the sampler keeps of one sequence: its params and seed, and the history as far as penalties need it."""

    params: SamplingParams
    seed: int
    prompt_length: int
    stop_ids: frozenset[int] = frozenset()  # not to be chosen among the first min_tokens
    num_logprobs: int | None = None  # alternatives beside the token; None: no log probabilities
    history: History | None = None
    bias: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, params: SamplingParams, seed: int, prompt_ids: Sequence[int], stop_ids: frozenset[int], num_logprobs: int | None
    ) -> "Draws":
        """Repetition penalty looks at prompt and answer, presence and frequency penalty only at the answer."""
        repeats = params.repetition_penalty != 1.0
        penalized = repeats or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        history = History(prompt_ids if repeats else ()) if penalized else None
        bias = {id: _within(value) for id, value in params.logit_bias.items()}
        return cls(params, seed, len(prompt_ids), stop_ids, num_logprobs, history, bias)

    def record(self, id: int) -> None:
        """Take the token that was generated into the history."""
        if self.history is not None:
            self.history.record(id)

    def bias_at(self, position: int) -> dict[int, float]:
        """The client's bias, but what would end the sequence too early is banned."""
        if self.stop_ids and position - self.prompt_length < self.params.min_tokens:
            return {**self.bias, **dict.fromkeys(self.stop_ids, BANNED)}
        return self.bias


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits: whose it is, and the position in the sequence of the token to be chosen."""

    draws: Draws
    position: int


class Sampler:
    """Chooses one token a row. Stateless: what lasts over steps is in the rows' Draws."""

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
        """logits: fp32 [R,V], overwritten. One choice per row, in order; not recorded in its Draws yet."""
        wanted = [index for index, row in enumerate(rows) if row.draws.num_logprobs is not None]
        raw = logits[wanted] if wanted else None  # a copy: what follows works in place
        self._penalize(logits, rows)
        ids = self._draw(logits, rows)
        choices = [Choice(id) for id in ids]
        if raw is not None:
            tops = [rows[index].draws.num_logprobs or 0 for index in wanted]
            for index, choice in zip(wanted, self.score(raw, [ids[index] for index in wanted], tops), strict=True):
                choices[index] = choice
        return choices

    @torch.inference_mode()
    def score(self, logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> list[Choice]:
        """Log probabilities of given ids. logits: fp32 [R,V], unchanged; tops: alternatives wanted per row."""
        top = min(max(tops, default=0), logits.shape[1])
        values, _, top_values, top_ids = ops.logprobs(logits, _int32(ids, logits), top)
        columns = zip(ids, values.tolist(), top_ids.tolist(), top_values.tolist(), tops, strict=True)
        return [Choice(id, value, tuple(zip(alike, their[:num], strict=False))) for id, value, alike, their, num in columns]

    def _penalize(self, logits: Tensor, rows: Sequence[Row]) -> None:
        """In place; a row that wants nothing has an empty history and no bias."""
        biases = [row.draws.bias_at(row.position) for row in rows]
        histories = [row.draws.history for row in rows]
        if not any(biases) and not any(histories):
            return
        params = [row.draws.params for row in rows]
        ops.penalize(
            logits,
            history_starts=_starts([0 if history is None else len(history.ids) for history in histories], logits),
            history_ids=_joined([history.ids for history in histories if history is not None], logits),
            history_counts=_joined([history.counts for history in histories if history is not None], logits),
            repetition=_float32([_within(each.repetition_penalty, LEAST) for each in params], logits),
            presence=_float32([_within(each.presence_penalty) for each in params], logits),
            frequency=_float32([_within(each.frequency_penalty) for each in params], logits),
            bias_starts=_starts([len(bias) for bias in biases], logits),
            bias_ids=_int32([id for bias in biases for id in bias], logits),
            bias_values=_float32([value for bias in biases for value in bias.values()], logits),
        )

    def _draw(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        params = [row.draws.params for row in rows]
        seeds = np.array([row.draws.seed for row in rows], dtype=np.uint64)
        ids: list[int] = ops.sample(
            logits,
            _float32([each.temperature and _within(each.temperature, LEAST) for each in params], logits),
            _int32([min(each.top_k, logits.shape[1]) for each in params], logits),
            _float32([_within(each.top_p, LEAST) for each in params], logits),
            _float32([_within(each.typical_p, LEAST) for each in params], logits),
            _float32([each.min_p for each in params], logits),
            torch.from_numpy(seeds).to(logits.device),
            _int32([row.position for row in rows], logits),
        ).tolist()
        return ids


def _float32(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _within(value: float, least: float = -MOST) -> float:
    return min(max(value, least), MOST)


def _int32(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


def _starts(lengths: Sequence[int], like: Tensor) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(like.device)


def _joined(pieces: Sequence["array[int]"], like: Tensor) -> Tensor:
    """One int32 tensor of all pieces, copied as memory and not number by number."""
    whole = array("i")
    for piece in pieces:
        whole.extend(piece)
    return torch.from_numpy(np.array(whole, dtype=np.int32)).to(like.device)
