"""The LMI schema's forms from hand-made outputs, and errors in both dialects."""

import json
from typing import Any

import pytest
from lmi_dist_handler.formatter import Formatter
from lmi_dist_handler.responses import Json, JsonLines, RawText, Sse, Wishes, error_body, refusal

from lmi_dist import MemoryPlanError, Output, OverloadedError, RequestError, StepError, Token, TokenLogprob

TOP = (TokenLogprob(244, "He", -0.25, 0), TokenLogprob(7, "Hi", -2.0, 1))
HE = Token(244, "He", -0.25, top=TOP)
WORLD = Token(4558, ' "wörld"\n', -0.5)
END = Token(2, "", float("-inf"), is_special=True)
TEXT = 'He "wörld"\n'


def said(*tokens: Token, index: int = 0, done: str | None = None, num: int = 0, **more: Any) -> Output:
    """An output of request r; `num` tokens have been generated so far."""
    text = "".join(token.text for token in tokens)
    values: dict[str, Any] = {"finish_reason": done, "num_generated_tokens": num, "num_prompt_tokens": 2, **more}
    return Output(request_id="r", index=index, text=text, tokens=tokens, **values)


def whole(formatter: Formatter, *outputs: Output) -> str:
    text = "".join(formatter.push(output) for output in outputs)
    assert formatter.is_done
    return text


HELLO = (said(HE, num=1), said(num=1), said(WORLD, END, done="eos_token", num=3))


def lines(text: str) -> list[Any]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


# json


def test_json_is_one_object_at_the_end() -> None:
    form = Json(Wishes(prompt="p"))

    assert [form.push(output) for output in HELLO] == ["", "", json.dumps({"generated_text": TEXT}, ensure_ascii=False)]
    assert form.content_type == "application/json"


def test_json_full_text_is_escaped() -> None:
    text = whole(Json(Wishes(prompt='say "x"\n', return_full_text=True)), *HELLO)

    assert json.loads(text) == {"generated_text": 'say "x"\n' + TEXT}


def test_json_details_have_contract_shape() -> None:
    wishes = Wishes(prompt="p", details=True, decoder_input_details=True, top_tokens=True)
    prompt_tokens = (Token(1, "<s>", None), Token(9, "p", -1.5))

    text = whole(Json(wishes), said(HE, num=1, prompt_tokens=prompt_tokens), said(WORLD, done="length", num=2))

    assert text == (
        '{"generated_text": "He \\"wörld\\"\\n", "details": {"finish_reason": "length", "generated_tokens": 2, "inputs": "p", '
        '"tokens": [{"id": 244, "text": "He", "log_prob": -0.25}, {"id": 4558, "text": " \\"wörld\\"\\n", "log_prob": -0.5}], '
        '"prefill": [{"id": 1, "text": "<s>", "log_prob": null}, {"id": 9, "text": "p", "log_prob": -1.5}], '
        '"top_tokens": [[{"id": 244, "text": "He", "log_prob": -0.25}, {"id": 7, "text": "Hi", "log_prob": -2.0}], []]}}'
    )


def test_best_candidate_leads_the_others() -> None:
    worse = (said(HE, num=1, cumulative_logprob=-3.0), said(END, done="eos_token", num=2, cumulative_logprob=-4.0))
    better = (said(WORLD, index=1, done="length", num=1, cumulative_logprob=-0.5),)

    text = whole(Json(Wishes(prompt="p", num_candidates=2)), worse[0], *better, worse[1])

    shown = json.loads(text)
    assert shown["generated_text"] == WORLD.text
    assert list(shown["details"]) == ["inputs", "finish_reason", "generated_tokens", "tokens", "best_of_sequences"]
    (other,) = shown["details"]["best_of_sequences"]
    assert (other["generated_text"], other["finish_reason"], other["generated_tokens"]) == ("He", "eos_token", 2)
    assert [token["id"] for token in other["tokens"]] == [244, 2]


def test_stop_string_is_told_as_eos_token() -> None:
    text = whole(Json(Wishes(prompt="p", details=True)), said(HE, done="stop_sequence", num=1))

    assert json.loads(text)["details"]["finish_reason"] == "eos_token"


def test_tgi_json_is_a_list_with_its_token_fields() -> None:
    text = whole(Json(Wishes(prompt="p", details=True, tgi_compat=True)), *HELLO)

    (shown,) = json.loads(text)
    assert shown["details"]["tokens"][2] == {"id": 2, "text": "", "logprob": -9999.0, "special": True}


# jsonlines, sse, raw text


def test_jsonlines_is_a_line_a_token() -> None:
    form = JsonLines(Wishes(prompt="p"))

    texts = [form.push(output) for output in HELLO]

    assert texts == [
        '{"token": {"id": 244, "text": "He", "log_prob": -0.25}}\n',
        "",
        '{"token": {"id": 4558, "text": " \\"wörld\\"\\n", "log_prob": -0.5}}\n'
        '{"token": {"id": 2, "text": "", "log_prob": -9999.0, "special_token": true}, "generated_text": "He \\"wörld\\"\\n"}\n',
    ]
    assert form.content_type == "application/jsonlines"


def test_jsonlines_details_have_no_tokens() -> None:
    last = lines(whole(JsonLines(Wishes(prompt="p", details=True, return_full_text=True)), *HELLO))[-1]

    assert last["generated_text"] == "p" + TEXT
    assert last["details"] == {"finish_reason": "eos_token", "generated_tokens": 3, "inputs": "p"}


def test_end_without_a_token_still_has_a_line() -> None:
    last = lines(whole(JsonLines(Wishes(prompt="p")), HELLO[0], said(done="abort", num=1)))[-1]

    assert (last["token"]["id"], last["generated_text"]) == (-1, "He")


def test_lines_of_several_candidates_tell_whose_they_are() -> None:
    form = JsonLines(Wishes(prompt="p", num_candidates=2))

    told = lines(whole(form, said(HE), said(WORLD, index=1, done="length"), said(END, done="eos_token")))

    assert [(line["index"], line["token"]["id"], line.get("generated_text")) for line in told] == [
        (0, 244, None),
        (1, 4558, ' "wörld"\n'),
        (0, 2, "He"),
    ]


def test_sse_events_are_the_jsonlines_lines() -> None:
    events = whole(Sse(Wishes(prompt="p", details=True)), *HELLO)

    plain = whole(JsonLines(Wishes(prompt="p", details=True)), *HELLO)
    assert events == "".join(f"data: {line}\n\n" for line in plain.splitlines())
    assert Sse.content_type == "text/event-stream"


def test_tgi_sse_has_its_token_fields() -> None:
    first = whole(Sse(Wishes(prompt="p", tgi_compat=True)), *HELLO).partition("\n")[0]

    assert json.loads(first.removeprefix("data: ")) == {"token": {"id": 244, "text": "He", "logprob": -0.25, "special": False}}


def test_raw_text_is_the_text() -> None:
    assert whole(RawText(Wishes(prompt="p: ", return_full_text=True)), *HELLO) == "p: " + TEXT


# errors


def test_error_before_any_text_is_a_whole_body() -> None:
    form = JsonLines(Wishes(prompt="p"))

    code, message, text, _ = form.error(RequestError("top_p=2 is refused", "top_p"))

    assert (code, message) == (424, "top_p=2 is refused")
    assert text == '{\n  "code":424,\n  "message":"prediction failure",\n  "error":"top_p=2 is refused"\n}'
    assert form.is_done


def test_error_in_mid_stream_is_a_last_line() -> None:
    form = JsonLines(Wishes(prompt="p"))
    form.push(HELLO[0])

    told = form.error(StepError("step 7 failed"))

    assert lines(told.text) == [
        {
            "token": {"id": -1, "text": "", "log_prob": -1, "special_token": True, "error_msg": "step 7 failed"},
            "generated_text": "He",
            "details": {"finish_reason": "error"},
        }
    ]


def test_error_ends_each_candidate_that_was_open() -> None:
    form = JsonLines(Wishes(prompt="p", num_candidates=3))
    form.push(said(HE, done="length"))
    form.push(said(WORLD, index=1))

    told = lines(form.error(StepError("step 7 failed")).text)

    assert [(line["index"], line["generated_text"]) for line in told] == [(1, ' "wörld"\n'), (2, "")]
    assert {line["details"]["finish_reason"] for line in told} == {"error"}


def test_sse_error_in_mid_stream_is_an_event() -> None:
    form = Sse(Wishes(prompt="p"))
    form.push(HELLO[0])

    text = form.error(StepError("x")).text

    assert text.startswith('data: {"token"')
    assert text.endswith("\n\n")


@pytest.mark.parametrize(
    ("error", "lmi", "openai"),
    [
        (RequestError("r"), 424, 400),
        (OverloadedError("o"), 503, 429),
        (StepError("s"), 424, 500),
        (MemoryPlanError("m"), 507, 500),
        (KeyError("k"), 424, 500),
    ],
)
def test_each_dialect_has_its_status(error: Exception, lmi: int, openai: int) -> None:
    assert refusal({}, error).code == lmi
    assert refusal({"LMI_Route": "/v1/completions"}, error).code == openai


def test_foreign_error_tells_its_type() -> None:
    assert refusal({}, KeyError("k")).message == "internal error: KeyError: 'k'"


def test_openai_error_names_the_field() -> None:
    body = json.loads(refusal({"lmi_route": "/v1/completions"}, RequestError("n=0 is refused", "n")).text)

    assert body == {"error": {"message": "n=0 is refused", "type": "invalid_request_error", "param": "n", "code": None}}


@pytest.mark.parametrize(
    ("code", "kind", "name"),
    [(400, "invalid_request_error", None), (401, "authentication_error", "invalid_api_key"), (503, "server_error", None)],
)
def test_openai_errors_have_their_types(code: int, kind: str, name: str | None) -> None:
    told = json.loads(error_body("openai", code, "m"))["error"]

    assert (told["type"], told["code"]) == (kind, name)


def test_host_error_is_djls_object() -> None:
    body = error_body("lmi", 404, "Model or workflow not found: x")

    assert json.loads(body) == {"code": 404, "type": "ResourceNotFoundException", "message": "Model or workflow not found: x"}
    assert body.endswith("}\n")
