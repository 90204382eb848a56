"""text-generation-inference's bodies to engine requests."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from lmi_dist_handler.requests import Parsed, parse
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.tgi_responses import Tgi, TgiEvents, TgiFormatter, TgiWishes

from lmi_dist import EngineConfig, RequestError, SamplingParams

ENGINE = SimpleNamespace(image_token=None, tokenizer=None, model=SimpleNamespace(generation={"temperature": 0.5, "top_k": 3.0}))
HANDLER = HandlerConfig(engine=EngineConfig(model="m"), model_name="m")


def parsed(body: dict[str, Any], route: str = "/generate") -> Parsed:
    return parse(json.dumps(body).encode(), {"lmi_route": route}, ENGINE, HANDLER)


def params(**parameters: Any) -> SamplingParams:
    (request,) = parsed({"inputs": "hi", "parameters": parameters}).requests
    return request.params


def wishes(route: str = "/generate", stream: bool | None = None, **parameters: Any) -> TgiWishes:
    formatter = parsed({"inputs": "hi", "stream": stream, "parameters": parameters}, route).formatter
    assert isinstance(formatter, TgiFormatter)
    return formatter.wishes


def test_defaults_are_the_routers() -> None:
    (request,) = parsed({"inputs": "hi"}).requests

    assert (request.prompt, request.truncate) == ("hi", None)
    assert request.params == SamplingParams(max_tokens=100, temperature=0.0)
    assert wishes() == TgiWishes(prompt="hi")


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("max_new_tokens", 5, "max_tokens", 5),
        ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
        ("frequency_penalty", 0.5, "frequency_penalty", 0.5),
        ("stop", ["a"], "stop", ("a",)),
        ("temperature", 0.7, "temperature", 0.7),
        ("top_k", 4, "top_k", 4),
        ("top_p", 0.9, "top_p", 0.9),
        ("typical_p", 0.9, "typical_p", 0.9),
        ("best_of", 3, "n", 3),
        ("details", True, "logprobs", 0),
        ("decoder_input_details", True, "prompt_logprobs", 0),
        ("decoder_input_details", True, "logprobs", 0),
    ],
)
def test_parameter_reaches_the_engine(name: str, value: object, field: str, expected: object) -> None:
    assert getattr(params(**{name: value}), field) == expected


@pytest.mark.parametrize("word", [{"do_sample": True}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.9}, {"typical_p": 0.9}])
def test_any_word_of_sampling_makes_it_sampled(word: dict[str, Any]) -> None:
    found = params(**word)

    assert found.temperature == 1.0
    assert found.seed is not None  # so that the answer can tell it


def test_seed_is_told_when_it_decided() -> None:
    assert (wishes(do_sample=True, seed=7).seed, wishes(seed=7).seed) == (7, None)
    assert params(do_sample=True, seed=7).seed == 7


@pytest.mark.parametrize(
    ("route", "stream", "form", "is_listed"),
    [
        ("/generate", None, Tgi, False),
        ("/generate", True, TgiEvents, False),
        ("/generate_stream", None, TgiEvents, False),
        ("/generate_stream", False, TgiEvents, False),
        ("/", False, Tgi, True),
        ("/", True, TgiEvents, False),
    ],
)
def test_route_and_stream_choose_the_form(route: str, stream: bool | None, form: type, is_listed: bool) -> None:
    assert type(parsed({"inputs": "hi", "stream": stream}, route).formatter) is form
    assert wishes(route, stream).is_listed is is_listed


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "inputs is missing; it must be a string"),
        ({"inputs": ["a"]}, 'inputs=["a"] must be a string that is not empty'),
        (
            {"inputs": "a", "parameters": {"adapter_id": "x"}},
            'parameters.adapter_id="x" is known but not built yet; leave it out for',
        ),
        (
            {"inputs": "a", "parameters": {"grammar": {"type": "regex"}}},
            'parameters.grammar={"type": "regex"} is known but not built',
        ),
        ({"inputs": "a", "parameters": {"watermark": True}}, "parameters.watermark=true is known but not built yet"),
        (
            {"inputs": "a", "stream": True, "parameters": {"best_of": 2}},
            "parameters.best_of=2 is for whole answers; leave out best_of or",
        ),
        (
            {"inputs": "a", "stream": True, "parameters": {"decoder_input_details": True}},
            "parameters.decoder_input_details=true is for",
        ),
        ({"inputs": "a", "parameters": {"temperature": -1}}, "parameters.temperature=-1 is refused"),
        ({"inputs": "a", "parameters": {"seed": "x", "do_sample": True}}, 'parameters.seed="x" must be an integer'),
        ({"inputs": "a", "parameters": {"best_of": 1000}}, "parameters.best_of=1000 is refused"),
    ],
)
def test_bad_field_is_told_by_name(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parsed(body)

    assert str(caught.value).startswith(message)
