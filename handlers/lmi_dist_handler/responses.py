"""Engine outputs to the LMI schema's answers: json, jsonlines, sse, raw text, in each version's dialect (contract 7.4 to 7.9).

Of DJL's traps these are set right: any text gives valid JSON, one token a line, `n` and `best_of` apart.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmi_dist import LmiError, Output, StepError, Token, TokenLogprob
from lmi_dist_handler.dialects import OURS, LmiDialect
from lmi_dist_handler.formatter import (
    Candidate,
    Dialect,
    Formatter,
    Told,
    dialect_of_route,
    dumps,
    error_body,
    explained,
    finite,
)

__all__ = [
    "Dialect", "Formatter", "Json", "JsonLines", "JsonList", "RawText", "Sse", "Told", "Wishes", "dialect_of", "error_body",
    "refusal",
]  # fmt: skip

NO_TOKEN = Token(-1, "", -1, is_special=True)  # DJL's stand-in where there is none


def dialect_of(properties: Mapping[str, str]) -> Dialect:
    """Whose words a request's route speaks; `lmi_route` is set by our host."""
    route = next((value for name, value in properties.items() if name.lower() == "lmi_route"), "")
    return dialect_of_route(route)


def refusal(properties: Mapping[str, str], error: Exception, lmi: LmiDialect = OURS) -> Told:
    """Code, message and body for a request that was refused before it had a formatter."""
    told = explained(dialect_of(properties), error)
    return told._replace(message=lmi.parse_error + told.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What an LMI client wants to see, and in whose words. `prompt` is its text."""

    prompt: str
    dialect: LmiDialect = OURS
    num_candidates: int = 1
    details: bool = False
    return_full_text: bool = False
    decoder_input_details: bool = False
    top_tokens: bool = False
    tgi_compat: bool = False

    @property
    def shows_details(self) -> bool:
        """Several candidates are told in the details object, asked for or not."""
        return self.details or self.num_candidates > 1


class LmiFormatter(Formatter):
    """Base of the forms of this file."""

    def __init__(self, wishes: Wishes) -> None:
        super().__init__(wishes.num_candidates)
        self.wishes = wishes

    @property
    def full_text_prefix(self) -> str:
        return self.wishes.prompt if self.wishes.return_full_text else ""

    def error(self, error: Exception) -> Told:
        told = super().error(error)
        is_failed_step = isinstance(error, StepError) or not isinstance(error, LmiError)
        if self.wishes.dialect.failed_in_form and is_failed_step:
            return told._replace(text=self._broken(told), in_form=True)
        return told

    def _end(self) -> str:
        return ""

    def token(self, token: Token, is_tgi: bool) -> dict[str, Any]:
        """A token's object (contract 7.6)."""
        if is_tgi:
            return {"id": token.id, "text": token.text, "logprob": finite(token.logprob), "special": token.is_special}
        return self.wishes.dialect.token(token.id, token.text, finite(token.logprob), is_special=token.is_special)

    def details(self, candidate: Candidate, is_tgi: bool, *, with_tokens: bool) -> dict[str, Any]:
        """The details object of one candidate."""
        shown: dict[str, Any] = {
            "finish_reason": self.wishes.dialect.reason(candidate.finish_reason),
            "generated_tokens": candidate.num_generated_tokens,
            "inputs": self.wishes.prompt,
        }
        if with_tokens:
            shown["tokens"] = [self.token(token, is_tgi) for token in candidate.tokens]
        if self.wishes.decoder_input_details:
            shown["prefill"] = [self.token(token, is_tgi) for token in self.prompt_tokens.get(candidate.request_id, ())]
        if self.wishes.top_tokens:
            shown["top_tokens"] = [self.alternatives(token.top, is_tgi) for token in candidate.tokens]
        return {name: value for name, value in shown.items() if name in self.wishes.dialect.details}

    def alternatives(self, top: Iterable[TokenLogprob], is_tgi: bool) -> list[dict[str, Any]]:
        return [self.token(Token(entry.id, entry.text, entry.logprob), is_tgi) for entry in top]


class Json(LmiFormatter):
    """One object, whole, at the end."""

    def _end(self) -> str:
        return dumps([self.answer()] if self.wishes.tgi_compat else self.answer())

    def answer(self) -> dict[str, Any]:
        """The object, of an answer that is done."""
        is_tgi = self.wishes.tgi_compat
        best, *others = ranked(self.candidates.values())
        shown: dict[str, Any] = {"generated_text": self.full_text_prefix + best.text}
        if self.wishes.shows_details:
            shown["details"] = self.details(best, is_tgi, with_tokens=True)
        if others:
            shown["details"] = {"inputs": self.wishes.prompt, **shown["details"]}
            shown["details"]["best_of_sequences"] = [self._other(candidate, is_tgi) for candidate in others]
        return shown

    def _other(self, candidate: Candidate, is_tgi: bool) -> dict[str, Any]:
        return {
            "generated_text": self.full_text_prefix + candidate.text,
            "finish_reason": self.wishes.dialect.reason(candidate.finish_reason),
            "generated_tokens": candidate.num_generated_tokens,
            "tokens": [self.token(token, is_tgi) for token in candidate.tokens],
        }


class JsonPieces(LmiFormatter):
    """The same object as it comes, for one candidate: what 0.26 to 0.28 make of `json`."""

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        return self._begin(is_first) + _escaped(output.text)

    def _begin(self, is_first: bool) -> str:
        return f'{self._bracket("[")}{{"generated_text": "{_escaped(self.full_text_prefix)}' if is_first else ""

    def _end(self) -> str:
        (candidate,) = self.candidates.values()
        details = self.details(candidate, self.wishes.tgi_compat, with_tokens=True) if self.wishes.details else None
        return self._close(details)

    def _broken(self, told: Told) -> str:
        return self._begin(not self.candidates) + self._close({"finish_reason": "error"})

    def _close(self, details: Mapping[str, Any] | None) -> str:
        shown = f', "details": {dumps(details)}' if details else ""
        return f'"{shown}}}{self._bracket("]")}'

    def _bracket(self, bracket: str) -> str:
        return bracket if self.wishes.tgi_compat else ""


class JsonList(Formatter):
    """A list of the objects of several prompts, in their order, whole, at the end (contract 7.10)."""

    def __init__(self, members: Mapping[str, Json]) -> None:
        """The form of each request's answer, by request id."""
        super().__init__(sum(member.wishes.num_candidates for member in members.values()))
        self.members = members

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        self.members[output.request_id].push(output)
        return ""

    def _end(self) -> str:
        return dumps([member.answer() for member in self.members.values()])


class OutputLines(Formatter):
    """One line a piece: the new text of each prompt, in their order (contract 7.10, enable_streaming)."""

    content_type: ClassVar[str] = "application/jsonlines"

    def __init__(self, request_ids: Sequence[str]) -> None:
        super().__init__(len(request_ids))
        self._request_ids = request_ids

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        texts = [output.text if request_id == output.request_id else "" for request_id in self._request_ids]
        return dumps({"outputs": texts}) + "\n"

    def _end(self) -> str:
        return ""


class JsonLines(LmiFormatter):
    """One object a token and line; the last of a candidate also has its text. Of several candidates, each line tells whose it is
    with `index`, as DJL has it from 0.36 on."""

    content_type: ClassVar[str] = "application/jsonlines"
    is_tgi = False

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        lines = [self._line(candidate.index, self.token(token, self.is_tgi)) for token in output.tokens]
        if output.finish_reason is not None:
            lines = lines or [self._line(candidate.index, self.token(NO_TOKEN, self.is_tgi))]  # ended without one more token
            lines[-1] |= self._last(candidate)
        return "".join(self.frame(dumps(line)) for line in lines)

    def _line(self, index: int, token: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "token": token} if self.wishes.num_candidates > 1 else {"token": token}

    def _last(self, candidate: Candidate) -> dict[str, Any]:
        shown: dict[str, Any] = {"generated_text": self.full_text_prefix + candidate.text}
        if self.wishes.details:
            shown["details"] = self.details(candidate, self.is_tgi, with_tokens=False)
        return shown

    def _broken(self, told: Told) -> str:
        """A last line for each candidate that has not had one."""
        texts = dict.fromkeys(range(self.wishes.num_candidates), "")
        texts |= {one.index: one.text for one in self.candidates.values()}
        ended = {one.index for one in self.candidates.values() if one.finish_reason is not None}
        failed = {**self.token(NO_TOKEN, self.is_tgi), "error_msg": told.message}
        lines = [
            {
                **self._line(index, failed),
                "generated_text": self.full_text_prefix + text,
                "details": {"finish_reason": "error"},
            }
            for index, text in texts.items()
            if index not in ended
        ]
        return "".join(self.frame(dumps(line)) for line in lines)

    def frame(self, line: str) -> str:
        return f"{line}\n"


class Sse(JsonLines):
    """The same lines as server-sent events."""

    content_type: ClassVar[str] = "text/event-stream"

    def __init__(self, wishes: Wishes) -> None:
        super().__init__(wishes)
        self.is_tgi = wishes.tgi_compat

    def frame(self, line: str) -> str:
        return f"data: {line}\n\n"


class RawText(LmiFormatter):
    """The text and nothing else."""

    content_type: ClassVar[str] = "text/plain"

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        return (self.full_text_prefix if is_first else "") + output.text

    def _broken(self, told: Told) -> str:
        return f"\n{told.text}"


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The most probable first."""
    return sorted(candidates, key=lambda one: (-one.cumulative_logprob, one.index))


def _escaped(text: str) -> str:
    """Text as it stands between a JSON string's quotes."""
    return dumps(text)[1:-1]
