"""A body to the object that a schema reads, by its content type (contract 3.3): JSON, plain text, CSV and forms."""

import csv
import io
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode

from lmi_dist import RequestError
from lmi_dist_handler.fields import parse_object
from lmi_dist_handler.wire import PairList

JSON_TYPES = ("application/json", "application/x-ndjson", "application/octet-stream", "")
FORM = "application/x-www-form-urlencoded"
FORM_JSON = ("parameters", "stream")  # fields of a form whose text is JSON
MAX_CELL = 1 << 24  # characters; csv's own limit is too small for a long prompt


def read_body(body: bytes, content_type: str, *, is_lmi: bool) -> dict[str, Any]:
    """The object of a body. Only the LMI schema has words for what is not JSON. Raises RequestError."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind in JSON_TYPES:
        return parse_object(body)
    if is_lmi and kind in TEXT_TYPES:
        return TEXT_TYPES[kind](_text(body))
    known = f"application/json{', ' if is_lmi else ''}{', '.join(TEXT_TYPES) if is_lmi else ''}"
    raise RequestError(f"content-type={kind!r} is not for text generation; send {known}", "content-type")


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}; send text in UTF-8") from None


def _plain(text: str) -> dict[str, Any]:
    return {"inputs": text}


def _table(text: str) -> dict[str, Any]:
    """The column `inputs` of a table with a header row: a list of prompts."""
    csv.field_size_limit(MAX_CELL)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise RequestError(f"the body is not CSV: {error}") from None
    if not rows or "inputs" not in rows[0]:
        raise RequestError(
            "the body must be CSV with a header row that has the column inputs, and at least one row below it", "inputs"
        )
    return {"inputs": [row["inputs"] or "" for row in rows]}


def _form(text: str) -> dict[str, Any]:
    """Fields as their names say; parameters and stream are JSON. What a client sends as a form by mistake has no field inputs."""
    try:
        fields: dict[str, Any] = dict(parse_qsl(text, keep_blank_values=True, errors="strict"))
    except ValueError as error:
        raise RequestError(f"the body is not a form in UTF-8: {error}") from None
    if "inputs" not in fields:
        raise RequestError("the form has no field inputs; add it, or send JSON with content-type application/json", "inputs")
    return {**fields, **{name: _json(name, fields[name]) for name in FORM_JSON if name in fields}}


def form_of(content: PairList) -> bytes:
    """The body of a form whose fields came one by one."""
    return urlencode([(content.key_at(place) or "", content.value_at(place)) for place in range(content.size())]).encode()


def _json(name: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"the form's field {name} must be JSON", name) from None


TEXT_TYPES: dict[str, Callable[[str], dict[str, Any]]] = {
    "text/plain": _plain,
    "text/csv": _table,
    FORM: _form,
}
