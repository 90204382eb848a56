"""Engine outputs to text-generation-inference's answers: one object, or one event a token, as its router (3.x) writes them.

Not to be confused with the LMI schema under tgi_compat (contract 7.9), which only borrows names from here.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lmi_dist import Output, Token
from lmi_dist_handler.formatter import Candidate, Dialect, Formatter, Told, dumps, finite, tgi_error
from lmi_dist_handler.responses import ranked

NO_TOKEN = Token(-1, "", -1.0, is_special=True)  # where a stream ends without one more token


@dataclass(frozen=True, slots=True, kw_only=True)
class TgiWishes:
    """What a client of text-generation-inference wants to see. `seed` is None for greedy answers."""

    prompt: str
    num_candidates: int = 1
    seed: int | None = None
    details: bool = False
    return_full_text: bool = False
    top_tokens: bool = False
    is_listed: bool = False  # the object alone in a list, as on the route /


class TgiFormatter(Formatter):
    """Base of both forms."""

    dialect: ClassVar[Dialect] = "tgi"

    def __init__(self, wishes: TgiWishes) -> None:
        super().__init__(wishes.num_candidates)
        self.wishes = wishes

    def text(self, candidate: Candidate) -> str:
        return (self.wishes.prompt if self.wishes.return_full_text else "") + candidate.text

    def ending(self, candidate: Candidate) -> dict[str, Any]:
        """How a candidate ended: what the details of both forms begin with."""
        return {
            "finish_reason": candidate.finish_reason,
            "generated_tokens": candidate.num_generated_tokens,
            "seed": self.wishes.seed,
        }

    def token(self, token: Token) -> dict[str, Any]:
        return {"id": token.id, "text": token.text, "logprob": finite(token.logprob), "special": token.is_special}

    def top(self, token: Token) -> list[dict[str, Any]]:
        return [self.token(Token(entry.id, entry.text, entry.logprob)) for entry in token.top]


class Tgi(TgiFormatter):
    """One object, whole, at the end."""

    def _end(self) -> str:
        best, *others = ranked(self.candidates.values())
        shown: dict[str, Any] = {"generated_text": self.text(best)}
        if self.wishes.details:
            shown["details"] = self._details(best)
        if self.wishes.details and others:
            sequences = [{"generated_text": self.text(candidate), **self._details(candidate)} for candidate in others]
            shown["details"]["best_of_sequences"] = sequences
        return dumps([shown] if self.wishes.is_listed else shown)

    def _details(self, candidate: Candidate) -> dict[str, Any]:
        prompt_tokens = self.prompt_tokens.get(candidate.request_id, ())
        tops = {"top_tokens": [self.top(token) for token in candidate.tokens]} if self.wishes.top_tokens else {}
        return {
            **self.ending(candidate),
            "prefill": [{"id": token.id, "text": token.text, "logprob": finite(token.logprob)} for token in prompt_tokens],
            "tokens": [self.token(token) for token in candidate.tokens],
            **tops,
        }


class TgiEvents(TgiFormatter):
    """One event a token; the last also has the text."""

    content_type: ClassVar[str] = "text/event-stream"

    def __init__(self, wishes: TgiWishes) -> None:
        super().__init__(wishes)
        self._num_events = 0

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        is_last = output.finish_reason is not None
        tokens = output.tokens or ((NO_TOKEN,) if is_last else ())
        last = tokens[-1] if is_last else None
        return "".join(self._event(token, candidate if token is last else None) for token in tokens)

    def _event(self, token: Token, ended: Candidate | None) -> str:
        """The event of a token; `ended` with the last one."""
        self._num_events += 1
        details = None
        if ended is not None and self.wishes.details:
            details = {**self.ending(ended), "input_length": ended.num_prompt_tokens}
        tops = {"top_tokens": self.top(token)} if self.wishes.top_tokens else {}
        generated_text = self.text(ended) if ended is not None else None
        shown = {
            "index": self._num_events,
            "token": self.token(token),
            **tops,
            "generated_text": generated_text,
            "details": details,
        }
        return f"data: {dumps(shown)}\n\n"

    def _end(self) -> str:
        return ""

    def _broken(self, told: Told) -> str:
        return f"data: {dumps(tgi_error(told.code, told.message))}\n\n"
