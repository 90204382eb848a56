"""Images in what clients send: data URIs, as the chat schema's image_url and as markdown in a text. Nothing is fetched."""

import base64
import binascii
import re
from collections.abc import Sequence

from lmi_dist import ImagePart, RequestError

TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif", "image/bmp")
# Each character is looked at once: neither part of it can begin where another goes on.
MARKDOWN = re.compile(r"!\[[^\[\]]{0,1000}\]\((data:[\w+/=;,:.%-]*|https?://[^()\s!\[]*)\)", re.ASCII | re.IGNORECASE)
SHOWN = 60  # characters of a url that a message repeats

Parts = tuple[str | ImagePart, ...]


def read_url(url: str, path: str) -> ImagePart:
    """The image of a data URI. Raises RequestError, which calls the field `path`, for other urls, foreign types and bad base64."""
    shown = url if len(url) <= SHOWN else f"{url[:SHOWN]}..."
    if url[:5].lower() != "data:":
        raise RequestError(
            f"{path}={shown!r} is no data URI, and this server fetches nothing; send data:image/png;base64,... instead", path
        )
    head, _, data = url.partition(",")
    kind, *attributes = head[5:].lower().split(";")
    if kind not in TYPES:
        raise RequestError(f"{path}={shown!r} has type {kind!r}; supported are {', '.join(TYPES)}", path)
    try:
        decoded = base64.b64decode(data, validate=True) if "base64" in attributes else b""
    except binascii.Error as error:
        raise RequestError(f"{path}={shown!r} is not base64: {error}", path) from None
    if not decoded:
        raise RequestError(f"{path}={shown!r} has no data; it must be data:{kind};base64, and the image behind it", path)
    return ImagePart(decoded)


def split_markdown(text: str, path: str, image_token: str | None) -> str | Parts:
    """A text with its images `![..](data:..)` apart; as it is if there are none. The url of an image is refused where the model
    sees images; where it sees none it is text like any other."""
    parts: list[str | ImagePart] = []
    end = 0
    for found in MARKDOWN.finditer(text):
        if image_token is None and found[1][:5].lower() != "data:":
            continue
        parts += [text[end : found.start()], read_url(found[1], path)]
        end = found.end()
    return tuple(part for part in (*parts, text[end:]) if part != "") if parts else text


def place(
    prompt: str | tuple[int, ...], image_token: str, image_token_id: int, images: Sequence[ImagePart]
) -> Parts | tuple[int | ImagePart, ...]:
    """A rendered prompt with each image in the place that stands for it. Raises RequestError if there are more of one than of the
    other."""
    num_places = prompt.count(image_token) if isinstance(prompt, str) else prompt.count(image_token_id)
    if num_places != len(images):
        raise RequestError(
            f"messages have {len(images)} images, but the model's chat template leaves {num_places} places ({image_token}) for "
            f"them; leave {image_token} out of texts, and send images in messages of the user",
            "messages",
        )
    rest = iter(images)
    if isinstance(prompt, str):
        parts = [part for text in prompt.split(image_token) for part in (text, next(rest, ""))]
        return tuple(part for part in parts if part != "")
    return tuple(next(rest) if id == image_token_id else id for id in prompt)
