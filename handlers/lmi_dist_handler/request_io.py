"""The classes that a model's own formatters see, those of djl_python.request_io in DJL 0.29 (contract 7.8), and marks.

Names and defaults are DJL's. Only `request_id` has one that it does not have there: the example in DJL's guide leaves it out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def input_formatter(function: Function) -> Function:
    """Decorator of model.py: this function reads requests."""
    function.is_input_formatter = True  # type: ignore[attr-defined]  # the mark that is looked for
    return function


def output_formatter(function: Function) -> Function:
    """Decorator of model.py: this function writes answers."""
    function.is_output_formatter = True  # type: ignore[attr-defined]  # the mark that is looked for
    return function


@dataclass
class Token:
    """A generated or prompt token."""

    id: int
    text: str
    log_prob: float | None = None
    special_token: bool | None = None
    error_msg: str | None = None
    request_id: int | None = None  # told only to functions of before 0.28

    def as_dict(self) -> dict[str, Any]:
        more = {"special_token": self.special_token, "error_msg": self.error_msg}
        return {
            "id": self.id,
            "text": self.text,
            "log_prob": self.log_prob,
            **{name: value for name, value in more.items() if value},
        }

    def as_tgi_dict(self) -> dict[str, Any]:
        special = {"special": True} if self.special_token else {}
        return {"id": self.id, "text": self.text, "logprob": self.log_prob, **special}


@dataclass
class Sequence:
    """One candidate; its tokens are also handed out one after the other."""

    tokens: list[Token] = field(default_factory=list)
    top_tokens: list[list[Token]] = field(default_factory=list)
    cumulative_log_prob: float = 0.0
    finish_reason: str | None = None
    stop_reason: str | None = None
    _num_taken: int = 0
    _num_tops_taken: int = 0

    def has_next_token(self) -> bool:
        return self._num_taken < len(self.tokens)

    def get_next_token(self) -> tuple[Token | None, bool, bool]:
        """The next token that was not handed out yet, whether it is the first, and whether it is the last of all."""
        if not self.has_next_token():
            return None, False, False
        place, self._num_taken = self._num_taken, self._num_taken + 1
        return self.tokens[place], place == 0, self.finish_reason is not None and self._num_taken == len(self.tokens)

    def has_next_top_tokens(self) -> bool:
        return self._num_tops_taken < len(self.top_tokens)

    def get_next_top_tokens(self) -> list[Token] | None:
        if not self.has_next_top_tokens():
            return None
        self._num_tops_taken += 1
        return self.top_tokens[self._num_tops_taken - 1]


@dataclass
class RequestInput:
    """What a request asks for."""

    request_id: int = 0
    output_formatter: Callable[..., str] | str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    server_parameters: dict[str, Any] = field(default_factory=dict)
    tgi_compat: bool = False


@dataclass
class TextInput(RequestInput):
    """The same of a text."""

    input_text: str | list[str] | None = None
    input_ids: list[int] = field(default_factory=list)
    adapters: Any = None
    tokenizer: Any = None

    def prompt_tokens_length(self) -> int:
        return len(self.input_ids)


@dataclass
class RequestOutput:
    """What has come of a request so far."""

    request_id: int
    input: Any
    finished: bool = False


@dataclass
class TextGenerationOutput(RequestOutput):
    """The same of a text: its candidates by index."""

    sequences: dict[int, Sequence] = field(default_factory=dict)
    best_sequence_index: int = 0
    prompt_tokens_details: list[Token] = field(default_factory=list)
    other_sequences_indices: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sequences.setdefault(self.best_sequence_index, Sequence())

    def get_tokens_as_dict(self, sequence_index: int = 0) -> list[dict[str, Any]]:
        return [self._shown(token) for token in self.sequences[sequence_index].tokens]

    def get_prompt_tokens_as_dict(self) -> list[dict[str, Any]]:
        return [self._shown(token) for token in self.prompt_tokens_details]

    def get_top_tokens_as_dict(self, sequence_index: int = 0) -> list[list[dict[str, Any]]]:
        return [[self._shown(token) for token in tops] for tops in self.sequences[sequence_index].top_tokens]

    def _shown(self, token: Token) -> dict[str, Any]:
        return token.as_tgi_dict() if getattr(self.input, "tgi_compat", False) else token.as_dict()
