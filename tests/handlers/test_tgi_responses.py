"""text-generation-inference's forms from hand-made outputs, and its errors."""

import json
from typing import Any

import pytest
from lmi_dist_handler.formatter import Formatter
from lmi_dist_handler.responses import refusal
from lmi_dist_handler.tgi_responses import Tgi, TgiEvents, TgiWishes

from lmi_dist import MemoryPlanError, Output, OverloadedError, RequestError, StepError, Token, TokenLogprob

HE = Token(244, "He", -0.25, top=(TokenLogprob(244, "He", -0.25, 0), TokenLogprob(7, "Hi", -2.0, 1)))
END = Token(2, "", float("-inf"), is_special=True)
PROMPT = (Token(1, "<s>", None), Token(9, "p", -1.5))
HE_SHOWN = {"id": 244, "text": "He", "logprob": -0.25, "special": False}
END_SHOWN = {"id": 2, "text": "", "logprob": -9999.0, "special": True}


def said(*tokens: Token, index: int = 0, done: str | None = None, num: int = 0, **more: Any) -> Output:
    text = "".join(token.text for token in tokens)
    values: dict[str, Any] = {"finish_reason": done, "num_generated_tokens": num, "num_prompt_tokens": 2, **more}
    return Output(request_id="r", index=index, text=text, tokens=tokens, **values)


def whole(formatter: Formatter, *outputs: Output) -> str:
    text = "".join(formatter.push(output) for output in outputs)
    assert formatter.is_done
    return text


HELLO = (said(HE, num=1, prompt_tokens=PROMPT), said(num=1), said(END, done="stop_sequence", num=2))


def test_answer_without_details_is_the_text() -> None:
    assert json.loads(whole(Tgi(TgiWishes(prompt="p")), *HELLO)) == {"generated_text": "He"}
    assert json.loads(whole(Tgi(TgiWishes(prompt="p", is_listed=True, return_full_text=True)), *HELLO)) == [
        {"generated_text": "pHe"}
    ]


def test_details_have_the_routers_shape() -> None:
    answer = json.loads(whole(Tgi(TgiWishes(prompt="p", details=True, seed=7, top_tokens=True)), *HELLO))

    assert answer["details"] == {
        "finish_reason": "stop_sequence",
        "generated_tokens": 2,
        "seed": 7,
        "prefill": [{"id": 1, "text": "<s>", "logprob": None}, {"id": 9, "text": "p", "logprob": -1.5}],
        "tokens": [HE_SHOWN, END_SHOWN],
        "top_tokens": [[HE_SHOWN, {"id": 7, "text": "Hi", "logprob": -2.0, "special": False}], []],
    }


def test_best_comes_first_and_the_others_in_details() -> None:
    outputs = [said(HE, index=0, done="length", num=1, cumulative_logprob=-3.0), said(END, index=1, done="eos_token", num=1)]

    answer = json.loads(whole(Tgi(TgiWishes(prompt="p", num_candidates=2, details=True)), *outputs))

    assert (answer["generated_text"], answer["details"]["finish_reason"]) == ("", "eos_token")
    (other,) = answer["details"]["best_of_sequences"]
    assert (other["generated_text"], other["finish_reason"], other["prefill"], other["tokens"]) == ("He", "length", [], [HE_SHOWN])


def events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in text.removesuffix("\n\n").split("\n\n")]


def test_events_are_one_a_token() -> None:
    first, last = events(whole(TgiEvents(TgiWishes(prompt="p", details=True, return_full_text=True)), *HELLO))

    assert first == {"index": 1, "token": HE_SHOWN, "generated_text": None, "details": None}
    assert last == {
        "index": 2,
        "token": END_SHOWN,
        "generated_text": "pHe",
        "details": {"finish_reason": "stop_sequence", "generated_tokens": 2, "seed": None, "input_length": 2},
    }


def test_event_shows_alternatives_and_no_details_unasked() -> None:
    first, last = events(whole(TgiEvents(TgiWishes(prompt="p", top_tokens=True)), *HELLO))

    assert [top["text"] for top in first["top_tokens"]] == ["He", "Hi"]
    assert (last["details"], last["generated_text"]) == (None, "He")


def test_stream_that_ends_without_a_token_has_a_last_event() -> None:
    *_, last = events(whole(TgiEvents(TgiWishes(prompt="p")), said(HE, num=1), said(done="length", num=1)))

    assert (last["index"], last["token"]["id"], last["generated_text"]) == (2, -1, "He")


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (RequestError("r", "top_p"), 422, "validation"),
        (OverloadedError("r"), 429, "overloaded"),
        (StepError("r"), 424, "generation"),
        (MemoryPlanError("r"), 507, "generation"),
    ],
)
@pytest.mark.parametrize("route", ["/", "/generate", "/generate_stream"])
def test_errors_have_the_routers_shape(route: str, error: Exception, code: int, kind: str) -> None:
    told = refusal({"lmi_route": route}, error)

    assert (told.code, json.loads(told.text)) == (code, {"error": "r", "error_type": kind})


def test_error_in_mid_stream_is_an_event() -> None:
    form = TgiEvents(TgiWishes(prompt="p"))
    form.push(HELLO[0])

    assert events(form.error(StepError("step 7 failed")).text) == [{"error": "step 7 failed", "error_type": "generation"}]
