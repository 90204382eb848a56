"""Answers as today's DJL has them in async mode, where its vLLM handler writes them (contract 8.4): each ends its line, tokens have
text-generation-inference's fields, OpenAI's bodies are answered without its framing.
"""

from typing import Any, ClassVar

from lmi_dist import Output, Token
from lmi_dist_handler.formatter import Candidate, Dialect, Formatter, Told, dumps
from lmi_dist_handler.responses import NO_TOKEN, LmiFormatter, Wishes, ranked


class TodaysFormatter(LmiFormatter):
    """Base of the LMI forms here."""

    def __init__(self, wishes: Wishes, seed: int | None) -> None:
        super().__init__(wishes)
        self.seed = seed

    def shown(self, token: Token) -> dict[str, Any]:
        fields = self.token(token, is_tgi=True)
        del fields["special"]
        return fields

    def ending(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "finish_reason": self.wishes.dialect.reason(candidate.finish_reason),
            "seed": self.seed,
            "generated_tokens": candidate.num_generated_tokens,
        }


class TodaysJson(TodaysFormatter):
    """One object, whole, at the end."""

    def _end(self) -> str:
        best, *_ = ranked(self.candidates.values())
        answer: dict[str, Any] = {"generated_text": self.full_text_prefix + best.text}
        if self.wishes.shows_details:
            prefill = [self.shown(token) for token in self.prompt_tokens.get(best.request_id, ())]
            tokens = [self.shown(token) for token in best.tokens]
            answer["details"] = {**self.ending(best), "prefill": prefill, "tokens": tokens}
        return dumps(answer) + "\n"


class TodaysLines(TodaysFormatter):
    """One line a token; the last of a candidate also has its text. An empty line ends the answer."""

    content_type: ClassVar[str] = "application/jsonlines"

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        tokens: tuple[Token, ...] = output.tokens
        if output.finish_reason is not None:
            tokens = tokens or (NO_TOKEN,)  # ended without one more token
        lines: list[dict[str, Any]] = [
            {"index": candidate.index, "token": self.shown(token), "generated_text": None, "details": None} for token in tokens
        ]
        if output.finish_reason is not None:
            details = {**self.ending(candidate), "input_length": candidate.num_prompt_tokens}
            lines[-1] |= {"generated_text": self.full_text_prefix + candidate.text, "details": details}
        return "".join(dumps(line) + "\n" for line in lines)

    def _end(self) -> str:
        return "\n"

    def _broken(self, told: Told) -> str:
        return dumps({"error": told.message, "code": told.code}) + "\n"


class Unframed(Formatter):
    """OpenAI's answer, whole, with a newline behind it."""

    dialect: ClassVar[Dialect] = "openai"

    def __init__(self, inner: Formatter) -> None:
        super().__init__(1)
        self._inner = inner

    @property
    def is_done(self) -> bool:
        return self._inner.is_done

    def push(self, output: Output) -> str:
        return _lines(self._inner.push(output))

    def error(self, error: Exception) -> Told:
        told = self._inner.error(error)
        return told._replace(text=_lines(told.text))

    def _end(self) -> str:
        return ""


class UnframedLines(Unframed):
    """OpenAI's events as plain JSON lines: without `data: ` and [DONE]."""

    content_type: ClassVar[str] = "application/jsonlines"


def unframed(inner: Formatter) -> Unframed:
    """The form of an answer to one of OpenAI's bodies."""
    return (UnframedLines if inner.content_type == "text/event-stream" else Unframed)(inner)


def _lines(text: str) -> str:
    """Events to lines; JSON has no bare newline, so that an empty line always ends an event."""
    items = (event.strip("\n").removeprefix("data: ") for event in text.split("\n\n"))
    return "".join(f"{item}\n" for item in items if item and item != "[DONE]")
