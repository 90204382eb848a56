"""OpenAI's forms, held against the official client's types; and DJL's chat forms."""

import json
from typing import Any

import httpx
import pytest
from lmi_dist_handler.formatter import Formatter
from lmi_dist_handler.openai_responses import (
    Ask,
    Chat,
    ChatEvents,
    Completion,
    CompletionEvents,
    DjlChat,
    DjlChatEvents,
    DjlChatLines,
    OpenAIFormatter,
)
from openai import APIError, OpenAI
from openai.types import Completion as CompletionType
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from lmi_dist import Output, StepError, Token, TokenLogprob

HE = Token(244, "Hé", -0.25, top=(TokenLogprob(244, "Hé", -0.25, 0), TokenLogprob(7, "Hi", -2.0, 1)))
WORLD = Token(4558, " world", -0.5, top=(TokenLogprob(4558, " world", -0.5, 0),))
END = Token(2, "", -0.125, is_special=True)


def ask(**more: Any) -> Ask:
    return Ask(**{"model": "m", "request_ids": ("r",), **more})


def said(*tokens: Token, id: str = "r", index: int = 0, done: str | None = None, num: int = 0, **more: Any) -> Output:
    text = "".join(token.text for token in tokens)
    values: dict[str, Any] = {"finish_reason": done, "num_generated_tokens": num, "num_prompt_tokens": 2, **more}
    return Output(request_id=id, index=index, text=text, tokens=tokens, **values)


HELLO = (said(HE, num=1), said(num=1), said(WORLD, END, done="eos_token", num=3))


def whole(formatter: Formatter, *outputs: Output) -> str:
    text = "".join(formatter.push(output) for output in outputs)
    assert formatter.is_done
    return text


def events(text: str) -> list[Any]:
    """The objects of a stream that ends with [DONE]."""
    *found, last = [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]
    assert last == "[DONE]"
    return [json.loads(event) for event in found]


# completions


def test_completion_is_valid_for_the_official_client() -> None:
    answer = CompletionType.model_validate_json(whole(Completion(ask(logprobs=True)), *HELLO), strict=True)

    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.model) == ("Hé world", "stop", "m")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 3, 5)
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["Hé", " world", ""]
    assert choice.logprobs.text_offset == [0, 2, 8]
    assert choice.logprobs.top_logprobs == [{"Hé": -0.25, "Hi": -2.0}, {" world": -0.5}, {}]


def test_choices_are_prompts_times_candidates() -> None:
    outputs = [
        said(Token(1, text), id=id, index=index, done="length", num=1, num_prompt_tokens=3)
        for id, index, text in (("b", 1, "b1"), ("a", 1, "a1"), ("b", 0, "b0"), ("a", 0, "a0"))
    ]

    answer = json.loads(whole(Completion(ask(request_ids=("a", "b"), num_candidates=2)), *outputs))

    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10}


def test_echo_puts_the_prompt_first() -> None:
    prompt_tokens = (Token(1, "<s>", None, is_special=True), Token(3, "ab", -1.0))
    outputs = (said(HE, num=1, prompt_tokens=prompt_tokens), said(WORLD, done="length", num=2))

    (choice,) = json.loads(whole(Completion(ask(prompts=("ab",), logprobs=True)), *outputs))["choices"]

    assert choice["text"] == "abHé world"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -0.25, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 0, 2, 4]


@pytest.mark.parametrize("logprobs", [False, True])
def test_streamed_completion_adds_up_to_the_whole(logprobs: bool) -> None:
    chunks = events(whole(CompletionEvents(ask(prompts=("ab",), logprobs=logprobs, include_usage=True)), *HELLO))

    *pieces, usage = chunks
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "abHé world"
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None, "stop"]
    assert all(piece["usage"] is None for piece in pieces)
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)
    assert CompletionType.model_validate(pieces[-1], strict=True)
    offsets = [offset for piece in pieces for offset in (piece["choices"][0]["logprobs"] or {"text_offset": []})["text_offset"]]
    assert offsets == ([0, 4, 10] if logprobs else [])


def test_length_is_told_as_length() -> None:
    answer = CompletionType.model_validate_json(whole(Completion(ask()), said(HE, done="length", num=1)), strict=True)

    assert answer.choices[0].finish_reason == "length"


# chat


def test_chat_is_valid_for_the_official_client() -> None:
    answer = ChatCompletion.model_validate_json(whole(Chat(ask(logprobs=True)), *HELLO), strict=True)

    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hé world", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    first, _, last = choice.logprobs.content
    assert (first.token, first.bytes, [top.token for top in first.top_logprobs]) == ("Hé", [72, 195, 169], ["Hé", "Hi"])
    assert last.bytes is None


def test_chat_stream_is_valid_for_the_official_client() -> None:
    found = [
        ChatCompletionChunk.model_validate(event, strict=True)
        for event in events(whole(ChatEvents(ask(include_usage=True)), *HELLO))
    ]

    deltas = [chunk.choices[0].delta for chunk in found if chunk.choices]
    assert [delta.role for delta in deltas] == ["assistant", None, None, None]
    assert "".join(delta.content or "" for delta in deltas) == "Hé world"
    assert [chunk.choices[0].finish_reason for chunk in found if chunk.choices] == [None, None, None, "stop"]
    assert found[-1].usage is not None
    assert found[-1].usage.total_tokens == 5
    assert len({chunk.id for chunk in found}) == 1


def test_chat_stream_without_usage_has_none() -> None:
    assert all("usage" not in event for event in events(whole(ChatEvents(ask()), *HELLO)))


def test_each_candidate_has_its_own_role() -> None:
    outputs = (said(HE, num=1), said(HE, index=1, num=1), said(done="length", num=1), said(done="length", index=1, num=1))

    found = events(whole(ChatEvents(ask(num_candidates=2)), *outputs))

    assert [event["choices"][0]["index"] for event in found if "role" in event["choices"][0]["delta"]] == [0, 1]


def test_error_in_mid_stream_is_openais_event() -> None:
    form = ChatEvents(ask())
    form.push(HELLO[0])

    (event,) = events(form.error(StepError("step 7 failed")).text)

    assert event == {"error": {"message": "step 7 failed", "type": "server_error", "param": None, "code": None}}


# DJL's chat


def test_djl_chat_has_contract_shape() -> None:
    answer = json.loads(whole(DjlChat(ask(logprobs=True)), *HELLO))

    assert list(answer) == ["id", "object", "created", "choices", "usage"]
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hé world"}
    assert choice["finish_reason"] == "eos_token"
    assert choice["logprobs"]["content"][0] == {
        "token": "Hé", "logprob": -0.25, "bytes": [72, 195, 169],
        "top_logprobs": [
            {"token": "Hé", "logprob": -0.25, "bytes": [72, 195, 169]}, {"token": "Hi", "logprob": -2.0, "bytes": [72, 105]},
        ],
    }  # fmt: skip


def test_djl_chat_line_a_token() -> None:
    text = whole(DjlChatLines(ask()), said(num=0), *HELLO)

    choices = [json.loads(line)["choices"][0] for line in text.splitlines()]
    assert [choice["delta"] for choice in choices] == [
        {"content": "Hé", "role": "assistant"}, {"content": " world"}, {"content": ""},
    ]  # fmt: skip
    assert [choice["finish_reason"] for choice in choices] == [None, None, "eos_token"]


def test_djl_chat_end_without_a_token_has_a_line() -> None:
    last = whole(DjlChatLines(ask()), said(HE, num=1), said(done="abort", num=1)).splitlines()[-1]

    assert json.loads(last)["choices"][0]["finish_reason"] == "abort"


def test_djl_chat_events_end_with_done() -> None:
    found = events(whole(DjlChatEvents(ask()), *HELLO))

    assert [event["object"] for event in found] == ["chat.completion.chunk"] * 3


@pytest.mark.parametrize("form", [DjlChatLines, DjlChatEvents])
def test_djl_chat_error_in_mid_stream_has_its_code(form: type[OpenAIFormatter]) -> None:
    formatter = form(ask())
    formatter.push(HELLO[0])

    line = formatter.error(StepError("x")).text.partition("\n")[0]

    assert json.loads(line.removeprefix("data: ")) == {"error": "x", "code": 424}


@pytest.mark.parametrize("form", [ChatEvents, CompletionEvents])
def test_official_client_raises_what_breaks_a_stream(form: type[OpenAIFormatter]) -> None:
    formatter = form(ask())
    body = formatter.push(HELLO[0]) + formatter.error(StepError("step 7 failed")).text
    answer = httpx.Response(200, text=body, headers={"content-type": "text/event-stream"})
    with OpenAI(
        base_url="http://host", api_key="none", http_client=httpx.Client(transport=httpx.MockTransport(lambda _: answer))
    ) as client:
        stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], stream=True)
        next(stream)

        with pytest.raises(APIError, match="step 7 failed"):
            list(stream)
