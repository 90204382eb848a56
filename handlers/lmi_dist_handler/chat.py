"""Chat messages to the text of a prompt, through the chat template that came with the tokenizer."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jinja2

from lmi_dist import ImagePart, Prompt, RequestError
from lmi_dist_handler import images
from lmi_dist_handler.fields import Fields
from lmi_dist_handler.special_tokens import Cuts, SpellingTokenizer

# what a template may raise for messages that it does not expect; it runs in transformers' sandbox
TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


UNTRUSTED = ("user", "tool")  # roles whose text comes from outside
WALKS_PARTS = re.compile(r"\bin\s+\w+(?:\.content|\[['\"]content['\"]\])")  # a template that takes content as a list of parts


class ChatTokenizer(SpellingTokenizer, Protocol):
    """What is needed of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...

    def convert_tokens_to_ids(self, tokens: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Reading:
    """How messages are read: special tokens cut, images collected where the model sees some."""

    cuts: Cuts
    image_token: str | None = None
    takes_parts: bool = False  # the template walks over content's parts, and sees nothing in a plain text
    images: list[ImagePart] = field(default_factory=list)


def render(fields: Fields, tokenizer: ChatTokenizer, image_token: str | None = None) -> Prompt:
    """The prompt of `messages` (and `tools`): text with special tokens written out, to be tokenized without adding any, or ids
    where a user's text spells special tokens; images among either. `image_token` stands for an image in the text of a model that
    sees them. Raises RequestError for messages that break a rule, ours or the template's."""
    template = getattr(tokenizer, "chat_template", None)
    takes_parts = image_token is not None and WALKS_PARTS.search(str(template)) is not None
    reading = Reading(Cuts(tokenizer), image_token, takes_parts)
    messages = [_message(message, f"messages[{place}]", reading) for place, message in enumerate(fields.items("messages"))]
    if not messages:
        raise RequestError("messages must be a list with at least one message", "messages")
    if not template:
        raise RequestError("messages need a chat template, which this model has not; send inputs or prompt instead", "messages")
    tools = fields.items("tools") or None
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    except TEMPLATE_ERRORS as error:
        raise RequestError(f"messages are refused by the model's chat template: {error}", "messages") from None
    if not text:
        raise RequestError("messages give an empty prompt through the model's chat template", "messages")
    prompt = reading.cuts.prompt(str(text))
    if image_token is None or not (reading.images or image_token in text):
        return prompt
    return images.place(prompt, image_token, tokenizer.convert_tokens_to_ids(image_token), reading.images)


def _message(message: object, path: str, reading: Reading) -> dict[str, Any]:
    """A message as templates expect it: content as one text, or as parts where they want those; arguments of tool calls as
    objects."""
    if not isinstance(message, dict):
        raise RequestError(f"{path} must be an object with role and content", path)
    fields = Fields(message, f"{path}.")
    role = fields.text("role")
    content = fields.take("content")
    calls = [_tool_call(call, f"{path}.tool_calls[{place}]") for place, call in enumerate(fields.items("tool_calls"))]
    if content is None and not calls:
        raise RequestError(f"{path}.content is missing; it must be a string or a list of text parts", f"{path}.content")
    if content is not None and not isinstance(content, list | str):
        raise fields.refuse("content", "must be a string or a list of text parts")
    listed = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    parts = [_part(part, f"{path}.content[{place}]", reading) for place, part in enumerate(listed)]
    reading.images.extend(part for part in parts if isinstance(part, ImagePart))
    content = _content(
        [part if isinstance(part, ImagePart) or role not in UNTRUSTED else reading.cuts.cut(part) for part in parts], reading
    )
    return {**message, "role": role, "content": content, **({"tool_calls": calls} if calls else {})}


def _content(parts: list[str | ImagePart], reading: Reading) -> str | list[dict[str, str]]:
    """What the template is given: the parts, or one text with a line for each image in front (contract 8.3)."""
    if reading.takes_parts:
        return [{"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part} for part in parts]
    pictures = [str(reading.image_token) for part in parts if isinstance(part, ImagePart)]
    return "\n".join([*pictures, "\n".join(part for part in parts if isinstance(part, str))])


def _part(part: object, path: str, reading: Reading) -> str | ImagePart:
    if not isinstance(part, dict):
        raise RequestError(f"{path} must be an object with type and text", path)
    fields = Fields(part, f"{path}.")
    kind = fields.text("type")
    if kind == "image_url" and reading.image_token is not None:
        url = fields.section("image_url")
        return images.read_url(url.text("url"), url.name("url"))
    if kind != "text":
        seen = "text" if reading.image_token is None else "text and image_url"
        raise fields.refuse("type", f"is not for this model: it reads {seen} only")
    text = fields.take("text")
    if not isinstance(text, str):
        raise fields.refuse("text", "must be a string")
    return text


def _tool_call(call: object, path: str) -> dict[str, Any]:
    """A call with its arguments parsed: the API sends them as JSON text, templates print objects."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise RequestError(f"{path} must be an object with a function", path)
    return {**call, "function": {**function, "arguments": _arguments(function, path)}}


def _arguments(function: Mapping[str, Any], path: str) -> object:
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        raise RequestError(f"{path}.function.arguments must be a JSON object as text", f"{path}.function.arguments") from None
