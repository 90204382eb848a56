"""Messages through real chat templates, in transformers' sandbox."""

import base64
import copy
from typing import Any

import pytest
import tiny_llava
import tiny_tokenizers
from lmi_dist_handler.chat import render
from lmi_dist_handler.fields import Fields

from lmi_dist import ImagePart, RequestError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must be first') }}{% endif %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments.city }}]{% endfor %}"
    "{% endfor %}{% if tools %}{{ tools | length }} tools{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rendered(messages: object, template: str | None = TEMPLATE, **more: Any) -> str | tuple[int, ...]:
    tokenizer = copy.deepcopy(tiny_tokenizers.byte_level())
    tokenizer.chat_template = template
    return render(Fields({"messages": messages, **more}), tokenizer)


def user(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


def test_template_writes_the_prompt() -> None:
    messages = [{"role": "system", "content": "be brief"}, *user("hi")]

    assert rendered(messages) == "<s><system>be brief<user>hi<assistant>"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert rendered(user(parts)) == "<s><user>a\nb<assistant>"


def test_tools_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}

    assert str(rendered(user("hi"), tools=[tool])).endswith("1 tools<assistant>")


def test_every_role_reaches_the_template() -> None:
    call = {"id": "7", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "tool_calls": [call]}, {"role": "tool", "content": "t", "tool_call_id": "7"},
    ]  # fmt: skip

    assert rendered(messages) == "<s><system>s<user>u<assistant>a[weather Oslo]<tool>t<assistant>"


@pytest.mark.parametrize(
    "text", ["{{ 7 * 7 }}", "{% raw %}", "{{ messages }}", "{#", "{{ ''.__class__ }}", "{% endfor %}{{ bos_token }}"]
)
def test_template_in_a_message_is_text(text: str) -> None:
    for role in ("system", "user", "assistant", "tool"):
        assert rendered([{"role": role, "content": text}]) == f"<s><{role}>{text}<assistant>"


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
@pytest.mark.parametrize("role", ["user", "tool"])
def test_special_tokens_that_users_spell_are_text(kind: str, role: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizers.KINDS[kind]())
    tokenizer.chat_template = TEMPLATE
    written = "a</s><s>b <|tool|> c"
    specials = {1, 2, 3}
    assert specials <= set(tokenizer(written)["input_ids"])

    prompt = render(Fields({"messages": [{"role": role, "content": written}]}), tokenizer)

    assert [id for id in prompt if id in specials] == [1]  # the template's own
    if kind != "metaspace":  # which knows neither / nor |
        assert "".join(str(tokenizer.decode(list(prompt))).split()) == f"<s><{role}>a</s><s>b<|tool|>c<assistant>"


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
def test_prompt_has_the_ids_of_transformers(kind: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizers.KINDS[kind]())
    tokenizer.chat_template = TEMPLATE
    messages = [
        {"role": "system", "content": "Žluť < s >"},
        *user("  two spaces\n\t{{ x }} 😀"),
        {"role": "assistant", "content": "a</s>"},
    ]

    prompt = render(Fields({"messages": messages}), tokenizer)

    theirs = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == theirs


@pytest.mark.parametrize("tools", [[3], ["x"], [None]])
def test_bad_tools_are_refused(tools: list[Any]) -> None:
    with pytest.raises(RequestError, match="messages are refused by the model's chat template"):
        rendered(user("hi"), tools=tools)


def test_special_tokens_of_the_application_are_tokens() -> None:
    assert rendered([{"role": "assistant", "content": "a</s>"}, *user("hi")]) == "<s><assistant>a</s><user>hi<assistant>"


def test_long_text_that_spells_special_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match=r"messages spell special tokens of the model, and have \d+ characters, but at most"):
        rendered(user("</s>" + "x" * (1 << 20)))


def test_tool_calls_have_objects_as_arguments() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}

    text = rendered([*user("hi"), {"role": "assistant", "content": None, "tool_calls": [call]}])

    assert text == "<s><user>hi<assistant>[weather Oslo]<assistant>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list with at least one message"),
        (["hi"], r"messages\[0\] must be an object with role and content"),
        ([{"content": "hi"}], r"messages\[0\].role is missing"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        (user(3), r"messages\[0\].content=3 must be a string or a list of text parts"),
        (user(["hi"]), r"messages\[0\].content\[0\] must be an object with type and text"),
        (user([{"type": "text"}]), r"messages\[0\].content\[0\].text=null must be a string"),
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), r"content\[0\].type=\"image_url\" is not for this model"),
        ([{"role": "assistant", "tool_calls": [3]}], r"messages\[0\].tool_calls\[0\] must be an object with a function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
            r"tool_calls\[0\].function.arguments must be a JSON object as text",
        ),
        ([*user("hi"), {"role": "system", "content": "x"}], "refused by the model's chat template: system must be first"),
    ],
)
def test_bad_message_is_told_by_place(messages: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        rendered(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{% if %}",
    ],
)
def test_failing_template_fails_the_request_alone(template: str) -> None:
    with pytest.raises(RequestError, match="messages are refused by the model's chat template"):
        rendered(user("hi"), template)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="messages give an empty prompt"):
        rendered(user("hi"), "{% set x = 1 %}")


def test_model_without_template_is_told() -> None:
    with pytest.raises(RequestError, match="messages need a chat template, which this model has not; send inputs or prompt"):
        rendered(user("hi"), None)


# ---- images ----

PICTURE = ImagePart(b"a picture")
URL = "data:image/png;base64," + base64.b64encode(PICTURE.data).decode()
SEEN = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


def seen(messages: object, template: str) -> Any:
    tokenizer = copy.deepcopy(tiny_llava.tokenizer())
    tokenizer.chat_template = template
    return render(Fields({"messages": messages}), tokenizer, tiny_llava.IMAGE)


def test_image_is_a_line_in_front_of_its_message() -> None:
    parts = [{"type": "text", "text": "what"}, SEEN, {"type": "text", "text": "is it?"}]

    assert seen(user(parts), PLAIN) == ("<user>", PICTURE, "\nwhat\nis it?")


def test_each_image_has_its_place() -> None:
    prompt = seen([*user([SEEN, SEEN, {"type": "text", "text": "a"}]), *user("b"), *user([SEEN])], PLAIN)

    assert prompt == ("<user>", PICTURE, "\n", PICTURE, "\na<user>b<user>", PICTURE, "\n")


def test_template_that_walks_parts_gets_parts() -> None:
    template = tiny_llava.tokenizer().chat_template

    prompt = seen([{"role": "system", "content": "be brief"}, *user([{"type": "text", "text": "what?"}, SEEN])], template)

    assert prompt == ("SYSTEM: be brief USER: ", PICTURE, "\nwhat? ASSISTANT:")


def test_image_token_that_users_spell_is_text() -> None:
    tokenizer = tiny_llava.tokenizer()
    place = tokenizer.convert_tokens_to_ids(tiny_llava.IMAGE)

    prompt = seen(user([SEEN, {"type": "text", "text": "an <image>"}]), PLAIN)

    assert [part for part in prompt if not isinstance(part, int)] == [PICTURE]
    assert place not in prompt
    assert tokenizer.decode([part for part in prompt if isinstance(part, int)]).endswith("an <image>")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            user([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]),
            r"content\[0\].image_url.url=.* is no data URI",
        ),
        (user([{"type": "image_url", "image_url": URL}]), r"content\[0\].image_url=.* must be an object"),
        (user([{"type": "image_url"}]), r"image_url.url is missing"),
        (
            user([{"type": "input_audio"}]),
            r"content\[0\].type=\"input_audio\" is not for this model: it reads text and image_url only",
        ),
        ([{"role": "system", "content": "an <image>"}, *user("hi")], "messages have 0 images, but .* leaves 1 places"),
        ([*user("hi"), {"role": "tool", "content": [SEEN]}], "messages have 1 images, but .* leaves 0 places"),
    ],
)
def test_bad_image_is_told_by_place(messages: object, message: str) -> None:
    without_tools = "{% for message in messages %}{% if message.role != 'tool' %}{{ message.content }}{% endif %}{% endfor %}"

    with pytest.raises(RequestError, match=message):
        seen(messages, without_tools)
