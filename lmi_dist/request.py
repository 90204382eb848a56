"""What goes into the engine and what comes out: Request in, Output back. Plain data; the rules stand beside the fields.

A request is validated when it is made, so that no stage after it checks again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmi_dist.errors import RequestError
from lmi_dist.plan import Image, PlacedImage

FinishReason = Literal["length", "eos_token", "stop_sequence", "abort", "error"]

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 4096
MAX_CANDIDATES = 128

Finite = Annotated[float, Field(allow_inf_nan=False)]


class SamplingParams(BaseModel):
    """How to choose tokens and when to stop. `temperature` 0 is greedy. `SamplingParams.of` gives our kind of error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_tokens: int | None = Field(default=None, ge=1, description="new tokens at most; None: up to the model's length")
    min_tokens: int = Field(default=0, ge=0)
    n: int = Field(default=1, ge=1, le=MAX_CANDIDATES)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CANDIDATES)
    temperature: Finite = Field(default=1.0, ge=0.0)
    top_k: int = Field(default=0, ge=0, description="0: off")
    top_p: Finite = Field(default=1.0, gt=0.0, le=1.0)
    typical_p: Finite = Field(default=1.0, gt=0.0, le=1.0)
    min_p: Finite = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: Finite = Field(default=1.0, gt=0.0)
    presence_penalty: Finite = Field(default=0.0)
    frequency_penalty: Finite = Field(default=0.0)
    logit_bias: Mapping[int, Finite] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)], ...] = Field(
        default=(), max_length=MAX_STOP_STRINGS
    )
    stop_token_ids: tuple[int, ...] = Field(default=(), max_length=MAX_STOP_STRINGS)
    include_stop_string: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = Field(default=None, ge=0, description="alternatives beside each token; None: no log probs")
    prompt_logprobs: int | None = Field(default=None, ge=0, description="the same for the prompt's tokens")

    @model_validator(mode="after")
    def _candidates(self) -> "SamplingParams":
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of={self.best_of} must be at least n={self.n}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        return self

    @classmethod
    def of(cls, values: Mapping[str, object], names: Mapping[str, str] | None = None) -> "SamplingParams":
        """SamplingParams from plain values. `names` maps our field names to the client's, for the message.
        Raises RequestError that names the first field at fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0]) if first["loc"] else None
            if name is None:
                raise RequestError(_renamed(first["msg"].removeprefix("Value error, "), names or {})) from None
            shown = (names or {}).get(name, name)
            value = repr(values.get(name))
            value = value if len(value) <= 100 else value[:100] + "..."
            raise RequestError(f"{shown}={value} is refused: {first['msg'][0].lower()}{first['msg'][1:]}", shown) from None

    @property
    def num_candidates(self) -> int:
        """Sequences that are generated: best_of, of which the n best are returned."""
        return self.best_of or self.n

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _renamed(message: str, names: Mapping[str, str]) -> str:
    """A rule about several fields, in the client's words."""
    return re.sub(r"\w+(?==)", lambda found: names.get(found[0], found[0]), message)


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An encoded image (PNG, JPEG, ...) at this place of a prompt."""

    data: bytes


Prompt = str | tuple[int, ...] | tuple[str | ImagePart | Image, ...] | tuple[int | ImagePart | Image, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to be continued. `prompt` is text, token ids, or parts in order: texts and images, or ids and images. An Image is
    one that Engine.prepare has read."""

    id: str
    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    truncate: int | None = None  # keep at most this many tokens of the prompt, the last ones
    add_special_tokens: bool = True  # False where a chat template has written them already
    adapter: str = ""
    cache_salt: str = ""  # prompts share cached blocks only under the same salt

    @property
    def has_unread_images(self) -> bool:
        return isinstance(self.prompt, tuple) and any(isinstance(part, ImagePart) for part in self.prompt)


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A prompt as the model takes it: the tokens that the decoder begins with, and what an encoder reads before them, if there is
    one."""

    token_ids: tuple[int, ...]
    encoder_ids: tuple[int, ...] = ()
    images: tuple[PlacedImage, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Of the client's own text, as it is told."""
        return len(self.encoder_ids or self.token_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log probability (natural log) and its rank (0: the most probable)."""

    id: int
    text: str
    logprob: float | None
    rank: int


@dataclass(frozen=True, slots=True)
class Token:
    """A generated or prompt token. The texts of a sequence's tokens, joined, are its text."""

    id: int
    text: str
    logprob: float | None = None
    is_special: bool = False
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """News of one candidate of a request: what this step added, and how it ended if it did.

    `text` is the joined text of `tokens`; both may be empty while text is held back. A request has ended when each of its
    n candidates has sent an output with a finish_reason. `error` is given exactly when finish_reason is "error".
    """

    request_id: str
    index: int = 0
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    cumulative_logprob: float = 0.0
    prompt_tokens: tuple[Token, ...] = ()  # with prompt_logprobs: all of the prompt, on the first output only
    stop_reason: str | int | None = None  # the stop string or stop token id that matched
