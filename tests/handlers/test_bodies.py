"""Bodies of every content type to the object that a schema reads."""

from typing import Any

import pytest
from lmi_dist_handler.bodies import form_of, read_body
from lmi_dist_handler.wire import PairList

from lmi_dist import RequestError

FORM = "application/x-www-form-urlencoded"
PARTS = "multipart/form-data; boundary=xx"


def parts(*fields: tuple[str, str]) -> bytes:
    """A multipart body of these parts, each a name with what follows it in the header, and a value."""
    told = [f'--xx\r\nContent-Disposition: form-data; name="{name}\r\n\r\n{value}\r\n' for name, value in fields]
    return f"{''.join(told)}--xx--\r\n".encode()


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        ("application/json", '{"inputs": "é"}', {"inputs": "é"}),
        ("Application/JSON; charset=utf-8", '{"inputs": "a"}', {"inputs": "a"}),
        ("", '{"inputs": "a"}', {"inputs": "a"}),
        ("text/plain; charset=utf-8", '{"Grüße"}', {"inputs": '{"Grüße"}'}),
        ("text/csv", 'id,inputs\n1,a\n2,"b, c\nd"\n', {"inputs": ["a", "b, c\nd"]}),
        ("text/csv", "inputs\r\n" + "x" * 200_000, {"inputs": ["x" * 200_000]}),
        (FORM, "inputs=a%20b+c&other=1", {"inputs": "a b c", "other": "1"}),
        (
            FORM,
            "inputs=a&parameters=%7B%22top_k%22%3A3%7D&stream=true",
            {"inputs": "a", "parameters": {"top_k": 3}, "stream": True},
        ),
    ],
    ids=range(8),
)
def test_body_is_read_by_its_type(kind: str, body: str, expected: dict[str, Any]) -> None:
    assert read_body(body.encode(), kind, is_lmi=True) == expected


def test_parts_of_a_form_are_its_fields() -> None:
    long = "x" * 2_000_000  # more than the parser would keep in memory by itself
    body = parts(
        ('inputs"; filename="prompt.txt"\r\nContent-Type: text/plain', f"{long}\r\né"),
        ('parameters"', '{"top_k": 3}'),
        ('empty"', ""),
    )

    assert read_body(body, PARTS, is_lmi=True) == {"inputs": f"{long}\r\né", "parameters": {"top_k": 3}, "empty": ""}


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("image/png", b"x", "content-type='image/png' is not for text generation; send application/json, text/plain, text/csv, "),
        ("tensor/ndlist", b"x", "content-type='tensor/ndlist' is not for text generation"),
        ("multipart/form-data", b"x", "content-type='multipart/form-data' names no boundary"),
        (PARTS, b"x", "the body is not multipart/form-data: "),
        (PARTS, parts(('inputs"', "a"))[:-6], "the form's last boundary is missing; send the whole body"),
        (PARTS, b"", "the form's last boundary is missing"),
        (PARTS, parts(('other"', "a")), "the form has no field inputs"),
        (PARTS, parts(('inputs"', "a"), ('stream"', "yes")), "the form's field stream must be JSON"),
        (PARTS, parts(*[('a"', "a")] * 101), "the form has more than 100 fields"),
        (PARTS, parts(('inputs"', "?")).replace(b"?", b"\xff"), "the body is not UTF-8"),
        (FORM, b"&".join([b"a=1"] * 101), "the body is not a form of at most 100 fields"),
        ("text/plain", b"a\xff", "the body is not UTF-8: byte 1 is 0xff; send text in UTF-8"),
        (
            "text/csv",
            b"question\nwhy\n",
            "the body must be CSV with a header row that has the column inputs, and at least one row below",
        ),
        ("text/csv", b"inputs\n", "the body must be CSV with a header row"),
        ("text/csv", b"", "the body must be CSV with a header row"),
        ("text/csv", b'inputs\n"a', "the body is not CSV: unexpected end of data"),
        (FORM, b'{"inputs": "a"}', "the form has no field inputs; add it, or send JSON with content-type application/json"),
        (FORM, b"inputs=%ff", "the body is not a form of at most 100 fields in UTF-8"),
        (FORM, b"inputs=a&parameters=x", "the form's field parameters must be JSON"),
    ],
)
def test_bad_body_is_told_what_is_wrong(kind: str, body: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_body(body, kind, is_lmi=True)

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("kind", ["text/plain", "text/csv", FORM, PARTS])
def test_other_schemas_read_json_only(kind: str) -> None:
    with pytest.raises(RequestError, match=r"is not for text generation; send application/json$"):
        read_body(b"inputs\na", kind, is_lmi=False)


def test_fields_that_djl_took_apart_are_the_form_again() -> None:
    pairs = PairList([("inputs", "a & é=1".encode()), ("parameters", b'{"seed": 1}')])

    assert read_body(form_of(pairs), FORM, is_lmi=True) == {"inputs": "a & é=1", "parameters": {"seed": 1}}
