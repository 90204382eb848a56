"""Chat messages to the text of a prompt, through the chat template that came with the tokenizer."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

import jinja2

from lmi_dist import RequestError
from lmi_dist_handler.fields import Fields
from lmi_dist_handler.special_tokens import Cuts, SpellingTokenizer

# what a template may raise for messages that it does not expect; it runs in transformers' sandbox
TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


UNTRUSTED = ("user", "tool")  # roles whose text comes from outside


class ChatTokenizer(SpellingTokenizer, Protocol):
    """What is needed of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


def render(fields: Fields, tokenizer: ChatTokenizer) -> str | tuple[int, ...]:
    """The prompt of `messages` (and `tools`): text with special tokens written out, to be tokenized without adding any, or ids
    where a user's text spells special tokens. Raises RequestError for messages that break a rule, ours or the template's."""
    cuts = Cuts(tokenizer)
    messages = [_message(message, f"messages[{place}]", cuts) for place, message in enumerate(fields.items("messages"))]
    if not messages:
        raise RequestError("messages must be a list with at least one message", "messages")
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("messages need a chat template, which this model has not; send inputs or prompt instead", "messages")
    tools = fields.items("tools") or None
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    except TEMPLATE_ERRORS as error:
        raise RequestError(f"messages are refused by the model's chat template: {error}", "messages") from None
    if not text:
        raise RequestError("messages give an empty prompt through the model's chat template", "messages")
    return cuts.prompt(str(text))


def _message(message: object, path: str, cuts: Cuts) -> dict[str, Any]:
    """A message as templates expect it: content as one text, arguments of tool calls as objects."""
    if not isinstance(message, dict):
        raise RequestError(f"{path} must be an object with role and content", path)
    fields = Fields(message, f"{path}.")
    role = fields.text("role")
    content = fields.take("content")
    calls = [_tool_call(call, f"{path}.tool_calls[{place}]") for place, call in enumerate(fields.items("tool_calls"))]
    if content is None and not calls:
        raise RequestError(f"{path}.content is missing; it must be a string or a list of text parts", f"{path}.content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{path}.content[{place}]") for place, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise fields.refuse("content", "must be a string or a list of text parts")
    content = cuts.cut(content or "") if role in UNTRUSTED else content or ""
    return {**message, "role": role, "content": content, **({"tool_calls": calls} if calls else {})}


def _part(part: object, path: str) -> str:
    if not isinstance(part, dict):
        raise RequestError(f"{path} must be an object with type and text", path)
    fields = Fields(part, f"{path}.")
    if fields.text("type") != "text":
        raise fields.refuse("type", "is not for this model: it reads text only")
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
