"""An HTTP body to engine requests and the form of their answer, in the worker; the LMI schema stands here (contract 7.1 to 7.3).

`lmi_route`, a property that our host sets, tells the schema: "" LMI, where the body decides between text and chat, else a path of
OpenAI's.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmi_dist import Request, RequestError, SamplingParams
from lmi_dist_handler import openai_requests
from lmi_dist_handler.fields import Fields, parse_object
from lmi_dist_handler.formatter import Formatter
from lmi_dist_handler.openai_responses import Ask, DjlChat, DjlChatEvents, DjlChatLines
from lmi_dist_handler.options import FORMATTERS, UNBUILT_FORMATTERS
from lmi_dist_handler.responses import Json, JsonLines, LmiFormatter, RawText, Sse, Wishes
from lmi_dist_handler.sampling import COMMON, Sampling

if TYPE_CHECKING:
    from lmi_dist_handler.openai_requests import EngineView
    from lmi_dist_handler.properties import HandlerConfig

DEFAULT_NEW_TOKENS = 30
JSON_TYPES = ("application/json", "application/x-ndjson", "application/octet-stream", "")
ADAPTER_HEADERS = ("adapter", "x-amzn-sagemaker-adapter-identifier")

LMI = {
    **COMMON, "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "ignore_eos_token": "ignore_eos",
    "stop_sequences": "stop",
}  # fmt: skip
FORMS: dict[str, type[LmiFormatter]] = {"json": Json, "jsonlines": JsonLines, "sse": Sse, "none": RawText}
CHAT_FORMS: dict[str, type[DjlChat]] = {"json_chat": DjlChat, "jsonlines_chat": DjlChatLines, "sse_chat": DjlChatEvents}


@dataclass(frozen=True, slots=True)
class Parsed:
    """What goes to the engine, and what turns its outputs into the answer."""

    requests: tuple[Request, ...]
    formatter: Formatter


def parse(body: bytes, properties: Mapping[str, str], engine: "EngineView", handler: "HandlerConfig") -> Parsed:
    """Engine requests of one HTTP request. `properties` are its headers and what our host has added, in any case.
    Raises RequestError that names field, value, rule and way out."""
    headers = {name.lower(): value for name, value in properties.items()}
    route = headers.get("lmi_route", "")
    fields = Fields(_payload(body, headers.get("content-type", ""), is_lmi=not route))
    _refuse_adapters(fields, headers)
    if route == "/v1/completions":
        parsed = Parsed(*openai_requests.completion(fields, engine, handler))
    elif route == "/v1/chat/completions":
        parsed = Parsed(*openai_requests.chat(fields, engine, handler))
    elif "messages" in fields:
        parsed = Parsed(*openai_requests.djl_chat(fields, engine, handler))
    else:
        parsed = _lmi(fields, engine, handler)
    fields.warn_of_unknown()
    return parsed


def _payload(body: bytes, content_type: str, *, is_lmi: bool) -> dict[str, object]:
    """The body as an object, by its content type (contract 3.3)."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "text/plain" and is_lmi:
        return {"inputs": _plain_text(body)}
    if kind not in JSON_TYPES:
        raise RequestError(f"content-type={kind!r} is known but not built yet; send application/json", "content-type")
    return parse_object(body)


def _plain_text(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}; send text in UTF-8") from None


def _refuse_adapters(fields: Fields, headers: Mapping[str, str]) -> None:
    fields.only("adapters", "", [], way_out="leave it out for the base model")
    for name in ADAPTER_HEADERS:
        if headers.get(name):
            raise RequestError(f"header {name}={headers[name]!r} is known but not built yet; leave it out", name)


def _lmi(fields: Fields, engine: "EngineView", handler: "HandlerConfig") -> Parsed:
    """inputs, parameters, stream."""
    if isinstance(fields.take("inputs"), list):
        raise fields.refuse("inputs", "must be one string; send a request for each prompt, they are batched here")
    prompt = fields.text("inputs")
    parameters = fields.section("parameters")
    stream = fields.boolean("stream")
    fields.ignore("cached_prompt", "model")
    form = _form(parameters, stream, handler)
    wishes = _wishes(parameters, prompt, form, handler)
    params = _params(parameters, wishes, form, engine)
    request = Request(id=uuid.uuid4().hex, prompt=prompt, params=params, truncate=parameters.integer("truncate", 1))
    parameters.warn_of_unknown()
    return Parsed((request,), _formatter(form, wishes, request, handler))


def _form(parameters: Fields, stream: bool, handler: "HandlerConfig") -> str:
    """Name of the answer's form: the request's, else the option's, else as `stream` says (contract 7.3)."""
    wanted = parameters.text("output_formatter", handler.output_formatter or "auto")
    if wanted == "auto":
        return ("sse" if handler.tgi_compat else "jsonlines") if stream else "json"
    if wanted not in FORMATTERS:
        unbuilt = "is known but not built yet; it " if wanted in UNBUILT_FORMATTERS else ""
        raise parameters.refuse("output_formatter", f"{unbuilt}must be one of {', '.join(FORMATTERS)}")
    return wanted


def _wishes(parameters: Fields, prompt: str, form: str, handler: "HandlerConfig") -> Wishes:
    """What the client wants to see of the candidates; best_of without n shows them all."""
    n, best_of = parameters.integer("n", 1), parameters.integer("best_of", 1)
    return Wishes(
        prompt=prompt,
        num_candidates=n or best_of or 1,
        details=parameters.boolean("details", handler.tgi_compat),
        return_full_text=parameters.boolean("return_full_text"),
        decoder_input_details=parameters.boolean("decoder_input_details") or (parameters.integer("prompt_logprobs", 0) is not None),
        top_tokens=bool(_num_alternatives(parameters)),
        tgi_compat=handler.tgi_compat,
    )


def _num_alternatives(parameters: Fields) -> int:
    return max(parameters.integer("logprobs", 0) or 0, parameters.integer("top_n_tokens", 0) or 0)


def _params(parameters: Fields, wishes: Wishes, form: str, engine: "EngineView") -> SamplingParams:
    """SamplingParams of `parameters`: greedy unless do_sample, which also brings in the checkpoint's wishes."""
    parameters.only("num_beams", 1, way_out="leave it out and use best_of")
    parameters.only("use_beam_search", False)
    if wishes.num_candidates > 1 and form in ("jsonlines", "sse", "none"):
        name = "n" if "n" in parameters else "best_of"
        raise parameters.refuse(name, f"is for whole answers, not for {form}; leave out stream or set output_formatter to json")
    sampling = Sampling(parameters, LMI)
    sampling.values.setdefault("max_tokens", DEFAULT_NEW_TOKENS)
    if wishes.num_candidates > 1:
        sampling.put("n", wishes.num_candidates, parameters.name("n" if "n" in parameters else "best_of"))
    if _shows_tokens(wishes, form):
        sampling.values["logprobs"] = _num_alternatives(parameters)
    if wishes.shows_details and wishes.decoder_input_details:
        sampling.values["prompt_logprobs"] = parameters.integer("prompt_logprobs", 0) or 0
    do_sample = parameters.boolean("do_sample")
    if do_sample:
        sampling.default(engine.model.generation)
    params = sampling.params()
    return params if do_sample else params.model_copy(update={"temperature": 0.0})


def _shows_tokens(wishes: Wishes, form: str) -> bool:
    return form in ("jsonlines", "sse") or wishes.shows_details


def _formatter(form: str, wishes: Wishes, request: Request, handler: "HandlerConfig") -> Formatter:
    if form in FORMS:
        return FORMS[form](wishes)
    ask = Ask(model=handler.model_name, request_ids=(request.id,), num_candidates=wishes.num_candidates, logprobs=wishes.details)
    return CHAT_FORMS[form](ask)
