"""Requests refuse what breaks a rule, and say which field, value and rule."""

import math

import pytest

from lmi_dist.errors import RequestError
from lmi_dist.request import MAX_CANDIDATES, Request, SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("max_tokens", 0, "greater than or equal to 1"),
        ("max_tokens", "7", "valid integer"),
        ("max_tokens", True, "valid integer"),
        ("min_tokens", -1, "greater than or equal to 0"),
        ("n", 0, "greater than or equal to 1"),
        ("n", MAX_CANDIDATES + 1, "less than or equal to 128"),
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", math.nan, "finite number"),
        ("temperature", math.inf, "finite number"),
        ("top_k", -1, "greater than or equal to 0"),
        ("top_p", 0.0, "greater than 0"),
        ("top_p", 1.01, "less than or equal to 1"),
        ("typical_p", 0.0, "greater than 0"),
        ("min_p", 1.1, "less than or equal to 1"),
        ("repetition_penalty", 0.0, "greater than 0"),
        ("presence_penalty", math.inf, "finite number"),
        ("logit_bias", {1: math.nan}, "finite number"),
        ("seed", 2**64, "less than"),
        ("stop", ("",), "at least 1 character"),
        ("stop", ("x" * 5000,), "at most 4096 characters"),
        ("stop", ("x",) * 65, "at most 64 items"),
        ("stop_token_ids", tuple(range(65)), "at most 64 items"),
        ("logprobs", -1, "greater than or equal to 0"),
        ("ignore_eos", 1, "valid boolean"),
        ("no_such_field", 1, "not permitted"),
    ],
)
def test_bad_value_names_field_value_and_rule(field, value, rule):
    with pytest.raises(RequestError) as caught:
        SamplingParams.of({field: value})

    assert str(caught.value).startswith(f"{field}={repr(value)[:100]}")
    assert rule in str(caught.value)
    assert caught.value.field == field


def test_message_uses_the_clients_name():
    with pytest.raises(RequestError, match=r"^max_new_tokens=0 is refused: ") as caught:
        SamplingParams.of({"max_tokens": 0}, {"max_tokens": "max_new_tokens"})

    assert caught.value.field == "max_new_tokens"


def test_best_of_is_at_least_n():
    with pytest.raises(RequestError, match="best_of=2 must be at least n=3"):
        SamplingParams.of({"n": 3, "best_of": 2})


def test_min_tokens_is_at_most_max_tokens():
    with pytest.raises(RequestError, match="min_tokens=9 must be at most max_tokens=8"):
        SamplingParams.of({"min_tokens": 9, "max_tokens": 8})


@pytest.mark.parametrize(("params", "number"), [({}, 1), ({"n": 3}, 3), ({"n": 2, "best_of": 5}, 5)])
def test_best_of_decides_the_number_of_candidates(params, number):
    assert SamplingParams.of(params).num_candidates == number


def test_temperature_zero_is_greedy():
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams().is_greedy


def test_requests_do_not_change():
    request = Request(id="a", prompt="x")

    with pytest.raises(AttributeError):
        request.prompt = "y"
