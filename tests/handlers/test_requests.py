"""LMI bodies to engine requests: names, defaults, forms; and that each bad one is told what is wrong with it."""

import contextlib
import json
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmi_dist_handler.dialects import TODAY_ASYNC
from lmi_dist_handler.openai_responses import Chat, Completion, DjlChat, DjlChatEvents, DjlChatLines
from lmi_dist_handler.requests import Parsed, parse
from lmi_dist_handler.responses import Json, JsonLines, JsonList, LmiFormatter, RawText, Sse
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.tgi_responses import Tgi, TgiEvents

from lmi_dist import EngineConfig, Output, RequestError, SamplingParams


class PlainChat:
    """A tokenizer whose template is one line a message."""

    chat_template = "present"
    all_special_tokens = ()
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


WISHES = {"temperature": 0.5, "top_p": 0.75, "top_k": 40.0}
ENGINE = SimpleNamespace(image_token=None, tokenizer=PlainChat(), max_model_len=64, model=SimpleNamespace(generation=WISHES))


def handler(**more: Any) -> HandlerConfig:
    return HandlerConfig(engine=EngineConfig(model="m"), model_name="m", **more)


def parsed(body: object, config: HandlerConfig | None = None, **properties: str) -> Parsed:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse(data, properties, ENGINE, config or handler())


def params(**parameters: Any) -> SamplingParams:
    (request,) = parsed({"inputs": "hi", "parameters": parameters}).requests
    return request.params


# text


def test_defaults_are_djls() -> None:
    found = parsed({"inputs": "hi"})

    (request,) = found.requests
    assert (request.prompt, request.truncate, request.add_special_tokens) == ("hi", None, True)
    assert request.params == SamplingParams(max_tokens=30, temperature=0.0)
    assert isinstance(found.formatter, Json)


@pytest.mark.parametrize(
    ("given_name", "value", "field", "expected"),
    [
        ("max_new_tokens", 5, "max_tokens", 5),
        ("min_new_tokens", 3, "min_tokens", 3),
        ("top_k", -1, "top_k", 0),
        ("top_k", 0, "top_k", 0),
        ("top_k", 7, "top_k", 7),
        ("top_p", 1, "top_p", 1.0),
        ("typical_p", 0.5, "typical_p", 0.5),
        ("min_p", 0.1, "min_p", 0.1),
        ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
        ("presence_penalty", -3, "presence_penalty", -3.0),
        ("frequency_penalty", 0.5, "frequency_penalty", 0.5),
        ("seed", 2**40, "seed", 2**40),
        ("stop_sequences", ["a", "b"], "stop", ("a", "b")),
        ("stop", "a", "stop", ("a",)),
        ("stop_token_ids", [5], "stop_token_ids", (5,)),
        ("ignore_eos_token", True, "ignore_eos", True),
        ("skip_special_tokens", False, "skip_special_tokens", False),
        ("include_stop_str_in_output", True, "include_stop_string", True),
        ("logit_bias", {"7": -1.5}, "logit_bias", {7: -1.5}),
        ("n", 3, "n", 3),
        ("seed", None, "seed", None),
    ],
)
def test_parameter_reaches_the_engine(given_name: str, value: object, field: str, expected: object) -> None:
    assert getattr(params(**{given_name: value}), field) == expected


def test_stop_strings_of_both_names_add_up() -> None:
    assert params(stop_sequences=["a"], stop="b").stop == ("b", "a")


def test_without_do_sample_is_greedy() -> None:
    assert params(temperature=0.9, top_p=0.5).temperature == 0.0


def test_do_sample_takes_the_checkpoints_wishes() -> None:
    found = params(do_sample=True, top_p=0.9)

    assert (found.temperature, found.top_p, found.top_k) == (0.5, 0.9, 40)


def test_truncate_goes_with_the_request() -> None:
    (request,) = parsed({"inputs": "hi", "parameters": {"truncate": 4}}).requests

    assert request.truncate == 4


@pytest.mark.parametrize(
    ("parameters", "logprobs", "prompt_logprobs"),
    [
        ({}, None, None),
        ({"details": True}, 0, None),
        ({"details": True, "top_n_tokens": 3}, 3, None),
        ({"details": True, "decoder_input_details": True}, 0, 0),
        ({"decoder_input_details": True}, None, None),
        ({"n": 2}, 0, None),
    ],
)
def test_logprobs_are_computed_only_to_be_shown(
    parameters: dict[str, Any], logprobs: int | None, prompt_logprobs: int | None
) -> None:
    found = params(**parameters)

    assert (found.logprobs, found.prompt_logprobs) == (logprobs, prompt_logprobs)


def test_todays_async_mode_takes_top_n_tokens_for_n() -> None:
    config = handler(dialect=TODAY_ASYNC)
    asks = {"details": True, "do_sample": True, "top_n_tokens": 3}

    (request,) = parsed({"inputs": "hi", "parameters": asks}, config).requests
    (with_both,) = parsed({"inputs": "hi", "parameters": {**asks, "n": 2}}, config).requests
    with pytest.raises(RequestError, match=r"parameters.top_n_tokens=0 must be an integer of at least 1"):
        parsed({"inputs": "hi", "parameters": {**asks, "top_n_tokens": 0}}, config)

    assert (request.params.n, request.params.logprobs) == (3, 0)
    assert with_both.params.n == 2


def test_best_of_alone_shows_all_of_them() -> None:
    assert (params(best_of=3).n, params(best_of=3, n=1).n, params(best_of=3, n=1).best_of) == (3, 1, 3)


def test_unknown_parameters_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        params(watermark=True)

    assert caplog.messages == ["request parameter 'parameters.watermark' is unknown and ignored"]


def test_of_many_unknown_parameters_some_are_named(caplog: pytest.LogCaptureFixture) -> None:
    params(**{f"made_up_{i}": 1 for i in range(1000)})

    assert len(caplog.messages) == 16


def test_list_of_inputs_is_a_request_each() -> None:
    found = parsed({"inputs": ["a", "b"], "parameters": {"max_new_tokens": 3, "seed": 5, "truncate": 4}})

    assert [(request.prompt, request.params.max_tokens, request.truncate) for request in found.requests] == [
        ("a", 3, 4),
        ("b", 3, 4),
    ]
    assert isinstance(found.formatter, JsonList)


def test_text_that_is_no_json_comes_by_its_content_type() -> None:
    (request,) = parsed("Grüße".encode(), **{"Content-Type": "text/plain; charset=utf-8"}).requests

    assert request.prompt == "Grüße"


def test_max_tokens_is_max_new_tokens_unless_both_are_given() -> None:
    assert (params(max_tokens=7).max_tokens, params(max_tokens=7, max_new_tokens=5).max_tokens) == (7, 5)


# the form of the answer


@pytest.mark.parametrize(
    ("body", "options", "form"),
    [
        ({}, {}, Json),
        ({"stream": True}, {}, JsonLines),
        ({"stream": True}, {"tgi_compat": True}, Sse),
        ({}, {"output_formatter": "jsonlines"}, JsonLines),
        ({"stream": True}, {"output_formatter": "json"}, Json),
        ({"parameters": {"output_formatter": "sse"}}, {"output_formatter": "json"}, Sse),
        ({"parameters": {"output_formatter": "none"}}, {}, RawText),
        ({"parameters": {"output_formatter": "json_chat"}}, {}, DjlChat),
        ({"parameters": {"output_formatter": "sse_chat"}}, {}, DjlChatEvents),
    ],
)
def test_form_is_the_requests_then_the_options(body: dict[str, Any], options: dict[str, Any], form: type) -> None:
    assert type(parsed({"inputs": "hi", **body}, handler(**options)).formatter) is form


def test_tgi_shows_details_by_default() -> None:
    formatter = parsed({"inputs": "hi"}, handler(tgi_compat=True)).formatter

    assert isinstance(formatter, LmiFormatter)
    assert formatter.wishes.details


@pytest.mark.parametrize(
    ("body", "options", "form"),
    [
        ({}, {}, DjlChat),
        ({"stream": True}, {}, DjlChatLines),
        ({"stream": True}, {"output_formatter": "sse"}, DjlChatEvents),
        ({}, {"output_formatter": "jsonlines"}, DjlChat),
    ],
)
def test_messages_make_it_a_chat(body: dict[str, Any], options: dict[str, Any], form: type) -> None:
    found = parsed({"messages": [{"role": "user", "content": "hi"}], **body}, handler(**options))

    (request,) = found.requests
    assert (request.prompt, request.add_special_tokens, request.params.max_tokens) == ("user: hi\n", False, 30)
    assert type(found.formatter) is form


def test_formatter_knows_its_request() -> None:
    found = parsed({"inputs": "hi"})

    text = found.formatter.push(Output(request_id=found.requests[0].id, text="yes", finish_reason="length"))

    assert json.loads(text) == {"generated_text": "yes"}


@pytest.mark.parametrize(("route", "body", "form"), [
    ("/v1/completions", {"prompt": "hi"}, Completion),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, Chat),
    ("/generate", {"inputs": "hi"}, Tgi),
    ("/generate_stream", {"inputs": "hi"}, TgiEvents),
    ("/", {"inputs": "hi", "stream": True}, TgiEvents),
])  # fmt: skip
def test_route_of_the_host_decides(route: str, body: dict[str, Any], form: type) -> None:
    assert type(parsed(body, LMI_Route=route).formatter) is form


# what is refused


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty; send a JSON object"),
        (b"{", "the body is not JSON: "),
        (b'{"inputs": "\xff"}', "the body is not UTF-8: byte 12 is 0xff"),
        (b'{"inputs": "\\ud800"}', "the body escapes half of a surrogate pair"),
        (b'{"inputs": NaN}', "inputs=NaN must be a string"),
        (b'{"inputs": "a", "parameters": {"top_p": 1e999}}', "parameters.top_p=inf is refused"),
        (b"[" * 100000, "the body is nested too deeply"),
        (b'["inputs"]', 'the body must be a JSON object, not ["inputs"]'),
        (b'"inputs"', 'the body must be a JSON object, not "inputs"'),
        (b"1" * 5000, "the body is not JSON: "),
        (b"{}", "inputs is missing; it must be a string"),
    ],
    ids=range(11),
)
def test_bad_body_is_told_what_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parsed(body)

    assert str(caught.value).startswith(message) or message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": ""}, 'inputs="" must be a string that is not empty'),
        ({"inputs": 3}, "inputs=3 must be a string that is not empty"),
        ({"inputs": []}, "inputs=[] must be a string, or a list of strings, none empty"),
        ({"inputs": ["a", ""]}, 'inputs=["a", ""] must be a string, or a list of strings, none empty'),
        ({"inputs": ["a", 3]}, 'inputs=["a", 3] must be a string, or a list of strings, none empty'),
        (
            {"inputs": ["a"], "stream": True},
            'inputs=["a"] is a list, which is for whole answers, not for jsonlines; leave out stream or send one string',
        ),
        ({"inputs": "a", "stream": "yes"}, 'stream="yes" must be true or false'),
        ({"inputs": "a", "parameters": [1]}, "parameters=[1] must be an object"),
        ({"inputs": "a", "adapters": "x"}, 'adapters="x" is known but not built yet; leave it out for the base model'),
    ],
)
def test_bad_field_is_told_by_name(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parsed(body)

    assert str(caught.value) == message
    assert caught.value.field == message.partition("=")[0]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_new_tokens", 0, "greater than or equal to 1"),
        ("max_new_tokens", "5", "valid integer"),
        ("max_new_tokens", 5.5, "valid integer"),
        ("max_new_tokens", True, "valid integer"),
        ("temperature", "hot", "valid number"),
        ("temperature", -1, "greater than or equal to 0"),
        ("temperature", float("inf"), "finite number"),
        ("temperature", float("nan"), "finite number"),
        ("max_new_tokens", float("nan"), "valid integer"),
        ("top_k", -2, "greater than or equal to 0"),
        ("top_k", 1.5, "valid integer"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.5, "less than or equal to 1"),
        ("typical_p", 0, "greater than 0"),
        ("min_p", 2, "less than or equal to 1"),
        ("repetition_penalty", 0, "greater than 0"),
        ("seed", 2**64, "less than"),
        ("seed", "x", "valid integer"),
        ("do_sample", "yes", "must be true or false"),
        ("ignore_eos_token", 1, "valid boolean"),
        ("details", 1, "must be true or false"),
        ("return_full_text", "x", "must be true or false"),
        ("decoder_input_details", 2, "must be true or false"),
        ("truncate", 0, "must be an integer of at least 1"),
        ("truncate", False, "must be an integer of at least 1"),
        ("top_n_tokens", -1, "must be an integer of at least 0"),
        ("logprobs", "x", "must be an integer of at least 0"),
        ("n", 0, "must be an integer of at least 1"),
        ("n", 1000, "less than or equal to 128"),
        ("best_of", 1000, "less than or equal to 128"),
        ("num_beams", 4, "is known but not built yet; leave it out and use best_of"),
        ("use_beam_search", True, "is known but not built yet"),
        ("output_formatter", "3p", "is known but not built yet; it must be one of json"),
        ("output_formatter", "yaml", "must be one of json"),
        ("output_formatter", 3, "must be a string that is not empty"),
        ("stop", [""], "at least 1 character"),
        ("stop", ["x" * 5000], "at most 4096 characters"),
        ("stop", ["x"] * 100, "at most 64 items"),
        ("stop", 3, "must be a string or a list of strings"),
        ("stop_sequences", [3], "must be a string or a list of strings"),
        ("stop_token_ids", ["x"], "valid integer"),
        ("stop_token_ids", 5, "must be a list"),
        ("logit_bias", {"x": 1}, "'x' is no token id"),
        ("logit_bias", {"1": "x"}, "valid number"),
        ("logit_bias", [1], "must be an object"),
    ],
)
def test_bad_parameter_is_told_by_name(name: str, value: object, rule: str) -> None:
    with pytest.raises(RequestError) as caught:
        params(**{name: value})

    assert str(caught.value).startswith(f"parameters.{name}=")
    assert rule in str(caught.value)
    assert len(str(caught.value)) < 400


def test_best_of_below_n_is_refused() -> None:
    with pytest.raises(RequestError, match=r"best_of=2 must be at least parameters\.n=3"):
        params(best_of=2, n=3)


@pytest.mark.parametrize("name", ["n", "best_of"])
def test_raw_text_is_of_one_candidate(name: str) -> None:
    with pytest.raises(RequestError, match=rf"parameters\.{name}=2 is more than none can tell apart"):
        parsed({"inputs": "a", "parameters": {name: 2, "output_formatter": "none"}})


@pytest.mark.parametrize("name", ["n", "best_of"])
def test_several_candidates_stream(name: str) -> None:
    found = parsed({"inputs": "a", "stream": True, "parameters": {name: 2}})

    assert (type(found.formatter), found.requests[0].params.n) == (JsonLines, 2)


@pytest.mark.parametrize("form", ["jsonlines", "sse", "none", "jsonlines_chat", "sse_chat"])
def test_best_of_more_than_n_does_not_stream(form: str) -> None:
    with pytest.raises(RequestError, match=r"parameters\.best_of=3 must equal n=1 where tokens are sent as they come"):
        parsed({"inputs": "a", "parameters": {"n": 1, "best_of": 3, "output_formatter": form}})


def test_too_many_inputs_are_refused() -> None:
    with pytest.raises(RequestError, match="inputs has 129 entries, but at most 128 go into one request"):
        parsed({"inputs": ["a"] * 129})


def test_adapter_header_is_refused() -> None:
    with pytest.raises(RequestError, match="header adapter='french' is known but not built yet"):
        parsed({"inputs": "a"}, Adapter="french")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    ["inputs", "parameters", "stream", "messages", "prompt", "n", "stop", "logprobs", "top_logprobs", "logit_bias",
     "stream_options", "max_tokens", "temperature", "echo", "best_of", "tools", "model", "response_format"]
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.dictionaries(NAMES, JSON, max_size=5), st.sampled_from(["", "/v1/completions", "/v1/chat/completions", "/generate"]))
def test_any_json_is_parsed_or_refused(body: dict[str, Any], route: str) -> None:
    with contextlib.suppress(RequestError):
        assert parsed(body, lmi_route=route).requests


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=20))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parsed(body)
