"""The routes as an OpenAPI 3.1 document, with the fields that requests.py and its siblings read: names from their tables, rules
from SamplingParams. What is beside these fields is ignored by the server, and so allowed here."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from lmi_dist import SamplingParams
from lmi_dist_handler.formatter import TGI_ROUTES
from lmi_dist_handler.openai_requests import CHAT, COMPLETION
from lmi_dist_handler.options import FORMATTERS
from lmi_dist_handler.requests import MAX_INPUTS
from lmi_dist_handler.sampling import LMI
from lmi_dist_handler.tgi_requests import TGI

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
SWITCH: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SOME: Schema = {"type": "integer", "minimum": 1}
STOP: Schema = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": TEXT}]}
LMI_ONLY: dict[str, Schema] = {
    "do_sample": SWITCH, "details": SWITCH, "return_full_text": SWITCH, "decoder_input_details": SWITCH, "logprobs": COUNT,
    "top_n_tokens": COUNT, "prompt_logprobs": COUNT, "truncate": SOME, "output_formatter": {"enum": [*FORMATTERS, "auto"]},
}  # fmt: skip
TGI_ONLY: dict[str, Schema] = {
    name: LMI_ONLY[name]
    for name in ("do_sample", "details", "return_full_text", "decoder_input_details", "top_n_tokens", "truncate")
}
TOKENS: Schema = {"type": "array", "items": COUNT, "minItems": 1}
PROMPT: Schema = {"anyOf": [TEXT, TOKENS, {"type": "array", "items": {"anyOf": [TEXT, TOKENS]}, "minItems": 1, "maxItems": 128}]}
OPENAI_ONLY: dict[str, Schema] = {
    "model": TEXT, "stream": SWITCH, "stream_options": {"type": "object", "properties": {"include_usage": SWITCH}},
    "truncate_prompt_tokens": SOME, "cache_salt": TEXT,
}  # fmt: skip
MESSAGE: Schema = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": TEXT,
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    },
                },
            ]
        },
        "tool_calls": {"type": "array", "items": {"type": "object", "required": ["function"]}},
    },
}
LMI_ERROR: Schema = {"type": "object", "required": ["code", "message"], "properties": {"code": {"type": "integer"}}}
OPENAI_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
}
TGI_ERROR: Schema = {"type": "object", "required": ["error", "error_type"]}
MANAGEMENT_ERROR: Schema = {"type": "object", "required": ["code", "type", "message"]}
JSON = "application/json"
STREAMS = ("text/event-stream", "text/plain")
REFUSALS = {
    "400": "the request cannot be handed to a model", "401": "the key is missing or wrong", "404": "no such model or route",
    "408": "the body comes too slowly", "413": "the body is too large", "415": "the body is compressed",
    "424": "the request breaks a rule, or failed", "500": "internal error",
    "503": "not ready, or too many requests wait", "507": "out of memory",
}  # fmt: skip


@cache
def document() -> Schema:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "lmi-dist", "version": "0.1.0", "description": "Text generation as in DJL Serving, OpenAI and TGI"},
        "paths": {**_shown(), **_managed(), **_lmi(), **_openai(), **_tgi()},
    }


def _shown() -> Schema:
    ping = {
        code: _told(about, {"type": "object"}) for code, about in (("200", "takes requests"), ("500", "failed"), ("503", "not yet"))
    }
    return {
        "/ping": {"get": {"summary": "How the models stand", "security": [], "responses": ping}},
        "/metrics": {
            "get": _operation("Figures for Prometheus", {"200": {"description": "figures", "content": {"text/plain": {}}}})
        },
        "/status.json": {"get": _operation("What the page shows", _ok())},
        "/openapi.json": {"get": _operation("This document", _ok())},
        "/health": {"get": _operation("/ping, as TGI calls it", ping)},
        "/info": {
            "get": _operation("A model's limits, as TGI tells them", {**_ok(), **_errors(LMI_ERROR, "400", "404")}, ("model_name",))
        },
        "/v1/models": {"get": _operation("The models, as OpenAI lists them", _ok())},
        "/v1/models/{model}": _at({"get": _operation("One of them", {**_ok(), **_errors(OPENAI_ERROR, "404")})}, "model"),
    }


def _managed() -> Schema:
    listed = {**_ok(), **_errors(MANAGEMENT_ERROR, "400", "404", "409", "500", "503", "507")}
    model: Schema = {
        "get": _operation("Describe a model", listed),
        "put": _operation("Scale a model: one worker is what it has", listed, ("min_worker", "max_worker", "synchronous")),
        "delete": _operation("Unload a model", listed),
    }
    given = ("url", "model_name", "model_version", "engine", "job_queue_size", "synchronous")
    register = _operation("Load a model", {**listed, "202": _told("is being loaded", {"type": "object"})}, given)
    return {
        "/models": {"get": _operation("List the models", listed, ("limit", "next_page_token")), "post": register},
        "/models/{model}": _at(model, "model"),
        "/models/{model}/{version}": _at(model, "model", "version"),
    }


def _lmi() -> Schema:
    """One schema on all of DJL's routes: text or chat, as the body says."""
    parameters = {**sampling_fields(LMI), **LMI_ONLY}
    inputs = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_INPUTS}]}
    text = _object({"inputs": inputs, "parameters": _object(parameters), "stream": SWITCH}, "inputs")
    body = {"anyOf": [text, _chat_body()]}
    answers = {
        **_answers(LMI_ERROR, "424"),
        "200": {"description": "the text", "content": {kind: {} for kind in (JSON, "application/jsonlines", *STREAMS)}},
    }
    post = {"post": {**_operation("Generate text", answers), "requestBody": _request(body)}}
    return {
        "/invocations": {**post, "options": _operation("Nothing", _ok())},
        "/predictions/{model}": _at(post, "model"),
        "/predictions/{model}/{version}": _at(post, "model", "version"),
        "/models/{model}/invoke": _at(post, "model"),
    }


def _openai() -> Schema:
    completion = {
        **sampling_fields(COMPLETION), **OPENAI_ONLY, "prompt": PROMPT, "echo": SWITCH, "logprobs": COUNT,
    }  # fmt: skip
    answers = {
        **_answers(OPENAI_ERROR, "429"),
        "200": {"description": "the text", "content": {JSON: {"schema": {"type": "object"}}, "text/event-stream": {}}},
    }
    return {
        "/v1/completions": {
            "post": {**_operation("Complete a prompt", answers), "requestBody": _request(_object(completion, "prompt"))}
        },
        "/v1/chat/completions": {"post": {**_operation("Answer a chat", answers), "requestBody": _request(_chat_body())}},
    }


def _chat_body() -> Schema:
    fields = {
        **sampling_fields(CHAT), **OPENAI_ONLY, "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
        "tools": {"type": "array", "items": {"type": "object"}}, "logprobs": SWITCH,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    }  # fmt: skip
    return _object(fields, "messages")


def _tgi() -> Schema:
    body = _object({"inputs": TEXT, "parameters": _object({**sampling_fields(TGI), **TGI_ONLY}), "stream": SWITCH}, "inputs")
    answers = {
        **_answers(TGI_ERROR, "422", "429"),
        "200": {"description": "the text", "content": {JSON: {}, "text/event-stream": {}}},
    }
    paths: Schema = {
        path: {"post": {**_operation("Generate, as TGI does", answers), "requestBody": _request(body)}} for path in TGI_ROUTES
    }
    root = {"200": {"description": "the page, or a few words of JSON", "content": {"text/html": {}, JSON: {}}}}
    paths["/"]["get"] = {**_operation("The page", root), "security": []}
    return paths


# ---- their parts ----


def sampling_fields(table: Mapping[str, str]) -> Schema:
    """The fields of a table of names, with the rules of what they mean."""
    rules = SamplingParams.model_json_schema()["properties"]
    known = {name: {key: value for key, value in rules[target].items() if key != "title"} for name, target in table.items()}
    return {**known, **{name: STOP for name, target in table.items() if target == "stop"}}


def _object(properties: Mapping[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


def _request(schema: Schema) -> Schema:
    return {"required": True, "content": {JSON: {"schema": schema}}}


def _operation(summary: str, responses: Mapping[str, Schema], query: tuple[str, ...] = ()) -> Schema:
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in query]
    return {"summary": summary, **({"parameters": parameters} if query else {}), "responses": dict(responses)}


def _at(methods: Mapping[str, Schema], *names: str) -> Schema:
    """The methods of a path with names in it."""
    parameters = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in names]
    return {**methods, "parameters": parameters}


def _ok() -> Schema:
    return {"200": _told("done", {"type": ["object", "array"]})}


def _told(about: str, schema: Schema) -> Schema:
    return {"description": about, "content": {JSON: {"schema": schema}}}


def _answers(error: Schema, *more: str) -> Schema:
    """What may be answered instead of text."""
    return _errors(error, *dict.fromkeys([*REFUSALS, *more]))


def _errors(error: Schema, *codes: str) -> Schema:
    return {code: _told(REFUSALS.get(code, "the request breaks a rule, or too many wait"), error) for code in codes}
