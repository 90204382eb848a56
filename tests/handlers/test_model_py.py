"""A model's own model.py: run when allowed, refused by name else; and the modules of djl_python's names that stand in for it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lmi_dist_handler import request_io
from lmi_dist_handler.model_py import NONE, Functions, decode, given, load
from lmi_dist_handler.wire import Input, PairList

from lmi_dist import ConfigError

BOTH = """
from djl_python import Input, Output
from djl_python.inputs import Input as Same
from djl_python.encode_decode import decode
from djl_python.input_parser import input_formatter
from djl_python.output_formatter import RequestOutput, TextGenerationOutput, output_formatter
from djl_python.request_io import RequestInput, TextInput

class MyInput(TextInput):
    my_own: str

@input_formatter
def read(input_item: Input, **kwargs) -> RequestInput:
    return MyInput(input_text=decode(input_item, "application/json")["text"])

@output_formatter
def write(request_output: TextGenerationOutput) -> str:
    return "x"
"""


def taken_out() -> dict[str, ModuleType]:
    """The modules that model.py brings, taken out of sys.modules."""
    names = [name for name in sys.modules if name == "model" or name.partition(".")[0] == "djl_python"]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    """Each test begins without them, whoever has left some, and leaves none."""
    before = taken_out()
    yield
    taken_out()
    sys.modules.update(before)


def write(folder: Path, text: str) -> Path:
    (folder / "model.py").write_text(text)
    return folder


def request(body: bytes) -> Input:
    return Input({}, PairList([("data", body)]))


def test_marked_functions_are_found(tmp_path: Path) -> None:
    found = load(write(tmp_path, BOTH), True)

    assert found.input_formatter is not None
    assert found.output_formatter is not None
    asked = found.input_formatter(request(b'{"text": "hi"}'))
    assert (asked.input_text, asked.request_id, isinstance(asked, request_io.TextInput)) == ("hi", 0, True)


def test_real_djl_python_is_not_replaced(tmp_path: Path) -> None:
    sys.modules["djl_python"] = theirs = ModuleType("djl_python")
    theirs.mark = lambda function: setattr(function, "is_output_formatter", True) or function  # type: ignore[attr-defined]

    found = load(write(tmp_path, "import djl_python\n@djl_python.mark\ndef write(output): return ''\n"), True)

    assert found.output_formatter is not None
    assert sys.modules["djl_python"] is theirs


@pytest.mark.parametrize("is_allowed", [None, False])
def test_file_without_formatters_is_left_alone(tmp_path: Path, is_allowed: bool | None) -> None:
    assert load(tmp_path, is_allowed) is NONE
    assert load(write(tmp_path, "raise SystemExit\ndef handle(inputs): ..."), is_allowed) is NONE


def test_formatters_that_nobody_has_allowed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.py has formatters of its own; run it with option\.allow_model_py=true, or set it"
    ):
        load(write(tmp_path, BOTH), None)

    assert load(tmp_path, False) is NONE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"option\.allow_model_py=true, but .*model\.py does not exist"),
        ("x = 1", r"model\.py has no function with @input_formatter or @output_formatter"),
        ("import nowhere_at_all", r"model\.py cannot be run: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        (
            BOTH.replace("request_output:", "a, b, request_output:"),
            r"the output formatter write\(a, b, request_output: .*must take one",
        ),
        ("def (", r"model\.py cannot be run: SyntaxError"),
    ],
)
def test_file_that_is_no_use_is_told(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        write(tmp_path, text)

    with pytest.raises(ConfigError, match=message):
        load(tmp_path, True)


def test_functions_of_djl_come_with_the_properties() -> None:
    assert given({"output_formatter": print, "input_formatter": "json", "model_id": "m"}) == Functions(output_formatter=print)
    assert given({"output_formatter": "json"}) is NONE


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        (None, b"", {"inputs": ""}),
        (None, b'{"a": 1}', {"a": 1}),
        ("application/json; charset=utf-8", b"[1]", [1]),
        ("text/plain", b"hi", {"inputs": ["hi"]}),
        ("text/csv", b"inputs,x\na,1\nb,2", {"inputs": ["a", "b"]}),
        ("text/csv", b"question,context\na,b", {"inputs": [{"question": "a", "context": "b"}]}),
        ("application/x-www-form-urlencoded", b"a=b", {"inputs": "a=b"}),
        ("application/zip", b"\x00", {"inputs": b"\x00"}),
    ],
)
def test_decode_reads_a_body_by_its_type(kind: str | None, body: bytes, expected: Any) -> None:
    assert decode(request(body), kind) == expected


def test_decode_wants_a_known_column() -> None:
    with pytest.raises(ValueError, match="CSV must have a header row with a column question"):
        decode(request(b"a,b\n1,2"), "text/csv")
