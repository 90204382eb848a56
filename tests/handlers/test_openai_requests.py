"""OpenAI's bodies to engine requests."""

import json
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from lmi_dist_handler.openai_responses import ChatEvents, CompletionEvents, OpenAIFormatter
from lmi_dist_handler.requests import Parsed, parse
from lmi_dist_handler.settings import HandlerConfig

from lmi_dist import EngineConfig, RequestError

WISHES = {"temperature": 0.5, "top_k": 40.0, "repetition_penalty": 1.25}


class Tokenizer:
    """Knows one template and one way to decode."""

    chat_template = "present"
    all_special_tokens = ()
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return str([message["content"] for message in messages])

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


ENGINE = SimpleNamespace(image_token=None, tokenizer=Tokenizer(), max_model_len=64, model=SimpleNamespace(generation=WISHES))
HANDLER = HandlerConfig(engine=EngineConfig(model="m"), model_name="served")


def completion(**body: Any) -> Parsed:
    return parse(json.dumps({"prompt": "hi", **body}).encode(), {"lmi_route": "/v1/completions"}, ENGINE, HANDLER)


def chat(**body: Any) -> Parsed:
    messages = [{"role": "user", "content": "hi"}]
    return parse(json.dumps({"messages": messages, **body}).encode(), {"lmi_route": "/v1/chat/completions"}, ENGINE, HANDLER)


def form(found: Parsed) -> OpenAIFormatter:
    assert isinstance(found.formatter, OpenAIFormatter)
    return found.formatter


def test_completion_defaults_are_openais() -> None:
    found = completion()

    (request,) = found.requests
    assert (request.prompt, request.add_special_tokens, request.params.max_tokens) == ("hi", True, 16)
    assert (request.params.temperature, request.params.top_k, request.params.repetition_penalty) == (0.5, 40, 1.25)
    assert form(found).ask.model == "served"


def test_client_beats_the_checkpoints_wishes() -> None:
    (request,) = completion(temperature=0, top_k=-1).requests

    assert (request.params.is_greedy, request.params.top_k) == (True, 0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_prompt_has_four_shapes(prompt: object, expected: list[object]) -> None:
    found = completion(prompt=prompt)

    assert [request.prompt for request in found.requests] == expected
    assert list(form(found).order) == [request.id for request in found.requests]


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], 3, [1.5], ["a", 1], [True], {"a": 1}, [[1], "x", []]])
def test_bad_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(RequestError, match=r"prompt=.* must be a string, a list of strings"):
        completion(prompt=prompt)


def test_too_many_prompts_are_refused() -> None:
    with pytest.raises(RequestError, match="prompt has 129 prompts, but at most 128"):
        completion(prompt=["a"] * 129)


def test_echo_needs_the_prompts_text() -> None:
    found = completion(prompt=[[1, 2], [3]], echo=True, logprobs=2)

    assert form(found).ask.prompts == ["1 2", "3"]
    assert {request.params.prompt_logprobs for request in found.requests} == {2}


def test_stream_options_ask_for_usage() -> None:
    found = completion(stream=True, stream_options={"include_usage": True})

    assert isinstance(found.formatter, CompletionEvents)
    assert found.formatter.ask.include_usage


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"suffix": "x"}, 'suffix="x" is known but not built yet'),
        ({"stream": True, "best_of": 2}, "best_of=2 must equal n when stream is true"),
        ({"stream_options": {}}, "stream_options={} is only allowed when stream is true"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage=1 must be true or false"),
        ({"temperature": 2.5}, "temperature=2.5 must be between 0 and 2"),
        ({"presence_penalty": 3}, "presence_penalty=3 must be between -2 and 2"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3 must be between -2 and 2"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5=101 must be between -100 and 100"),
        ({"logit_bias": 3}, "logit_bias=3 must be an object"),
        ({"logprobs": True}, "logprobs=true must be an integer"),
        ({"max_tokens": 0}, "max_tokens=0 is refused"),
        ({"prompt": None}, "prompt is missing"),
        ({"model": 3}, "model=3 must be a string"),
    ],
)
def test_bad_completion_is_told_by_name(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**body)

    assert str(caught.value).startswith(message)


def test_chat_runs_to_the_models_length() -> None:
    (request,) = chat().requests

    assert (request.prompt, request.add_special_tokens, request.params.max_tokens) == ("['hi']", False, None)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_chat_length_has_two_names(name: str) -> None:
    assert chat(**{name: 9}).requests[0].params.max_tokens == 9


@pytest.mark.parametrize(
    ("body", "logprobs"),
    [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 5}, 5), ({"logprobs": False}, None)],
)
def test_chat_logprobs_have_two_words(body: dict[str, Any], logprobs: int | None) -> None:
    found = chat(**body)

    assert found.requests[0].params.logprobs == logprobs
    assert form(found).ask.logprobs is (logprobs is not None)


def test_chat_streams_for_all_candidates() -> None:
    found = chat(stream=True, n=3, model="theirs", user="u", response_format={"type": "text"}, tool_choice="auto")

    assert isinstance(found.formatter, ChatEvents)
    assert (found.formatter.ask.num_candidates, found.formatter.ask.model) == (3, "theirs")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"top_logprobs": 3}, "top_logprobs=3 needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs=21 must be an integer of at least 0 and at most 20"),
        ({"logprobs": 1}, "logprobs=1 must be true or false"),
        ({"tool_choice": "required"}, 'tool_choice="required" is known but not built yet; use auto'),
        ({"response_format": {"type": "json_object"}}, 'response_format={"type": "json_object"} is known but not built yet'),
        ({"modalities": ["audio"]}, 'modalities=["audio"] is known but not built yet; use ["text"]'),
        ({"functions": [{}]}, "functions=[{}] is known but not built yet"),
        ({"messages": []}, "messages must be a list with at least one message"),
        ({"messages": "hi"}, 'messages="hi" must be a list'),
    ],
)
def test_bad_chat_is_told_by_name(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**body)

    assert str(caught.value).startswith(message)
