"""What all forms of an answer share: collecting candidates, JSON as it leaves the house, and errors in each dialect's words."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from lmi_dist import LmiError, Output, OverloadedError, RequestError, Token

Dialect = Literal["lmi", "openai", "tgi"]

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say
SERVER_FAULTS = (424, 507)  # DJL's codes for what OpenAI calls 500
TGI_ROUTES = ("/", "/generate", "/generate_stream")

# names of DJL's exceptions, which its clients find in `type`
JAVA_TYPES = {
    400: "BadRequestException", 401: "BadRequestException", 404: "ResourceNotFoundException", 405: "MethodNotAllowedException",
    413: "BadRequestException", 415: "BadRequestException", 503: "ServiceUnavailableException",
}  # fmt: skip

# OpenAI's type and code of an error by status
OPENAI_TYPES: dict[int, tuple[str, str | None]] = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}


# text-generation-inference's error_type by status
TGI_TYPES = {413: "validation", 422: "validation", 424: "generation", 429: "overloaded", 503: "unavailable", 507: "generation"}


class UnavailableError(LmiError):
    """The model answers no requests yet, or no more."""

    code = 503


class Told(NamedTuple):
    """An error as a client hears it: status, sentence, and the text that goes into the body, which alone tells it if `in_form`."""

    code: int
    message: str
    text: str
    in_form: bool = False


def dialect_of_route(path: str) -> Dialect:
    """Whose words are spoken on a route; what is neither OpenAI's nor text-generation-inference's is DJL's."""
    return "openai" if path.startswith("/v1/") else "tgi" if path in TGI_ROUTES else "lmi"


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)  # json.dumps would make one for every token


def dumps(value: object) -> str:
    """JSON in one line, text unescaped, never NaN."""
    return _ENCODER.encode(value)


def finite(logprob: float | None) -> float | None:
    """A log probability that JSON can say."""
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)


def error_body(dialect: Dialect, code: int, message: str, *, param: str | None = None, type: str | None = None) -> str:
    """The body of an error (contract 2.6, 6.5; OpenAI's error object). `param`: the field at fault, `type`: not the usual."""
    if dialect == "openai":
        return dumps(openai_error(code, message, param, type)) + "\n"
    if dialect == "tgi":
        return dumps(tgi_error(code, message))
    if code in SERVER_FAULTS:
        told = {"code": code, "message": "prediction failure", "error": message}
        return json.dumps(told, ensure_ascii=False, indent=2, separators=(",", ":"))
    host = {"code": code, "type": type or JAVA_TYPES.get(code, "InternalServerException"), "message": message}
    return json.dumps(host, ensure_ascii=False, indent=2) + "\n"


def openai_error(code: int, message: str, param: str | None, type: str | None = None) -> dict[str, object]:
    """OpenAI's error object for a status."""
    usual = ("invalid_request_error", None) if code < 500 else ("server_error", None)
    kind, name = OPENAI_TYPES.get(code, usual)
    return {"error": {"message": message, "type": type or kind, "param": param, "code": name}}


def tgi_error(code: int, message: str) -> dict[str, str]:
    """text-generation-inference's error object for a status."""
    return {"error": message, "error_type": TGI_TYPES.get(code, "request" if code < 500 else "internal")}


def explained(dialect: Dialect, error: Exception) -> Told:
    """An exception as the whole body of an answer."""
    code, message = status(dialect, error), sentence(error)
    param = error.field if isinstance(error, RequestError) else None
    return Told(code, message, error_body(dialect, code, message, param=param))


def status(dialect: Dialect, error: Exception) -> int:
    """HTTP status: DJL has 424 for most of it; others tell the client's faults (400, 422), want of room (429) and ours apart."""
    code = error.code if isinstance(error, LmiError) else 424
    if dialect == "lmi":
        return code
    if isinstance(error, RequestError):
        return 400 if dialect == "openai" else 422
    if isinstance(error, OverloadedError):
        return 429
    return 500 if dialect == "openai" and code in SERVER_FAULTS else code


def sentence(error: Exception) -> str:
    """Our own errors speak for themselves; of others the type is told too."""
    return str(error) if isinstance(error, LmiError) else f"internal error: {type(error).__name__}: {error}"


@dataclass(slots=True)
class Candidate:
    """What has come of one candidate so far."""

    request_id: str
    index: int
    pieces: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, output: Output) -> None:
        self.pieces.append(output.text)
        self.tokens += output.tokens
        self.num_prompt_tokens = output.num_prompt_tokens or self.num_prompt_tokens
        self.num_generated_tokens = output.num_generated_tokens or self.num_generated_tokens
        self.cumulative_logprob = output.cumulative_logprob
        self.finish_reason = output.finish_reason


class Formatter(ABC):
    """Turns the outputs of one HTTP request's engine requests into the text of its answer, as it comes."""

    content_type: ClassVar[str] = "application/json"
    dialect: ClassVar[Dialect] = "lmi"

    def __init__(self, num_candidates: int) -> None:
        self._num_open = num_candidates
        self._has_spoken = False
        self.candidates: dict[tuple[str, int], Candidate] = {}
        self.prompt_tokens: dict[str, tuple[Token, ...]] = {}  # by request id: all its candidates share them

    @property
    def is_done(self) -> bool:
        """All candidates of all requests have ended; nothing more comes."""
        return self._num_open == 0

    def push(self, output: Output) -> str:
        """Text to append to the body now; "" while there is none. An output with an error belongs to `error`."""
        key = (output.request_id, output.index)
        candidate = self.candidates.get(key)
        is_first = candidate is None
        if candidate is None:
            candidate = self.candidates[key] = Candidate(*key)
        candidate.add(output)
        if output.prompt_tokens:
            self.prompt_tokens[output.request_id] = output.prompt_tokens
        self._num_open -= output.finish_reason is not None
        text = self._piece(candidate, output, is_first) + (self._end() if self.is_done else "")
        self._has_spoken = self._has_spoken or bool(text)
        return text

    def error(self, error: Exception) -> Told:
        """How the answer ends on `error`: the whole body, or what ends a body that has begun."""
        self._num_open = 0
        told = explained(self.dialect, error)
        return told._replace(text=self._broken(told)) if self._has_spoken else told

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        """Text for one output; forms that come whole have none."""
        return ""

    @abstractmethod
    def _end(self) -> str:
        """Text after the last output."""

    def _broken(self, told: Told) -> str:
        """Text that ends a body that has begun."""
        return told.text
