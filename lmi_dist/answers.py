"""What is known of requests while they are answered: a Job for each, a Candidate for each of its sequences. Choices in, Outputs
out.

A candidate knows how its text ends; which sequences run, and where their keys are, is the scheduler's business.
"""

import time
from dataclasses import dataclass, field, replace

from lmi_dist.request import FinishReason, ModelInput, Output, Request, SamplingParams, Token, TokenLogprob
from lmi_dist.sampler import Choice, Draws, candidate_seed
from lmi_dist.sequence import Finished
from lmi_dist.text import StopStrings, TextDecoder, TextStream


class Job:
    """A request that is being answered, with its `num_candidates` candidates."""

    def __init__(
        self,
        request: Request,
        input: ModelInput,
        seed: int,
        eos_ids: frozenset[int],
        text: TextDecoder,
        first_sequence: int,
    ) -> None:
        """The candidates get the sequence ids from `first_sequence` on."""
        params = request.params
        self.request = request
        self.params: SamplingParams = params
        self.input = input
        self.prompt_ids = input.token_ids
        self.text = text
        self.eos_ids = frozenset() if params.ignore_eos else eos_ids
        self.stop_ids = self.eos_ids | frozenset(params.stop_token_ids)
        self.prompt_choices: list[Choice] = []  # of the prompt's second token and on, with prompt_logprobs
        self._stop = StopStrings(params.stop)
        self._wants_prompt = params.prompt_logprobs is not None
        self.added_at = time.perf_counter()
        self.has_begun = False  # its first step has been planned
        self._held: list[Output] = []
        self.candidates = [
            Candidate(self, index, first_sequence + index, candidate_seed(seed, index)) for index in range(params.num_candidates)
        ]

    @property
    def is_ranked(self) -> bool:
        """Whether more candidates are generated than returned, so that nothing is sent before all have ended."""
        return self.params.num_candidates > self.params.n

    @property
    def is_finished(self) -> bool:
        return all(candidate.is_finished for candidate in self.candidates)

    def stream(self) -> TextStream:
        return TextStream(
            self.text,
            self.prompt_ids,
            skip_special_tokens=self.params.skip_special_tokens,
            stop=self._stop,
            include_stop_string=self.params.include_stop_string,
            min_tokens=self.params.min_tokens,
        )

    def release(self, output: Output) -> list[Output]:
        """What may be sent now that a candidate has said this: the same, or nothing until the best are known."""
        if not self.is_ranked:
            return [output]
        self._held.append(output)
        return self._best() if self.is_finished else []

    def _best(self) -> list[Output]:
        """One output for each of the n best: by cumulative log probability, those that failed last, ties by index."""
        whole = [_joined([output for output in self._held if output.index == index]) for index in range(len(self.candidates))]
        whole.sort(key=lambda output: (output.finish_reason in ("error", "abort"), -output.cumulative_logprob, output.index))
        prompt = self.take_prompt_tokens()
        return [replace(output, index=i, prompt_tokens=() if i else prompt) for i, output in enumerate(whole[: self.params.n])]

    def take_prompt_tokens(self) -> tuple[Token, ...]:
        """The prompt's tokens with their log probabilities, once, when they are wanted and known."""
        if not self._wants_prompt or len(self.prompt_choices) < len(self.prompt_ids) - 1:
            return ()
        self._wants_prompt = False
        stream = TextStream(self.text, skip_special_tokens=False)
        tokens = [self.token(choice) for choice in (Choice(self.prompt_ids[0]), *self.prompt_choices)]
        return tuple(released for token in tokens for released in stream.push(token)) + stream.flush()

    def token(self, choice: Choice) -> Token:
        """A choice as the client sees it, still without text."""
        top = tuple(TokenLogprob(id, self.text.piece(id), logprob, rank) for rank, (id, logprob) in enumerate(choice.top))
        return Token(choice.id, "", choice.logprob, choice.id in self.text.special_ids, top)


@dataclass(slots=True, eq=False)
class Candidate:
    """One of a job's sequences, from its first token to its end."""

    job: Job
    index: int
    sequence_id: int
    seed: int
    num_generated: int = 0
    cumulative_logprob: float = 0.0
    is_finished: bool = False
    draws: Draws = field(init=False)
    stream: TextStream = field(init=False)

    def __post_init__(self) -> None:
        params = self.job.params
        num_logprobs = 0 if params.logprobs is None and self.job.is_ranked else params.logprobs
        self.draws = Draws.of(params, self.seed, self.job.prompt_ids, self.job.stop_ids, num_logprobs)
        self.stream = self.job.stream()

    def take(self, choice: Choice, ended: Finished | None) -> Output:
        """The next token, which its draws know already, and how the scheduler has ended the sequence with it, if it has."""
        self.num_generated += 1
        self.cumulative_logprob += choice.logprob or 0.0
        token = self.job.token(choice if self.job.params.logprobs is not None else Choice(choice.id))
        is_stop = ended is not None and ended.reason == "eos_token"
        tokens = (*self.stream.flush(), token) if is_stop else self.stream.push(token)
        if ended is not None:
            tokens += self.stream.flush()
        return self._output(tokens, *self._ending(choice.id, ended))

    def end(self, reason: FinishReason, error: Exception | None = None) -> Output:
        """Over, by no doing of its own."""
        return self._output(self.stream.flush(), reason, error=error)

    def _ending(self, id: int, ended: Finished | None) -> tuple[FinishReason | None, str | int | None]:
        """Reason and what matched. A stop string counts more than whatever else came with the same token."""
        if self.stream.stop_string is not None:
            return "stop_sequence", self.stream.stop_string
        if ended is None or ended.reason == "length":
            return (None if ended is None else "length"), None
        return ("eos_token", None) if id in self.job.eos_ids else ("stop_sequence", id)

    def _output(
        self,
        tokens: tuple[Token, ...],
        reason: FinishReason | None,
        matched: str | int | None = None,
        error: Exception | None = None,
    ) -> Output:
        self.is_finished = reason is not None
        tells_prompt = self.index == 0 and not self.job.is_ranked
        return Output(
            request_id=self.job.request.id,
            index=self.index,
            text="".join([token.text for token in tokens]),
            tokens=tokens,
            finish_reason=reason,
            error=error,
            num_prompt_tokens=self.job.input.num_tokens,
            num_generated_tokens=self.num_generated,
            cumulative_logprob=self.cumulative_logprob,
            prompt_tokens=self.job.take_prompt_tokens() if tells_prompt else (),
            stop_reason=matched,
        )


def _joined(outputs: list[Output]) -> Output:
    """All that one candidate has said, in one output."""
    tokens = tuple(token for output in outputs for token in output.tokens)
    return replace(outputs[-1], tokens=tokens, text="".join([token.text for token in tokens]))
