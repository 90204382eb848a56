"""How many prompt tokens may join a step in which others decode, by how long the last steps took. Told of times, it reads no clock.

It takes for granted only that a step of more tokens takes no less time, and no more than in proportion: so from a step that was
quicker than it may be it leaps by no more than that proportion, and between two known steps it goes along the line that joins them.
"""

from collections import deque
from statistics import median_low
from typing import NamedTuple

LEAST = 16  # prompt tokens, so that each prompt gets on
NUM_ALONE, NUM_BESIDE = 9, 5  # steps that are looked back on: the median of them, for a single one may have met a busy machine


class _Step(NamedTuple):
    num_tokens: int
    seconds: float


class Pace:
    """Sizes steps so that they take at most `max_slowdown` times what their decoding sequences alone would (0: any time), with at
    least 16 prompt tokens and at most `max_tokens`."""

    def __init__(self, max_slowdown: float, max_tokens: int) -> None:
        self.max_slowdown = max_slowdown
        self.max_tokens = max_tokens
        self._alone: deque[_Step] = deque(maxlen=NUM_ALONE)  # of decoding sequences
        self._prompts: deque[_Step] = deque(maxlen=NUM_BESIDE)  # of prompt tokens, and of sequences that decode beside them

    def record(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step has run."""
        steps = self._prompts if num_prompt_tokens else self._alone
        steps.append(_Step(num_decoding + num_prompt_tokens, seconds))

    def budget(self, num_decoding: int) -> int:
        """Prompt tokens for a step in which so many sequences decode."""
        if not (self.max_slowdown and num_decoding):
            return self.max_tokens
        if not (self._alone or self._prompts):
            return min(self.max_tokens, LEAST)
        return min(self.max_tokens, max(LEAST, int(self._num_tokens(num_decoding)) - num_decoding))

    def _num_tokens(self, num_decoding: int) -> float:
        """Of the whole step. Without a larger one to go by, the decoding sequences' own is what is known."""
        alone = self._seconds_alone(num_decoding)
        larger = [step for step in self._prompts if step.num_tokens > num_decoding] or [_Step(num_decoding, alone)]
        return median_low([self._reach(step, num_decoding, alone) for step in larger])

    def _seconds_alone(self, num_decoding: int) -> float:
        """What the decoding sequences take at least: as long as fewer of them did, or their share of more; before any have been
        alone, their share of a step with prompts."""
        steps = self._alone or self._prompts
        return median_low([step.seconds * min(1.0, num_decoding / step.num_tokens) for step in steps])

    def _reach(self, step: _Step, num_decoding: int, alone: float) -> float:
        """Tokens with which a step takes as long as it may, going by one that was larger than the decoding sequences' own."""
        longest = self.max_slowdown * alone
        if step.seconds <= longest:
            return step.num_tokens * longest / step.seconds
        return num_decoding + (step.num_tokens - num_decoding) * (longest - alone) / (step.seconds - alone)
