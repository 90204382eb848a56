"""A body to the object that a schema reads, by its content type (contract 3.3, 6.3): JSON, text, CSV and both kinds of form."""

import csv
import io
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode

from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from lmi_dist import RequestError
from lmi_dist_handler.fields import parse_object
from lmi_dist_handler.wire import PairList

JSON_TYPES = ("application/json", "application/x-ndjson", "application/octet-stream", "")
FORM = "application/x-www-form-urlencoded"
PARTS = "multipart/form-data"
MAX_FIELDS = 100  # of a form
FORM_JSON = ("parameters", "stream")  # fields of a form whose text is JSON
MAX_CELL = 1 << 24  # characters; csv's own limit is too small for a long prompt


def read_body(body: bytes, content_type: str, *, is_lmi: bool) -> dict[str, Any]:
    """The object of a body. Only the LMI schema has words for what is not JSON. Raises RequestError."""
    kind = _kind(content_type)
    if kind in JSON_TYPES:
        return parse_object(body)
    if is_lmi and kind in FORMS:
        return _form(form_fields(body, content_type))
    if is_lmi and kind in TEXT_TYPES:
        return TEXT_TYPES[kind](_text(body))
    known = ", ".join(["application/json", *(TEXT_TYPES if is_lmi else ()), *(FORMS if is_lmi else ())])
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


def form_fields(body: bytes, content_type: str) -> dict[str, str]:
    """The fields of a form of either kind, by name; of two with the same name the last. Raises RequestError."""
    return FORMS[_kind(content_type)](body, content_type)


def is_form(content_type: str) -> bool:
    return _kind(content_type) in FORMS


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _encoded(body: bytes, content_type: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(_text(body), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS))
    except ValueError as error:
        raise RequestError(f"the body is not a form of at most {MAX_FIELDS} fields in UTF-8: {error}") from None


def _parts(body: bytes, content_type: str) -> dict[str, str]:
    """Fields of a multipart form; a file counts as the text that it holds."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RequestError(f"content-type={content_type!r} names no boundary; let the client write this header", "content-type")
    parts: list[tuple[bytes | None, bytes | None]] = []
    ends: list[bool] = []

    def take(part: Any) -> None:
        if len(parts) == MAX_FIELDS:
            raise RequestError(f"the form has more than {MAX_FIELDS} fields; send fewer")
        file = getattr(part, "file_object", None)
        parts.append((part.field_name, part.value if file is None else file.getbuffer().tobytes()))

    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}  # as the body is already
    parser = FormParser(PARTS, take, take, lambda: ends.append(True), boundary=boundary, config=in_memory)
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(f"the body is not {PARTS}: {error}") from None
    if not ends:
        raise RequestError("the form's last boundary is missing; send the whole body")
    return {_text(name or b""): _text(value or b"") for name, value in parts}


def _form(fields: dict[str, str]) -> dict[str, Any]:
    """Fields as their names say; parameters and stream are JSON. What a client sends as a form by mistake has no field inputs."""
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


TEXT_TYPES: dict[str, Callable[[str], dict[str, Any]]] = {"text/plain": _plain, "text/csv": _table}
FORMS: dict[str, Callable[[bytes, str], dict[str, str]]] = {FORM: _encoded, PARTS: _parts}
