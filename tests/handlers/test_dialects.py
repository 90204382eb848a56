"""handlers/lmi_dist_handler/dialects.py: which version is meant, and how a token, an end and an answer look in it."""

import json

import pytest
from lmi_dist_handler.dialects import OURS, TODAY, TODAY_ASYNC, V26, V27, V28, V29, LmiDialect, dialect_of
from lmi_dist_handler.formatter import Told
from lmi_dist_handler.openai_responses import Ask, CompletionEvents
from lmi_dist_handler.responses import JsonPieces, Wishes
from lmi_dist_handler.todays_responses import TodaysJson, TodaysLines, unframed

from lmi_dist import Output, RequestError, StepError, Token


@pytest.mark.parametrize(
    ("version", "is_async", "dialect"),
    [
        ("0.25.0", False, V26), ("0.26.0", False, V26), ("0.27.0", False, V27), ("0.28.0", False, V28), ("0.29.0", False, V29),
        ("0.29.0-SNAPSHOT", False, V29), ("0.30.0", False, TODAY), ("0.36.0", False, TODAY), ("0.36.0", True, TODAY_ASYNC),
        ("1.0", False, TODAY), ("nightly", False, TODAY),
    ],
)  # fmt: skip
def test_version_tells_the_dialect(version: str, is_async: bool, dialect: LmiDialect) -> None:
    assert dialect_of(version, is_async=is_async) is dialect


def test_token_has_its_versions_fields() -> None:
    tokens = [dialect.token(0, "", 0.0, is_special=True) for dialect in (V26, V27, V28, OURS)]

    whole = {"id": 0, "text": "", "log_prob": 0.0, "special_token": True}
    assert tokens == [{"special_token": True}, {"id": [0], "special_token": True}, whole, whole]


def test_stop_string_has_its_own_reason_in_the_first_version_only() -> None:
    assert [dialect.reason("stop_sequence") for dialect in (V26, V27, TODAY)] == ["stop_sequence", "eos_token", "eos_token"]
    assert V26.reason(None) == ""


def pieces(dialect: LmiDialect, **wishes: bool) -> JsonPieces:
    return JsonPieces(Wishes(prompt='say "hi"', dialect=dialect, **wishes))


def output(text: str, reason: str | None = None) -> Output:
    return Output(request_id="r", text=text, tokens=(Token(5, text),), finish_reason=reason, num_generated_tokens=2)  # type: ignore[arg-type]


def test_json_comes_in_pieces_that_are_one_object() -> None:
    form = pieces(V26, details=True, return_full_text=True)

    texts = [form.push(output('a"')), form.push(output("\n", "stop_sequence"))]

    assert texts == [
        '{"generated_text": "say \\"hi\\"a\\"',
        '\\n", "details": {"finish_reason": "stop_sequence", "tokens": [{"id": 5, "text": "a\\""}, {"id": 5, "text": "\\n"}]}}',
    ]


def test_tgi_gets_the_pieces_of_a_list() -> None:
    form = pieces(V28, tgi_compat=True)

    assert form.push(output("a", "length")) == '[{"generated_text": "a"}]'


def test_failed_step_is_told_in_form_where_the_version_does() -> None:
    begun, fresh = pieces(V28), pieces(V28)
    begun.push(output("a"))

    told = [form.error(StepError("step 7 failed")) for form in (begun, fresh)]

    assert told == [
        Told(424, "step 7 failed", '", "details": {"finish_reason": "error"}}', in_form=True),
        Told(424, "step 7 failed", '{"generated_text": "", "details": {"finish_reason": "error"}}', in_form=True),
    ]
    assert not pieces(V27).error(StepError("step 7 failed")).in_form


def todays(form: type[TodaysJson | TodaysLines], **wishes: bool) -> list[str]:
    """The texts of a request that ends with its second token."""
    formatter = form(Wishes(prompt="p", dialect=TODAY_ASYNC, **wishes), 7)
    return [formatter.push(output("a")), formatter.push(output("b", "stop_sequence"))]


def test_todays_answers_are_those_of_its_own_handler() -> None:
    token = {"id": 5, "text": "a", "logprob": None}
    ending = {"finish_reason": "eos_token", "seed": 7, "generated_tokens": 2}

    whole = todays(TodaysJson, details=True)
    first, last = todays(TodaysLines)

    details = {**ending, "prefill": [], "tokens": [token, {**token, "text": "b"}]}
    assert whole == ["", json.dumps({"generated_text": "ab", "details": details}) + "\n"]
    assert todays(TodaysJson)[1] == '{"generated_text": "ab"}\n'
    assert json.loads(first) == {"index": 0, "token": token, "generated_text": None, "details": None}
    assert last.endswith("\n\n")
    assert json.loads(last)["generated_text"] == "ab"
    assert json.loads(last)["details"] == {**ending, "input_length": 0}


def test_openais_events_come_as_lines() -> None:
    form = unframed(CompletionEvents(Ask(model="m", request_ids=["r"])))

    texts = [form.push(output("a\n\nb")), form.push(output("", "length"))]

    assert form.is_done
    assert form.content_type == "application/jsonlines"
    assert [json.loads(text)["choices"][0]["text"] for text in texts] == ["a\n\nb", ""]
    assert all(text.endswith("}\n") for text in texts)
    told = unframed(CompletionEvents(Ask(model="m", request_ids=["r"]))).error(RequestError("top_p=2 is refused", "top_p"))
    assert (told.code, json.loads(told.text)["error"]["param"]) == (400, "top_p")
