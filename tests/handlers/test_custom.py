"""Requests that a model's own functions read and answer."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from lmi_dist_handler.custom import CustomFormatter, CustomFormatterError
from lmi_dist_handler.model_py import Functions
from lmi_dist_handler.request_io import TextGenerationOutput, TextInput
from lmi_dist_handler.requests import Parsed, parse_input
from lmi_dist_handler.responses import Json, JsonLines, JsonList
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.tgi_responses import Tgi
from lmi_dist_handler.wire import Input, PairList

from lmi_dist import EngineConfig, LmiError, Output, RequestError, StepError, Token


def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) for letter in text]}


ENGINE: Any = SimpleNamespace(image_token=None, tokenizer=tokenizer, model=SimpleNamespace(generation={}))


def parsed(body: object, own: Functions, route: str = "", **options: Any) -> Parsed:
    config = HandlerConfig(engine=EngineConfig(model="m"), model_name="m", **options)
    inputs = Input({"lmi_route": route}, PairList([("data", json.dumps(body).encode())]))
    return parse_input(inputs, ENGINE, config, own)


def lines(output: TextGenerationOutput) -> str:
    """The example of DJL's guide."""
    sequence = output.sequences[output.best_sequence_index]
    token, is_first, is_last = sequence.get_next_token()
    assert token is not None
    told = [token.id, token.text, is_first, is_last, sequence.finish_reason, output.finished]
    return json.dumps(told) + "\n"


def said(request_id: str, *tokens: Token, done: str | None = None, **more: Any) -> Output:
    values: dict[str, Any] = {"finish_reason": done, **more}
    return Output(request_id=request_id, text="".join(token.text for token in tokens), tokens=tokens, **values)


HE, LLO = Token(5, "He", -0.25), Token(6, "llo", float("-inf"))


def test_writer_is_called_once_a_token() -> None:
    found = parsed({"inputs": "hi"}, Functions(output_formatter=lines))
    (request,) = found.requests

    pieces = [found.formatter.push(said(request.id, HE)), found.formatter.push(said(request.id, LLO, HE, done="stop_sequence"))]

    told = [json.loads(line) for line in "".join(pieces).splitlines()]
    assert told == [
        [5, "He", True, False, None, False],
        [6, "llo", False, False, None, False],
        [5, "He", False, True, "eos_token", True],
    ]
    assert found.formatter.is_done
    assert found.formatter.content_type == ""
    assert request.params.logprobs == 0


def of_26(token: Any, first_token: Any, last_token: Any, details: Any, generated_tokens: Any) -> str:
    return json.dumps([token.text, first_token, last_token, details.get("finish_reason"), generated_tokens]) + "\n"


def of_27(token: Any, first_token: Any, last_token: Any, details: Any, generated_text: Any, id: Any) -> str:
    assert token.request_id == id == 0
    return of_26(token, first_token, last_token, details, generated_text)


@pytest.mark.parametrize("function", [of_26, of_27])
@pytest.mark.parametrize(("prefix", "reason"), [("", None), ("hi", "length")], ids=["plain", "details"])
def test_writer_of_before_28_gets_what_it_takes(function: Callable[..., str], prefix: str, reason: str | None) -> None:
    wishes = {"details": bool(reason), "return_full_text": bool(prefix)}
    found = parsed({"inputs": "hi", "parameters": wishes}, Functions(output_formatter=function))
    (request,) = found.requests

    text = found.formatter.push(said(request.id, HE)) + found.formatter.push(said(request.id, LLO, done="length"))

    assert [json.loads(line) for line in text.splitlines()] == [
        ["He", True, False, None, prefix],
        ["llo", False, True, reason, prefix + "Hello"],
    ]


def test_details_of_before_28_tell_the_request() -> None:
    seen: list[Any] = []
    function = lambda token, first, last, details, text: seen.append(details) or ""  # noqa: E731
    found = parsed({"inputs": "hi", "parameters": {"details": True}}, Functions(output_formatter=function))

    found.formatter.push(said(found.requests[0].id, HE, done="length"))

    told = {"finish_reason": "length", "generated_tokens": 1, "inputs": "hi", "parameters": {"details": True}, "prompt_tokens": 2}
    assert seen == [{**told, "tokens": [{"id": 5, "text": "He", "log_prob": -0.25}]}]


def test_end_without_a_token_is_told() -> None:
    found = parsed({"inputs": "hi"}, Functions(output_formatter=lines))

    text = found.formatter.push(said(found.requests[0].id, done="length"))

    assert json.loads(text) == [-1, "", True, True, "length", True]


def test_writer_sees_the_request_and_its_details() -> None:
    seen: list[TextGenerationOutput] = []
    body = {"inputs": "hi", "parameters": {"decoder_input_details": True, "mine": 3}}
    found = parsed(body, Functions(output_formatter=lambda output: seen.append(output) or ""), tgi_compat=True)

    found.formatter.push(
        said(found.requests[0].id, HE, done="length", prompt_tokens=(Token(104, "h"), LLO), cumulative_logprob=-0.25)
    )

    (output,) = seen
    assert (output.input.input_text, output.input.input_ids, output.input.tgi_compat) == ("hi", [104, 105], True)
    assert output.input.parameters == {"decoder_input_details": True, "mine": 3}
    assert [token.log_prob for token in output.prompt_tokens_details] == [None, -9999.0]
    assert output.sequences[0].cumulative_log_prob == -0.25


@pytest.mark.parametrize(
    ("body", "options", "route", "form"),
    [
        ({"inputs": "a", "parameters": {"output_formatter": "jsonlines"}}, {}, "", JsonLines),
        ({"inputs": "a"}, {"output_formatter": "json"}, "", Json),
        ({"inputs": "a", "stream": True}, {}, "", CustomFormatter),
        ({"inputs": "a"}, {}, "/generate", Tgi),
    ],
)
def test_form_that_was_named_goes_before_the_models_own(
    body: dict[str, Any], options: dict[str, Any], route: str, form: type
) -> None:
    assert type(parsed(body, Functions(output_formatter=lines), route, **options).formatter) is form


def reader(**values: Any) -> Callable[..., TextInput]:
    def read(inputs: Input, **kwargs: Any) -> TextInput:
        assert {"configs", "tokenizer", "adapter_registry", "model_config", "peft_config", "rolling_batch", "is_rolling_batch",
                "image_placeholder_token"} == set(kwargs)  # fmt: skip
        return TextInput(**{"input_text": inputs.get_as_json()["text"], **values})

    return read


def test_reader_decides_what_is_asked() -> None:
    read = reader(parameters={"max_new_tokens": 5}, server_parameters={"seed": 7, "do_sample": True})

    (request,) = parsed({"text": "hello"}, Functions(read)).requests

    assert (request.prompt, request.params.max_tokens, request.params.seed) == ("hello", 5, 7)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ({}, Json),
        ({"output_formatter": "jsonlines"}, JsonLines),
        ({"output_formatter": lines}, CustomFormatter),
        ({"input_text": ["a"]}, JsonList),
    ],
)
def test_reader_may_choose_the_form(values: dict[str, Any], form: type) -> None:
    assert type(parsed({"text": "hello"}, Functions(reader(**values))).formatter) is form


def test_writer_gets_the_readers_own_object() -> None:
    class Mine(TextInput):
        mine = "kept"

    found = parsed({}, Functions(lambda inputs, **kwargs: Mine(input_text="a"), lambda output: output.input.mine))

    assert found.formatter.push(said(found.requests[0].id, HE, done="length")) == "kept"


def test_form_of_djl_is_read_field_by_field() -> None:
    content = PairList([("inputs", b"hello"), ("parameters", b'{"max_new_tokens": 3}')])
    config = HandlerConfig(engine=EngineConfig(model="m"), model_name="m")

    (request,) = parse_input(Input({"Content-Type": "multipart/form-data; boundary=x"}, content), ENGINE, config).requests

    assert (request.prompt, request.params.max_tokens) == ("hello", 3)


def test_other_routes_are_read_as_always() -> None:
    (request,) = parsed({"inputs": "hi"}, Functions(reader()), "/generate").requests

    assert request.prompt == "hi"


def fail(*values: Any, **more: Any) -> Any:
    raise KeyError("text")


@pytest.mark.parametrize(
    ("own", "body", "message"),
    [
        (Functions(fail), {}, "Input parsing failed: KeyError: 'text'"),
        (Functions(lambda inputs, **kwargs: {}), {}, "the @input_formatter of model.py must return a TextInput, not dict"),
        (Functions(reader(input_text=3)), {"text": "a"}, "inputs=3 must be a string that is not empty"),
        (Functions(reader(parameters={"top_p": 2})), {"text": "a"}, "parameters.top_p=2 is refused"),
        (
            Functions(output_formatter=lines),
            {"inputs": "a", "parameters": {"n": 2}},
            "parameters.n=2 is more than the model's own can tell apart",
        ),
        (
            Functions(output_formatter=lines),
            {"inputs": ["a"]},
            'inputs=["a"] is a list, which is for whole answers, not for the model\'s',
        ),
    ],
)
def test_bad_reading_is_told(own: Functions, body: dict[str, Any], message: str) -> None:
    with pytest.raises((RequestError, CustomFormatterError)) as caught:
        parsed(body, own)

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (fail, "Custom formatter failed: KeyError: 'text'"),
        (lambda output: {}, "Custom formatter failed: it must return a string, not dict"),
    ],
)
def test_bad_writing_ends_the_request(write: Callable[..., Any], message: str) -> None:
    found = parsed({"inputs": "hi"}, Functions(output_formatter=write))

    with pytest.raises(LmiError) as caught:
        found.formatter.push(said(found.requests[0].id, HE))

    assert str(caught.value) == message
    assert found.formatter.error(caught.value).code == 424


def test_failed_step_ends_what_the_writer_began() -> None:
    found = parsed({"inputs": "hi"}, Functions(output_formatter=lines))
    found.formatter.push(said(found.requests[0].id, HE))

    assert json.loads(found.formatter.error(StepError("step 7 failed")).text)["error"] == "step 7 failed"
