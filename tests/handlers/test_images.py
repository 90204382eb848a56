"""Images in clients' words: data URIs and markdown, read or refused, nothing fetched."""

import base64
import time

import pytest
from lmi_dist_handler.images import place, read_url, split_markdown

from lmi_dist import ImagePart, RequestError

PNG = "data:image/png;base64," + base64.b64encode(b"some png").decode()
IMAGE = ImagePart(b"some png")


@pytest.mark.parametrize("url", [PNG, PNG.replace("data:image/png", "DATA:IMAGE/PNG"), PNG.replace(";", ";name=a;")])
def test_data_uri_is_read(url: str) -> None:
    assert read_url(url, "url") == IMAGE


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/a.png", "url='https://example.org/a.png' is no data URI, and this server fetches nothing"),
        ("file:///etc/passwd", "is no data URI"),
        ("cat.png", "is no data URI"),
        ("data:application/pdf;base64,AAAA", "has type 'application/pdf'; supported are image/png"),
        ("data:image/svg+xml;base64,AAAA", "has type 'image/svg.xml'"),
        ("data:,hello", "has type ''"),
        ("data:image/png,AAAA", "has no data; it must be data:image/png;base64"),
        ("data:image/png;base64,", "has no data"),
        ("data:image/png;base64,A*A=", "is not base64"),
        ("data:image/png;base64,AAAAA", "is not base64"),
    ],
)
def test_other_urls_are_refused_by_name(url: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        read_url(url, "url")

    assert refused.value.field == "url"
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"see ![a cat]({PNG}) and ![]({PNG})", ("see ", IMAGE, " and ", IMAGE)),
        (f"![]({PNG})", (IMAGE,)),
        ("no ![image] (here) ![]()", "no ![image] (here) ![]()"),
        ("", ""),
    ],
)
def test_markdown_images_become_parts(text: str, parts: object) -> None:
    assert split_markdown(text, "inputs", "<image>") == parts


def test_url_in_markdown_is_text_where_nobody_sees() -> None:
    text = "![logo](https://example.org/a.png)"

    assert split_markdown(text, "inputs", None) == text
    with pytest.raises(RequestError, match="is no data URI, and this server fetches nothing"):
        split_markdown(text, "inputs", "<image>")


@pytest.mark.parametrize("piece", ["![", "![](", "![](data:", "![](data:image/png;base64,AA", "![](http://", "![a" + "b" * 900])
def test_hostile_markdown_is_read_in_a_moment(piece: str) -> None:
    text = piece * (2_000_000 // len(piece))

    started = time.process_time()
    split_markdown(text, "inputs", "<image>")

    assert time.process_time() - started < 5  # quadratic: hours


@pytest.mark.parametrize("prompt", ["a <image> b<image>", (5, 99, 6, 99)])
def test_images_take_their_places(prompt: str | tuple[int, ...]) -> None:
    other = ImagePart(b"x")

    placed = place(prompt, "<image>", 99, [IMAGE, other])

    assert placed == (("a ", IMAGE, " b", other) if isinstance(prompt, str) else (5, IMAGE, 6, other))
    with pytest.raises(RequestError, match="messages have 1 images, but the model's chat template leaves 2 places"):
        place(prompt, "<image>", 99, [IMAGE])
