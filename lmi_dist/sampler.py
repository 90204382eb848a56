"""From logits to token ids and log probabilities: penalties, bias, sampling. Knows params and ids, neither text nor blocks.

Random numbers are a counter-based function of (the candidate's seed, the token's position in its sequence), so what a candidate
draws does not depend on the batch, on preemption or on how its prompt was cut. Log probabilities are those of the model: of the raw
logits, before penalties, bias and temperature.

A device is given its work and goes on; what it comes to is asked for later, of Draft and Scores.
"""

import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmi_dist import ops
from lmi_dist.request import SamplingParams
from lmi_dist.staging import Parcel, to_device

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


class Draft:
    """Tokens that the device chooses. ids: int32 [R], where they are chosen; -1 for a row that leaves nothing to choose."""

    def __init__(self, ids: Tensor, told: Sequence[Tensor], wanted: Sequence[int], tops: Sequence[int]) -> None:
        """told: values, the best ones' values and ids of the rows `wanted`; tops: how many of these each wants."""
        self.ids = ids
        self._parcel, self._wanted, self._tops = Parcel([ids, *told]), wanted, tops

    def wait(self) -> list[Choice | None]:
        """One a row, in order, not recorded in its Draws yet; None for a row that leaves nothing to choose."""
        ids, *told = self._parcel.open()
        choices = [None if id < 0 else Choice(id) for id in ids.tolist()]
        if told:
            chosen = [choice for index in self._wanted if (choice := choices[index]) is not None]
            places = [place for place, index in enumerate(self._wanted) if choices[index] is not None]
            scored = _choices([choice.id for choice in chosen], [part[places] for part in told], [self._tops[p] for p in places])
            for place, choice in zip(places, scored, strict=True):
                choices[self._wanted[place]] = choice
        return choices


class Scores:
    """Log probabilities of given tokens, that the device works out."""

    def __init__(self, ids: Sequence[int], ranks: Tensor, told: Sequence[Tensor], tops: Sequence[int]) -> None:
        self._ids, self._tops, self._parcel = ids, tops, Parcel([ranks, *told])

    def wait(self) -> list[Choice] | None:
        """One a row, in order; None if a row has a NaN or no logit above -infinity."""
        ranks, *told = self._parcel.open()
        return None if (ranks < 0).any() else _choices(self._ids, told, self._tops)


def _choices(ids: Sequence[int], told: Sequence[Tensor], tops: Sequence[int]) -> list[Choice]:
    columns = zip(ids, *(part.tolist() for part in told), tops, strict=True)
    return [Choice(id, value, tuple(zip(alike, their[:num], strict=False))) for id, value, their, alike, num in columns]


class Sampler:
    """Chooses one token a row. What lasts over steps is in the rows' Draws; here is only what the device was told of them last."""

    def __init__(self) -> None:
        self._told: tuple[list[Draws], dict[str, Tensor]] = ([], {})

    @torch.inference_mode()
    def draw(self, logits: Tensor, rows: Sequence[Row], places: Sequence[int] | None = None) -> Draft:
        """One choice a row, from logits: fp32 [R,V], or from those of its rows that `places` names; they are overwritten."""
        wanted = [index for index, row in enumerate(rows) if row.draws.num_logprobs is not None]
        there = self._tell(rows, places, wanted, logits)
        logits = logits if places is None else logits.index_select(0, there["places"])
        raw = _rows(logits, wanted, there).clone() if wanted else None  # what follows works in place
        if "repetition" in there:
            ops.penalize(logits, **{name: there[name] for name in PENALTIES})
        ids = ops.sample(logits, **{name: there[name] for name in SETTINGS}, positions=there["positions"])
        tops = [rows[index].draws.num_logprobs or 0 for index in wanted]
        told = () if raw is None else _told(raw, _rows(ids, wanted, there), tops)[1:]
        return Draft(ids, told, wanted, tops)

    @torch.inference_mode()
    def score(self, logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> Scores:
        """Log probabilities of given ids. logits: fp32 [R,V], unchanged; tops: alternatives wanted per row."""
        ranks, *told = _told(logits, to_device({"ids": _int32(ids)}, logits.device)["ids"], tops)
        return Scores(ids, ranks, told, tops)

    def _tell(self, rows: Sequence[Row], places: Sequence[int] | None, wanted: Sequence[int], logits: Tensor) -> dict[str, Tensor]:
        """Everything that the device needs to know, by name; settings only if they are not those of the last time."""
        draws = [row.draws for row in rows]
        arrays = {"positions": _int32([row.position for row in rows]), **_penalties(rows)}
        if places is not None:
            arrays["places"] = _int32(places)
        if wanted and len(wanted) < len(rows):
            arrays["wanted"] = _int32(wanted)
        before, settings = self._told
        is_known = bool(settings) and len(before) == len(draws) and all(map(operator.is_, before, draws))
        there = to_device(arrays if is_known else arrays | _settings(draws, logits.shape[1]), logits.device)
        if is_known:
            return there | settings
        self._told = draws, {name: there[name] for name in SETTINGS}
        return there


SETTINGS = ("temperature", "top_k", "top_p", "typical_p", "min_p", "seeds")
PENALTIES = (
    "history_starts", "history_ids", "history_counts", "repetition", "presence", "frequency", "bias_starts", "bias_ids",
    "bias_values",
)  # fmt: skip


def _settings(draws: Sequence[Draws], vocabulary: int) -> dict[str, NDArray[Any]]:
    """SETTINGS, a row each; they stay as they are as long as the sequence lives."""
    params = [each.params for each in draws]
    return {
        "temperature": _float32([each.temperature and _within(each.temperature, LEAST) for each in params]),
        "top_k": _int32([min(each.top_k, vocabulary) for each in params]),
        "top_p": _float32([_within(each.top_p, LEAST) for each in params]),
        "typical_p": _float32([_within(each.typical_p, LEAST) for each in params]),
        "min_p": _float32([each.min_p for each in params]),
        "seeds": np.array([each.seed for each in draws], np.uint64),
    }


def _penalties(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    """PENALTIES, or nothing if no row has any; a row that wants none has an empty history and no bias."""
    biases = [row.draws.bias_at(row.position) for row in rows]
    histories = [row.draws.history for row in rows]
    if not any(biases) and not any(histories):
        return {}
    params = [row.draws.params for row in rows]
    known = [history for history in histories if history is not None]
    return {
        "history_starts": _starts([0 if history is None else len(history.ids) for history in histories]),
        "history_ids": _joined([history.ids for history in known]),
        "history_counts": _joined([history.counts for history in known]),
        "repetition": _float32([_within(each.repetition_penalty, LEAST) for each in params]),
        "presence": _float32([_within(each.presence_penalty) for each in params]),
        "frequency": _float32([_within(each.frequency_penalty) for each in params]),
        "bias_starts": _starts([len(bias) for bias in biases]),
        "bias_ids": _int32([id for bias in biases for id in bias]),
        "bias_values": _float32([value for bias in biases for value in bias.values()]),
    }


def _told(logits: Tensor, ids: Tensor, tops: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranks, log probabilities, and those and the ids of the best, as many as any row wants."""
    values, ranks, top_values, top_ids = ops.logprobs(logits, ids, min(max(tops, default=0), logits.shape[1]))
    return ranks, values, top_values, top_ids


def _rows(x: Tensor, wanted: Sequence[int], there: dict[str, Tensor]) -> Tensor:
    """x: [R,...]; those of its rows, as `there` has them if they are not all."""
    return x.index_select(0, there["wanted"]) if "wanted" in there else x


def _float32(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def _within(value: float, least: float = -MOST) -> float:
    return min(max(value, least), MOST)


def _int32(values: Sequence[int]) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def _starts(lengths: Sequence[int]) -> NDArray[np.int32]:
    return np.cumsum([0, *lengths], dtype=np.int32)


def _joined(pieces: "Sequence[array[int]]") -> NDArray[np.int32]:
    """One array of all pieces, copied as memory and not number by number."""
    whole = array("i")
    for piece in pieces:
        whole.extend(piece)
    return np.array(whole, np.int32)
