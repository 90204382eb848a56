"""OpenAI's completions and chat bodies to engine requests, as its API reference has them; and DJL's chat body (contract 8.1).

Fields of the reference that are not built are refused by name; those that only label a request are ignored.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lmi_dist import Request, RequestError
from lmi_dist_handler import chat as chat_prompts
from lmi_dist_handler.fields import Fields
from lmi_dist_handler.openai_responses import (
    Ask,
    Chat,
    ChatEvents,
    Completion,
    CompletionEvents,
    DjlChat,
    DjlChatEvents,
    DjlChatLines,
    OpenAIFormatter,
)
from lmi_dist_handler.sampling import COMMON, Sampling

if TYPE_CHECKING:
    from lmi_dist_handler.settings import HandlerConfig

MAX_PROMPTS = 128
COMPLETION_TOKENS = 16
DJL_CHAT_TOKENS = 30

COMPLETION = {**COMMON, "max_tokens": "max_tokens"}
CHAT = {**COMMON, "max_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}
LABELS = ("model", "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "cached_prompt")


class ModelView(Protocol):
    """What is needed of ModelConfig."""

    @property
    def generation(self) -> Mapping[str, float]: ...


class EngineView(Protocol):
    """What is needed of the engine."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def model(self) -> ModelView: ...

    @property
    def image_token(self) -> str | None: ...


def completion(fields: Fields, engine: EngineView, handler: "HandlerConfig") -> tuple[tuple[Request, ...], OpenAIFormatter]:
    """/v1/completions: `prompt` is text, token ids, or a list of either; each is a request of its own."""
    fields.ignore(*LABELS)
    fields.only("suffix", "", way_out="leave it out")
    prompts = _prompts(fields)
    logprobs, echo, stream = fields.integer("logprobs", 0), fields.boolean("echo"), fields.boolean("stream")
    sampling = _sampling(fields, COMPLETION, engine)
    sampling.values.setdefault("max_tokens", COMPLETION_TOKENS)
    sampling.values["logprobs"] = logprobs
    if echo and logprobs is not None:
        sampling.values["prompt_logprobs"] = logprobs
    params = sampling.params()
    if stream and params.num_candidates > params.n:
        raise fields.refuse("best_of", "must equal n when stream is true; leave one of them out")
    truncate, salt = fields.integer("truncate_prompt_tokens", 1), fields.text("cache_salt", "")
    requests = tuple(
        Request(id=uuid.uuid4().hex, prompt=prompt, params=params, truncate=truncate, cache_salt=salt) for prompt in prompts
    )
    texts = [_text(prompt, engine) for prompt in prompts] if echo else []
    ask = _ask(fields, requests, handler, logprobs is not None, stream, texts)
    return requests, (CompletionEvents if stream else Completion)(ask)


def chat(fields: Fields, engine: EngineView, handler: "HandlerConfig") -> tuple[tuple[Request, ...], OpenAIFormatter]:
    """/v1/chat/completions."""
    fields.ignore(*LABELS, "parallel_tool_calls", "reasoning_effort", "verbosity")
    _refuse_unbuilt(fields)
    stream = fields.boolean("stream")
    request, logprobs = _chat_request(fields, engine, None)
    ask = _ask(fields, (request,), handler, logprobs, stream)
    return (request,), (ChatEvents if stream else Chat)(ask)


def djl_chat(fields: Fields, engine: EngineView, handler: "HandlerConfig") -> tuple[tuple[Request, ...], OpenAIFormatter]:
    """DJL's chat body: OpenAI's with another default length, answered in DJL's forms."""
    fields.ignore(*LABELS)
    _refuse_unbuilt(fields)
    stream = fields.boolean("stream")
    request, logprobs = _chat_request(fields, engine, DJL_CHAT_TOKENS)
    ask = _ask(fields, (request,), handler, logprobs, stream)
    wants_events = handler.tgi_compat or handler.output_formatter in ("sse", "sse_chat")
    return (request,), ((DjlChatEvents if wants_events else DjlChatLines) if stream else DjlChat)(ask)


def _chat_request(fields: Fields, engine: EngineView, num_tokens: int | None) -> tuple[Request, bool]:
    """The request of a chat body, and whether log probabilities are wanted."""
    prompt = chat_prompts.render(fields, engine.tokenizer, engine.image_token)
    logprobs, top = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, 20)
    if top is not None and not logprobs:
        raise fields.refuse("top_logprobs", "needs logprobs=true")
    sampling = _sampling(fields, CHAT, engine)
    sampling.values.setdefault("max_tokens", num_tokens)
    sampling.values["logprobs"] = (top or 0) if logprobs else None
    salt = fields.text("cache_salt", "")
    request = Request(
        id=uuid.uuid4().hex, prompt=prompt, params=sampling.params(), add_special_tokens=False, cache_salt=salt,
        truncate=fields.integer("truncate_prompt_tokens", 1),
    )  # fmt: skip
    return request, logprobs


def _sampling(fields: Fields, table: Mapping[str, str], engine: EngineView) -> Sampling:
    """Sampling words within OpenAI's ranges, the checkpoint's wishes where there are none."""
    fields.between("temperature", 0, 2)
    fields.between("presence_penalty", -2, 2)
    fields.between("frequency_penalty", -2, 2)
    bias = fields.section("logit_bias")
    for name in bias.values:
        bias.between(name, -100, 100)
    sampling = Sampling(fields, table)
    sampling.default(engine.model.generation)
    return sampling


def _refuse_unbuilt(fields: Fields) -> None:
    fields.only("tool_choice", "none", "auto", way_out="use auto")
    fields.only("response_format", {"type": "text"}, way_out="leave it out")
    fields.only("modalities", ["text"], way_out='use ["text"]')
    for name in ("functions", "function_call", "audio", "prediction", "web_search_options"):
        fields.only(name, [])


def _ask(
    fields: Fields, requests: Sequence[Request], handler: "HandlerConfig", logprobs: bool, stream: bool, prompts: Sequence[str] = ()
) -> Ask:
    options = fields.section("stream_options")
    if "stream_options" in fields and not stream:
        raise fields.refuse("stream_options", "is only allowed when stream is true")
    include_usage = options.boolean("include_usage")
    options.ignore("include_obfuscation")
    options.warn_of_unknown()
    return Ask(
        model=fields.text("model", handler.model_name), request_ids=tuple(request.id for request in requests),
        num_candidates=requests[0].params.n, logprobs=logprobs, include_usage=include_usage, prompts=prompts,
    )  # fmt: skip


def _prompts(fields: Fields) -> list[str | tuple[int, ...]]:
    """One or several prompts of `prompt`."""
    prompt = fields.take("prompt")
    if prompt is None:
        raise RequestError("prompt is missing; it must be a string, a list of strings or a list of token ids", "prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and not _is_ids(prompt) else [prompt]
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"prompt has {len(prompts)} prompts, but at most {MAX_PROMPTS} go into one request", "prompt")
    for one in prompts:
        if not one or not (isinstance(one, str) or _is_ids(one)):
            raise fields.refuse(
                "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists, none empty"
            )
    return [one if isinstance(one, str) else tuple(one) for one in prompts]


def _text(prompt: str | tuple[int, ...], engine: EngineView) -> str:
    """What echo shows of a prompt."""
    return prompt if isinstance(prompt, str) else str(engine.tokenizer.decode(list(prompt), skip_special_tokens=True))


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(id, int) and not isinstance(id, bool) for id in value)
