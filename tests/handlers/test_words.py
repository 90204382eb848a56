"""handlers/lmi_dist_handler/words.py: files as Java reads them, and variables of a model."""

import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmi_dist_handler.words import file_words, parse_env

BY_LETTER = {"\t": "\\t", "\n": "\\n", "\r": "\\r", "\f": "\\f", "\\": "\\\\"}
CONTINUED = ("\\\n  ", "\\\r\n\t", "\\\r \f")  # a line that goes on below, its blanks there left out
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: bool(text.strip()))


def escaped(draw: st.DrawFn, text: str) -> str:
    """`text` in one of the many ways in which Java would read it."""
    pieces = []
    for letter in text:
        units = letter.encode("utf-16-be")
        by_number = "".join(f"\\u{units[i]:02x}{units[i + 1]:02X}" for i in range(0, len(units), 2))
        ways = [by_number, BY_LETTER.get(letter, by_number)]
        if letter.isascii() and letter.isprintable():
            ways.append(f"\\{letter}" if letter not in "tnrfu" else letter)
        if "\xa1" <= letter <= "\xff" or (letter.isascii() and letter.isalnum()):
            ways.append(letter)
        pieces += [draw(st.sampled_from(ways)), draw(st.sampled_from(("", "", "", *CONTINUED)))]
    return "".join(pieces[:-1])


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, str, str]:
    """Key, value and a file that says so."""
    key, value = draw(TEXTS), draw(TEXTS)
    separator = draw(st.sampled_from(("=", ":", " ", "\t", " = ", "\f:\t")))
    before = draw(st.sampled_from(("", "# note \\\n", "! \x85 note\r\n", "\n \t\n")))
    end = draw(st.sampled_from(("", "\n", "\r")))
    return key, value, f"{before}{escaped(draw, key)}{separator}{escaped(draw, value)}{end}"


@given(lines())
def test_every_escape_of_java_is_read(case: tuple[str, str, str]) -> None:
    key, value, text = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "serving.properties")
        path.write_bytes(text.encode("latin-1"))

        found = file_words(path)

    assert {name: word.value for name, word in found.items()} == {key: value.strip()}


def test_lines_are_counted_as_java_ends_them(tmp_path: Path) -> None:
    path = tmp_path / "serving.properties"
    path.write_bytes(b"# a\x85b\x0cc\r\na=1\rb=\\\n  2\n\nc=3")

    found = file_words(path)

    assert {name: (word.value, word.origin) for name, word in found.items()} == {
        "a": ("1", "serving.properties:2"), "b": ("2", "serving.properties:3"), "c": ("3", "serving.properties:6"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "pairs"), [("", {}), ("A=1", {"A": "1"}), (" A = 1 ,B=x=y,, ", {"A": "1", "B": "x=y"}), ("A=", {"A": ""})]
)
def test_variables_are_cut_at_commas_and_the_first_equals(text: str, pairs: dict[str, str]) -> None:
    assert parse_env(text) == pairs


@pytest.mark.parametrize("text", ["A", "A=1,B", "=1"])
def test_variable_without_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must look like NAME=value"):
        parse_env(text)


def test_same_value_twice_needs_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "serving.properties"
    path.write_text("a=1\na=1\n")
    caplog.set_level(logging.DEBUG)

    assert file_words(path)["a"].origin == "serving.properties:2"
    assert caplog.messages == []
