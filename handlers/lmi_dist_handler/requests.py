"""An HTTP body to engine requests and the form of their answer, in the worker; the LMI schema stands here (contract 7.1 to 7.3).

`lmi_route`, a property that our host sets, tells the schema: "" LMI, where the body decides between text and chat, else a path of
OpenAI's or of text-generation-inference's.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lmi_dist import Request, RequestError, SamplingParams
from lmi_dist_handler import custom, openai_requests, tgi_requests
from lmi_dist_handler.bodies import FORM, form_of, read_body
from lmi_dist_handler.fields import Fields
from lmi_dist_handler.formatter import Formatter, dialect_of_route
from lmi_dist_handler.images import split_markdown
from lmi_dist_handler.model_py import NONE, Functions
from lmi_dist_handler.openai_responses import Ask, DjlChat, DjlChatEvents, DjlChatLines
from lmi_dist_handler.options import FORMATTERS, UNBUILT_FORMATTERS
from lmi_dist_handler.responses import Json, JsonLines, JsonList, JsonPieces, LmiFormatter, OutputLines, RawText, Sse, Wishes
from lmi_dist_handler.sampling import LMI, ONE, Sampling
from lmi_dist_handler.todays_responses import TodaysFormatter, TodaysJson, TodaysLines, unframed
from lmi_dist_handler.wire import Input

if TYPE_CHECKING:
    from lmi_dist_handler.dialects import LmiDialect
    from lmi_dist_handler.openai_requests import EngineView
    from lmi_dist_handler.settings import HandlerConfig

DEFAULT_NEW_TOKENS = 30
MAX_INPUTS = 128
OWN = "the model's own"  # form of an answer that its @output_formatter writes
NO_CHAT = (  # DJL's own sentence
    "chat completions support is not currently available for dynamic batching. You must enable rolling batch to use the chat "
    "completions format."
)
ADAPTER_HEADERS = ("adapter", "x-amzn-sagemaker-adapter-identifier")

STREAMED = ("jsonlines", "sse", "none", "jsonlines_chat", "sse_chat", OWN)

FORMS: dict[str, type[LmiFormatter]] = {"json": Json, "jsonlines": JsonLines, "sse": Sse, "none": RawText}
TODAYS_FORMS: dict[str, type[TodaysFormatter]] = {"json": TodaysJson, "jsonlines": TodaysLines}
CHAT_FORMS: dict[str, type[DjlChat]] = {"json_chat": DjlChat, "jsonlines_chat": DjlChatLines, "sse_chat": DjlChatEvents}


@dataclass(frozen=True, slots=True)
class Parsed:
    """What goes to the engine, and what turns its outputs into the answer."""

    requests: tuple[Request, ...]
    formatter: Formatter

    def seeded(self, seed: int) -> "Parsed":
        """The same with a host's seed, one more for each prompt behind the first, where the client has given none."""
        requests = [
            replace(request, params=request.params.model_copy(update={"seed": seed + place}))
            if request.params.seed is None
            else request
            for place, request in enumerate(self.requests)
        ]
        return replace(self, requests=tuple(requests))


def parse_input(inputs: Input, engine: "EngineView", handler: "HandlerConfig", own: Functions = NONE) -> Parsed:
    """Engine requests of a host's request, read and answered by the model's own functions where it has them."""
    body, properties = inputs.get_as_bytes() or b"", inputs.get_properties()
    if inputs.contains_key("inputs") and not inputs.contains_key("data"):  # DJL's host takes forms apart (contract 6.3)
        body, properties = form_of(inputs.get_content()), {**properties, "content-type": FORM}
    if own is NONE or dialect_of_route(_headers(properties).get("lmi_route", "")) != "lmi":
        return parse(body, properties, engine, handler)
    if own.input_formatter is None:
        return parse(body, properties, engine, handler, own)
    asked = custom.read(own.input_formatter, inputs, engine.tokenizer, handler.model_dump(mode="json"))
    fields = Fields(custom.body_of(asked))
    _refuse_adapters(fields, _headers(properties))
    return _lmi(fields, engine, handler, own, asked)


def parse_whole(inputs: Input, engine: "EngineView", handler: "HandlerConfig", own: Functions = NONE) -> Parsed:
    """The same where rolling batch is off: one prompt or several, answered as a list at the end, or as lines (contract 7.10)."""
    headers = _headers(inputs.get_properties())
    fields = Fields(read_body(inputs.get_as_bytes() or b"", headers.get("content-type", ""), is_lmi=True))
    _refuse_adapters(fields, headers)
    if "messages" in fields:
        raise RequestError(NO_CHAT, "messages")
    prompts, parameters, _ = _lmi_fields(fields)
    wishes = _wishes(parameters, prompts[0], handler)
    form = "json" if handler.enable_streaming == "false" else "jsonlines"
    if form == "jsonlines" and wishes.num_candidates > 1:
        name = _name_of_n(parameters, handler.dialect)
        raise parameters.refuse(name, "is for whole answers; leave it out with enable_streaming")
    requests = _requests(prompts, parameters, _params(parameters, wishes, form, engine), engine)
    fields.ignore("stream")
    fields.warn_of_unknown()
    if form == "jsonlines":
        return Parsed(requests, OutputLines([one.id for one in requests]))
    return Parsed(requests, _list_of(requests, prompts, wishes))


def _headers(properties: Mapping[str, str]) -> dict[str, str]:
    """By their names in lower case; of two that differ in case only, the later."""
    return {name.lower(): value for name, value in properties.items()}


def parse(
    body: bytes, properties: Mapping[str, str], engine: "EngineView", handler: "HandlerConfig", own: Functions = NONE
) -> Parsed:
    """Engine requests of one HTTP request. `properties` are its headers and what our host has added, in any case.
    Raises RequestError that names field, value, rule and way out."""
    headers = _headers(properties)
    route = headers.get("lmi_route", "")
    dialect = dialect_of_route(route)
    fields = Fields(read_body(body, headers.get("content-type", ""), is_lmi=dialect == "lmi"))
    _refuse_adapters(fields, headers)
    if route == "/v1/completions":
        parsed = Parsed(*openai_requests.completion(fields, engine, handler))
    elif route == "/v1/chat/completions":
        parsed = Parsed(*openai_requests.chat(fields, engine, handler))
    elif dialect == "tgi":
        parsed = Parsed(*tgi_requests.generate(fields, route, engine.image_token))
    elif handler.dialect.is_todays and ("prompt" in fields or ("messages" in fields and "inputs" not in fields)):
        read = openai_requests.completion if "prompt" in fields else openai_requests.chat
        asked, form = read(fields, engine, handler)
        parsed = Parsed(asked, unframed(form))
    elif "messages" in fields and handler.dialect.has_chat:
        parsed = Parsed(*openai_requests.djl_chat(fields, engine, handler))
    else:
        parsed = _lmi(fields, engine, handler, own)
    fields.warn_of_unknown()
    return parsed


def _refuse_adapters(fields: Fields, headers: Mapping[str, str]) -> None:
    fields.only("adapters", "", [], way_out="leave it out for the base model")
    for name in ADAPTER_HEADERS:
        if headers.get(name):
            raise RequestError(f"header {name}={headers[name]!r} is known but not built yet; leave it out", name)


def _lmi(fields: Fields, engine: "EngineView", handler: "HandlerConfig", own: Functions, asked: Any = None) -> Parsed:
    """inputs, parameters, stream. All prompts of a list have the same parameters. `asked` is what the model's own function has made
    of the body."""
    writer = asked.output_formatter if callable(getattr(asked, "output_formatter", None)) else own.output_formatter
    prompts, parameters, is_list = _lmi_fields(fields)
    stream = handler.dialect.form_by_request and fields.boolean("stream")
    form = _form(parameters, stream, handler, has_writer=writer is not None)
    if is_list and form != "json":
        raise fields.refuse("inputs", f"is a list, which is for whole answers, not for {form}; leave out stream or send one string")
    wishes = _wishes(parameters, prompts[0], handler)
    params = _params(parameters, wishes, form, engine)
    requests = _requests(prompts, parameters, params, engine)
    if form == OWN and writer is not None:
        seen = asked or custom.text_input(prompts[0], parameters.values, engine.tokenizer, tgi_compat=handler.tgi_compat)
        return Parsed(requests, custom.CustomFormatter(writer, seen, handler.dialect))
    if is_list:
        return Parsed(requests, _list_of(requests, prompts, wishes))
    return Parsed(requests, _formatter(form, wishes, requests[0], handler))


def _lmi_fields(fields: Fields) -> tuple[list[str], Fields, bool]:
    """Prompts, parameters, and whether the prompts came as a list."""
    fields.ignore("cached_prompt", "model", "model_name")
    is_list = isinstance(fields.take("inputs"), list)
    prompts = fields.texts("inputs", MAX_INPUTS) if is_list else [fields.text("inputs")]
    return prompts, fields.section("parameters"), is_list


def _requests(prompts: Sequence[str], parameters: Fields, params: SamplingParams, engine: "EngineView") -> tuple[Request, ...]:
    truncate = parameters.integer("truncate", 1)
    parameters.warn_of_unknown()
    read = [split_markdown(prompt, "inputs", engine.image_token) for prompt in prompts]
    return tuple(Request(id=uuid.uuid4().hex, prompt=prompt, params=params, truncate=truncate) for prompt in read)


def _list_of(requests: Sequence[Request], prompts: Sequence[str], wishes: Wishes) -> JsonList:
    return JsonList({one.id: Json(replace(wishes, prompt=prompt)) for one, prompt in zip(requests, prompts, strict=True)})


def _form(parameters: Fields, stream: bool, handler: "HandlerConfig", *, has_writer: bool) -> str:
    """Name of the answer's form: the request's, else the option's, else the model's own, else as `stream` says (contract 7.3)."""
    wanted: str = handler.output_formatter or "auto"
    if handler.dialect.form_by_request:
        wanted = parameters.text("output_formatter", wanted)
    if wanted == "auto" and has_writer:
        return OWN
    if wanted == "auto":
        return ("sse" if handler.tgi_compat else "jsonlines") if stream else "json"
    if wanted not in FORMATTERS:
        unbuilt = "is known but not built yet; it " if wanted in UNBUILT_FORMATTERS else ""
        raise parameters.refuse("output_formatter", f"{unbuilt}must be one of {', '.join(FORMATTERS)}")
    return wanted


def _wishes(parameters: Fields, prompt: str, handler: "HandlerConfig") -> Wishes:
    """What the client wants to see of the candidates; best_of without n shows them all."""
    num_candidates = parameters.integer(_name_of_n(parameters, handler.dialect), 1) if handler.dialect.several else 1
    return Wishes(
        prompt=prompt,
        dialect=handler.dialect,
        num_candidates=num_candidates or 1,
        details=parameters.boolean("details", handler.tgi_compat),
        return_full_text=parameters.boolean("return_full_text"),
        decoder_input_details=parameters.boolean("decoder_input_details") or (parameters.integer("prompt_logprobs", 0) is not None),
        top_tokens=bool(_num_alternatives(parameters, handler.dialect)),
        tgi_compat=handler.tgi_compat,
    )


def _name_of_n(parameters: Fields, dialect: "LmiDialect") -> str:
    """The parameter that tells how many candidates there are."""
    names = ("n", "top_n_tokens") if dialect.is_todays else ("n",)  # today's async handler makes the one the other
    return [*(name for name in names if name in parameters), "best_of"][0]


def _num_alternatives(parameters: Fields, dialect: "LmiDialect") -> int:
    top_n_tokens = 0 if dialect.is_todays else parameters.integer("top_n_tokens", 0)
    return max(parameters.integer("logprobs", 0) or 0, top_n_tokens or 0)


def _params(parameters: Fields, wishes: Wishes, form: str, engine: "EngineView") -> SamplingParams:
    """SamplingParams of `parameters`: greedy unless do_sample, which also brings in the checkpoint's wishes."""
    parameters.only("num_beams", 1, way_out="leave it out and use best_of")
    parameters.only("use_beam_search", False)
    _check_candidates(parameters, wishes, form)
    sampling = Sampling(parameters, LMI if wishes.dialect.several else ONE)
    sampling.values.setdefault("max_tokens", DEFAULT_NEW_TOKENS)
    if wishes.num_candidates > 1:
        sampling.put("n", wishes.num_candidates, parameters.name(_name_of_n(parameters, wishes.dialect)))
    if _shows_tokens(wishes, form):
        sampling.values["logprobs"] = _num_alternatives(parameters, wishes.dialect)
    if (wishes.shows_details or form == OWN) and wishes.decoder_input_details:
        sampling.values["prompt_logprobs"] = parameters.integer("prompt_logprobs", 0) or 0
    do_sample = parameters.boolean("do_sample", wishes.dialect.sampled_by_default)
    if do_sample:
        sampling.default(engine.model.generation)
    params = sampling.params()
    return params if do_sample else params.model_copy(update={"temperature": 0.0})


def _check_candidates(parameters: Fields, wishes: Wishes, form: str) -> None:
    """Raises RequestError where a form cannot tell several candidates apart, or not before all of them have ended."""
    num_candidates = wishes.num_candidates
    if num_candidates > 1 and form in ("none", OWN):
        name = _name_of_n(parameters, wishes.dialect)
        raise parameters.refuse(
            name, f"is more than {form} can tell apart; leave it out or set output_formatter to json or jsonlines"
        )
    if form in STREAMED and (parameters.integer("best_of", 1) or 1) > num_candidates:
        raise parameters.refuse(
            "best_of", f"must equal n={num_candidates} where tokens are sent as they come; leave out one of them or stream"
        )


def _shows_tokens(wishes: Wishes, form: str) -> bool:
    return form in ("jsonlines", "sse", OWN) or wishes.shows_details


def _formatter(form: str, wishes: Wishes, request: Request, handler: "HandlerConfig") -> Formatter:
    if form == "json" and wishes.dialect.json_in_pieces:
        return JsonPieces(wishes)
    if wishes.dialect.is_todays and form in TODAYS_FORMS:
        return TODAYS_FORMS[form](wishes, request.params.seed)
    if form in FORMS:
        return FORMS[form](wishes)
    ask = Ask(model=handler.model_name, request_ids=(request.id,), num_candidates=wishes.num_candidates, logprobs=wishes.details)
    return CHAT_FORMS[form](ask)
