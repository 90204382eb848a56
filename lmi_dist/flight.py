"""A step on its way through the device: its plan, its forward, the choice of its tokens, and at last what the host learns of them.

What goes wrong on the way is kept, and raised by `wait`.
"""

from collections.abc import Callable, Container, Mapping

from torch import Tensor

from lmi_dist.answers import Candidate, Job
from lmi_dist.batch import Chosen
from lmi_dist.plan import Chunk, Plan
from lmi_dist.sampler import Choice, Draft, Row, Sampler, Scores
from lmi_dist.scheduler import wants_token


class Flight:
    """One step. `launch` and `draw` give the device work, in this order and each once; `wait` waits for it."""

    def __init__(self, plan: Plan, launched_at: float) -> None:
        self.plan = plan
        self.launched_at = launched_at
        self.error: Exception | None = None
        self._logits: Tensor | None = None
        self._candidates: list[Candidate] = []  # of the drawn rows
        self._draft: Draft | None = None
        self._scores: list[tuple[Job, Scores]] = []

    def launch(self, forward: Callable[[], Tensor]) -> None:
        """forward: gives fp32 logits [R,V], as Runner.forward does."""
        try:
            self._logits = forward()
        except Exception as error:
            self.error = error

    def draw(self, sampler: Sampler, candidates: Mapping[int, Candidate], ended: Container[int] = ()) -> None:
        """Choose the next token of each sequence whose chunk wants one, and score prompts. candidates: by sequence; those that are
        not there, or have `ended`, are passed over."""
        if self._logits is None:
            return
        try:
            self._draw(sampler, self._logits, candidates, ended)
        except Exception as error:
            self.error = error

    def _draw(self, sampler: Sampler, logits: Tensor, candidates: Mapping[int, Candidate], ended: Container[int]) -> None:
        rows, places = [], []
        end = 0
        for chunk in self.plan.rows:
            start, end = end, end + chunk.num_outputs
            candidate = candidates.get(chunk.sequence)
            if candidate is None or chunk.sequence in ended:
                continue
            self._score_prompt(sampler, candidate.job, chunk, logits[start:end])
            if wants_token(chunk):
                self._candidates.append(candidate)
                rows.append(Row(candidate.draws, chunk.start + len(chunk.token_ids)))
                places.append(end - 1)
        if rows:
            self._draft = sampler.draw(logits, rows, places if len(places) < len(logits) else None)

    def _score_prompt(self, sampler: Sampler, job: Job, chunk: Chunk, logits: Tensor) -> None:
        """The chunk's rows tell about the tokens behind theirs; score those that are in the prompt. logits: [num_outputs,V]"""
        if job.params.prompt_logprobs is None or not chunk.num_outputs:
            return
        first = chunk.start + len(chunk.token_ids) - chunk.num_outputs + 1
        ids = job.prompt_ids[first : first + chunk.num_outputs]
        if ids:
            self._scores.append((job, sampler.score(logits[: len(ids)], ids, [job.params.prompt_logprobs] * len(ids))))

    @property
    def chosen(self) -> Chosen | None:
        """Where the next step's PENDING tokens are."""
        if self._draft is None:
            return None
        return Chosen(self._draft.ids, {candidate.sequence_id: row for row, candidate in enumerate(self._candidates)})

    def wait(self) -> tuple[list[tuple[Candidate, Choice]], list[Job]]:
        """The choices, in the plan's order, and the requests whose logits left nothing to choose or were no numbers (NaN, all minus
        infinity), which have none. Prompts' scores go to their jobs. Candidates that have ended meanwhile are passed over.
        Raises what went wrong on the way."""
        if self.error is not None:
            raise self.error
        broken: dict[Job, None] = {}
        for job, scores in self._scores:
            told = scores.wait()
            if told is None:
                broken[job] = None
            else:
                job.prompt_choices += told
        drawn = zip(self._candidates, self._draft.wait() if self._draft is not None else (), strict=True)
        going = [(candidate, choice) for candidate, choice in drawn if not candidate.is_finished]
        broken |= {candidate.job: None for candidate, choice in going if choice is None}
        return [(candidate, choice) for candidate, choice in going if choice is not None and candidate.job not in broken], list(
            broken
        )
