"""Engine outputs to OpenAI's answers: completions and chat, whole and as events; and DJL's chat forms, which resemble them.

OpenAI's API reference tells the shapes of /v1/*; contract 8.2 those of json_chat, jsonlines_chat and sse_chat. Of DJL's traps these
are set right: ids are random, `bytes` are UTF-8, streamed logprobs have the shape of whole ones.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmi_dist import Output, Token
from lmi_dist_handler.formatter import Candidate, Dialect, Formatter, Told, dumps, finite, openai_error

FINISH_REASONS = {"length": "length"}  # every other end is a `stop`
DJL_FINISH_REASONS = {"stop_sequence": "eos_token"}
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a client of these forms wants to see. `request_ids` in the order of its prompts; `prompts`, for echo, in the same."""

    model: str
    request_ids: Sequence[str]
    num_candidates: int = 1
    logprobs: bool = False
    include_usage: bool = False
    prompts: Sequence[str] = ()


class OpenAIFormatter(Formatter):
    """Base of all forms here: ids, order of choices, usage."""

    dialect: ClassVar[Dialect] = "openai"
    prefix: ClassVar[str] = "cmpl"
    object_name: ClassVar[str] = "text_completion"

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask.num_candidates * len(ask.request_ids))
        self.ask = ask
        self.order = {request_id: place for place, request_id in enumerate(ask.request_ids)}
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.object_name,
            "created": int(time.time()),
            "model": ask.model,
        }

    def place(self, candidate: Candidate) -> int:
        """Index of a choice: prompts in order, each with its candidates."""
        return self.order[candidate.request_id] * self.ask.num_candidates + candidate.index

    def in_order(self) -> list[Candidate]:
        return sorted(self.candidates.values(), key=self.place)

    def usage(self) -> dict[str, int]:
        prompts = {candidate.request_id: candidate.num_prompt_tokens for candidate in self.candidates.values()}
        num_prompt, num_new = sum(prompts.values()), sum(one.num_generated_tokens for one in self.candidates.values())
        return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


class OpenAIEvents(OpenAIFormatter):
    """Base of the forms that stream: one event an output, usage if asked for, [DONE]."""

    content_type: ClassVar[str] = "text/event-stream"

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self._opening = dumps(self.head).removesuffix("}")  # written once: it is most of an event
        self._closing = ', "usage": null}' if ask.include_usage else "}"

    def event(self, place: int, name: str, value: object, logprobs: dict[str, Any] | None, reason: str | None) -> str:
        """One choice's news, `value` under `name`. What is the same for every token is not JSON's to find out each time."""
        choice = (
            f'"index": {place}, "{name}": {dumps(value)}, "logprobs": {_or_null(logprobs)}, "finish_reason": {_or_null(reason)}'
        )
        return f'data: {self._opening}, "choices": [{{{choice}}}]{self._closing}\n\n'

    def _end(self) -> str:
        usage = f"data: {dumps({**self.head, 'choices': [], 'usage': self.usage()})}\n\n" if self.ask.include_usage else ""
        return usage + DONE

    def _broken(self, told: Told) -> str:
        return f"data: {dumps(openai_error(told.code, told.message, None))}\n\n{DONE}"


class Completion(OpenAIFormatter):
    """/v1/completions, whole."""

    def _end(self) -> str:
        choices = [_completion_choice(self, candidate) for candidate in self.in_order()]
        return dumps({**self.head, "choices": choices, "usage": self.usage()})


class CompletionEvents(OpenAIEvents):
    """/v1/completions, streamed. With echo the prompt comes with a candidate's first event."""

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self._offsets: dict[int, int] = {}

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        prompt = self.ask.prompts[self.order[candidate.request_id]] if is_first and self.ask.prompts else ""
        text = prompt + output.text
        prompt_tokens = self.prompt_tokens.get(candidate.request_id, ()) if prompt else ()
        if not text and not (self.ask.logprobs and output.tokens) and output.finish_reason is None:
            return ""
        place = self.place(candidate)
        logprobs = None
        if self.ask.logprobs:
            offset = self._offsets.get(place, 0)
            self._offsets[place] = offset + len(text)
            logprobs = _completion_logprobs(prompt_tokens, output.tokens, offset)
        return self.event(place, "text", text, logprobs, _reason(output.finish_reason))


class Chat(OpenAIFormatter):
    """/v1/chat/completions, whole."""

    prefix: ClassVar[str] = "chatcmpl"
    object_name: ClassVar[str] = "chat.completion"

    def _end(self) -> str:
        choices = [
            {
                "index": self.place(candidate),
                "message": {"role": "assistant", "content": candidate.text, "refusal": None},
                "logprobs": _chat_logprobs(candidate.tokens) if self.ask.logprobs else None,
                "finish_reason": _reason(candidate.finish_reason),
            }
            for candidate in self.in_order()
        ]
        return dumps({**self.head, "choices": choices, "usage": self.usage()})


class ChatEvents(OpenAIEvents):
    """/v1/chat/completions, streamed: the role first, then text, then the reason of the end."""

    prefix: ClassVar[str] = "chatcmpl"
    object_name: ClassVar[str] = "chat.completion.chunk"

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        events = [self._choice(candidate, {"role": "assistant", "content": ""})] if is_first else []
        logprobs = _chat_logprobs(output.tokens) if self.ask.logprobs and output.tokens else None
        if output.text or logprobs:
            events.append(self._choice(candidate, {"content": output.text}, logprobs))
        if output.finish_reason is not None:
            events.append(self._choice(candidate, {}, reason=_reason(output.finish_reason)))
        return "".join(events)

    def _choice(
        self, candidate: Candidate, delta: dict[str, str], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> str:
        return self.event(self.place(candidate), "delta", delta, logprobs, reason)


class DjlChat(OpenAIFormatter):
    """json_chat: DJL's chat answer, whole."""

    dialect: ClassVar[Dialect] = "lmi"
    prefix: ClassVar[str] = "chatcmpl"
    object_name: ClassVar[str] = "chat.completion"

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        del self.head["model"]

    def _end(self) -> str:
        choices = [
            {
                "index": self.place(candidate),
                "message": {"role": "assistant", "content": candidate.text},
                "logprobs": _chat_logprobs(candidate.tokens) if self.ask.logprobs else None,
                "finish_reason": _djl_reason(candidate.finish_reason),
            }
            for candidate in self.in_order()
        ]
        return dumps({**self.head, "choices": choices, "usage": self.usage()})


class DjlChatLines(DjlChat):
    """jsonlines_chat: one object a token and line."""

    content_type: ClassVar[str] = "application/jsonlines"
    object_name: ClassVar[str] = "chat.completion.chunk"

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self._introduced: set[int] = set()  # choices whose role has been told

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        tokens: Sequence[Token | None] = output.tokens
        if output.finish_reason is not None:
            tokens = tokens or [None]  # ended without one more token
        reasons = [None] * max(0, len(tokens) - 1) + [_djl_reason(output.finish_reason)]
        return "".join(self._line(candidate, token, reason) for token, reason in zip(tokens, reasons, strict=False))

    def _line(self, candidate: Candidate, token: Token | None, reason: str | None) -> str:
        place, content = self.place(candidate), {"content": token.text if token else ""}
        delta = content if place in self._introduced else {**content, "role": "assistant"}
        self._introduced.add(place)
        choice = {
            "index": place,
            "delta": delta,
            "logprobs": _chat_logprobs([token]) if self.ask.logprobs and token else None,
            "finish_reason": reason,
        }
        return self.frame(dumps({**self.head, "choices": [choice]}))

    def _end(self) -> str:
        return ""

    def _broken(self, told: Told) -> str:
        return self.frame(dumps({"error": told.message, "code": told.code}))

    def frame(self, line: str) -> str:
        return f"{line}\n"


class DjlChatEvents(DjlChatLines):
    """sse_chat: the same lines as events, [DONE] at the end."""

    content_type: ClassVar[str] = "text/event-stream"

    def _end(self) -> str:
        return DONE

    def _broken(self, told: Told) -> str:
        return super()._broken(told) + DONE

    def frame(self, line: str) -> str:
        return f"data: {line}\n\n"


def _or_null(value: object) -> str:
    return "null" if value is None else dumps(value)


def _reason(reason: str | None) -> str | None:
    return None if reason is None else FINISH_REASONS.get(reason, "stop")


def _djl_reason(reason: str | None) -> str | None:
    return None if reason is None else DJL_FINISH_REASONS.get(reason, reason)


def _completion_choice(form: Completion, candidate: Candidate) -> dict[str, Any]:
    prompt = form.ask.prompts[form.order[candidate.request_id]] if form.ask.prompts else ""
    prompt_tokens = form.prompt_tokens.get(candidate.request_id, ()) if prompt else ()
    return {
        "index": form.place(candidate),
        "text": prompt + candidate.text,
        "logprobs": _completion_logprobs(prompt_tokens, candidate.tokens, 0) if form.ask.logprobs else None,
        "finish_reason": _reason(candidate.finish_reason),
    }


def _completion_logprobs(prompt: Sequence[Token], generated: Sequence[Token], offset: int) -> dict[str, Any]:
    """Of /v1/completions; `offset` is the first token's place in the text. The first token of a prompt has null, and a special
    token of a prompt, which the tokenizer has put there, takes no place in the text."""
    tokens = (*prompt, *generated)
    offsets = []
    for place, token in enumerate(tokens):
        offsets.append(offset)
        offset += 0 if token.is_special and place < len(prompt) else len(token.text)
    tops = [{entry.text: finite(entry.logprob) for entry in token.top} for token in tokens]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": offsets,
    }


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """Of chat: each token with its bytes and its alternatives."""
    return {
        "content": [
            {
                **_spelled(token.text, token.logprob),
                "top_logprobs": [_spelled(entry.text, entry.logprob) for entry in token.top],
            }
            for token in tokens
        ]
    }


def _spelled(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode()) or None}
