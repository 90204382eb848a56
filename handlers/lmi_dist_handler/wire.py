"""DJL's wire protocol (djl-contract 2, 3.1 and 3.2), both directions: what handlers see, and its bytes. Owns no socket.

Parsers take bytes from a Source, so that one grammar serves blocking sockets (`read`) and asyncio (`messages`). Integers are
big-endian; only the utf8 prefix ever changed.
"""

import asyncio
import csv
import io
import json
import logging
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn, TypeVar

logger = logging.getLogger(__name__)

MAX_COUNT = 32767  # of properties and of content items: they are i16
MAX_LENGTH = 1 << 30  # of a text or a content value that is read; what claims more is no message of DJL's
READ_BYTES = 64 * 1024  # asked of an asyncio stream at a time
MAX_CONTENT_BYTES = 20 * 1024 * 1024  # of one content value of a reply; DJL closes the channel above it

T = TypeVar("T")


class WireError(ValueError):
    """The bytes break the protocol, or a value does not fit it."""


class Disconnected(ValueError):  # noqa: N818  # what happened, not a mistake; ValueError as in djl_python
    """The other end closed the connection."""

    def __init__(self) -> None:
        super().__init__("Connection disconnected")


class _MissingError(Exception):
    """So many bytes more are needed than have come."""

    def __init__(self, num_missing: int) -> None:
        self.num_missing = num_missing


def _miss(num_missing: int) -> NoReturn:
    raise _MissingError(num_missing)


class Source:
    """Bytes, which a parser takes one after the other. `more` gives as many bytes as it is asked for, or raises."""

    def __init__(self, data: bytes = b"", more: Callable[[int], bytes] = _miss) -> None:
        self.data = data
        self.place = 0
        self._more = more

    @property
    def rest(self) -> int:
        """How many bytes have not been taken."""
        return len(self.data) - self.place

    def take(self, length: int) -> bytes:
        """The next bytes. Raises WireError for a length that cannot be meant."""
        start = self.place
        end = start + length
        if length < 0 or end > len(self.data):
            self._refill(length)
            start, end = 0, length
        self.place = end
        return self.data[start:end]

    def integer(self, layout: struct.Struct) -> int:
        try:
            value: int = layout.unpack_from(self.data, self.place)[0]
        except struct.error:
            self._refill(layout.size)
            value = layout.unpack_from(self.data)[0]
        self.place += layout.size
        return value

    def _refill(self, length: int) -> None:
        self.data, self.place = self.data[self.place :] + self._more(_checked(length) - self.rest), 0


class PairList:
    """Ordered (key, value) pairs; keys may be None and may repeat."""

    def __init__(self, pairs: Iterable[tuple[str | None, bytes]] = ()) -> None:
        self.pairs = list(pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PairList) and self.pairs == other.pairs

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"PairList({self.pairs!r})"

    def add(self, key: str | None, value: bytes) -> None:
        self.pairs.append((key, value))

    def get(self, key: str | None) -> bytes | None:
        """Value of the first pair with this key, None when there is none."""
        return next((value for name, value in self.pairs if name == key), None)

    def key_at(self, index: int) -> str | None:
        return self.pairs[index][0]

    def value_at(self, index: int) -> bytes:
        return self.pairs[index][1]

    def size(self) -> int:
        return len(self.pairs)

    def is_empty(self) -> bool:
        return not self.pairs

    def get_keys(self) -> list[str | None]:
        return [key for key, _ in self.pairs]

    def get_values(self) -> list[bytes]:
        return [value for _, value in self.pairs]


class Input:
    """One request as a handler sees it. Empty content means: initialize with these properties."""

    def __init__(self, properties: Mapping[str, str] | None = None, content: PairList | None = None) -> None:
        self.properties: dict[str, Any] = dict(properties or {})
        self.content = content or PairList()
        self.function_name: str | None = self.get_property("handler")

    def get_function_name(self) -> str | None:
        return self.function_name

    def get_properties(self) -> dict[str, Any]:
        return self.properties

    def get_content(self) -> PairList:
        return self.content

    def get_property(self, key: str) -> Any:
        """Value of a property whatever the case of its key, None when absent."""
        wanted = key.lower()
        return next((value for name, value in self.properties.items() if name.lower() == wanted), None)

    def contains_key(self, key: str) -> bool:
        return key in self.content.get_keys()

    def is_empty(self) -> bool:
        return self.content.is_empty()

    def is_batch(self) -> bool:
        return "batch_size" in self.properties

    def get_batch_size(self) -> int:
        return int(self.properties.get("batch_size", 1))

    def get_batches(self) -> list["Input"]:
        """The jobs of a batch, cut out of keys `batch_NNN.<name>` by position; [self] when this is no batch."""
        if not self.is_batch():
            return [self]
        batches = [Input() for _ in range(self.get_batch_size())]
        for name, value in self.properties.items():
            if name.startswith("batch_") and name != "batch_size":
                batches[_batch_index(name)].properties[name[10:]] = value
        for key, content in self.content.pairs:
            batches[_batch_index(key or "")].content.add((key or "")[10:], content)
        return batches

    def get_as_bytes(self, key: str | None = None) -> bytes | None:
        """Item `key`, else item `data`, else the first; None without content. Raises KeyError on a key that is not there."""
        if self.content.is_empty():
            return None
        if key is not None:
            if not self.contains_key(key):
                raise KeyError(f"requested data for key:{key} is not found!")
            return self.content.get(key)
        return self.content.get("data") if self.contains_key("data") else self.content.value_at(0)

    def get_as_string(self, key: str | None = None) -> str:
        return (self.get_as_bytes(key) or b"").decode()

    def get_as_json(self, key: str | None = None) -> Any:
        return json.loads(self.get_as_bytes(key) or b"")

    def get_as_csv(self, key: str | None = None) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self.get_as_string(key))))


def _batch_index(key: str) -> int:
    try:
        return int(key[6:9])
    except ValueError:
        raise WireError(f"{key!r} is no key of a batch; it must read batch_NNN.<name>") from None


class Output:
    """One reply of a handler."""

    def __init__(self, code: int = 200, message: str = "OK") -> None:
        self.code = code
        self.message = message
        self.properties: dict[str, str] = {}
        self.content = PairList()
        self.stream: Iterator[bytes] | None = None
        self.finalizer: Callable[[], object] | None = None

    def __repr__(self) -> str:
        return f"Output({self.code}, {self.message!r}, {self.properties!r}, {self.content!r})"

    def set_code(self, code: int) -> "Output":
        self.code = code
        return self

    def set_message(self, message: str) -> "Output":
        self.message = message
        return self

    def add_property(self, key: str, value: Any) -> "Output":
        self.properties[key] = str(value)
        return self

    def get_properties(self) -> dict[str, str]:
        return self.properties

    def get_property(self, key: str) -> str | None:
        return self.properties.get(key)

    def error(self, error: str, code: int = 424, message: str = "invoke handler failure") -> "Output":
        """Make this the reply that DJL's worker sends for an exception."""
        self.code, self.message = code, message
        self.add_property("content-type", "application/json")
        self.add({"code": code, "message": message, "error": error})
        return self

    def add(self, value: Any, key: str | None = None, batch_index: int | None = None) -> "Output":
        """Append a content item: text as UTF-8, bytes as they are, anything else as JSON."""
        if batch_index is not None:
            key = f"batch_{batch_index}.{key or ''}"
        self.content.add(key, _content_bytes(value))
        return self

    def add_as_json(self, value: Any, key: str | None = None, batch_index: int | None = None) -> "Output":
        return self.add(json_text(value), key, batch_index)

    def add_stream_content(self, pieces: Iterable[Any], output_formatter: Callable[[Any], Any] | None = None) -> "Output":
        """Send `pieces`, each through `output_formatter` if given, as frames in place of content items (sync mode only)."""
        self.stream = (_content_bytes(output_formatter(piece) if output_formatter else piece) for piece in pieces)
        return self

    @staticmethod
    def binary_encode(values: Mapping[str, Any]) -> bytes:
        """The map of djl-contract 4.4 as hosts from 0.27 on read it."""
        return Codec().encode_map(values)

    def finalize(self, function: Callable[..., object], *args: Any) -> "Output":
        """Call `function(*args)` once the reply has been sent."""
        self.finalizer = lambda: function(*args)
        return self

    def finish(self) -> None:
        """Run the finalizer; what it raises is logged, as in djl_python."""
        try:
            if self.finalizer is not None:
                self.finalizer()
        except Exception:
            logger.exception("an output's finalizer failed")


def json_text(value: Any) -> str:
    """JSON as djl_python writes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2, separators=(",", ":"))


def _content_bytes(value: Any) -> bytes:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    return (value if isinstance(value, str) else json_text(value)).encode()


class Codec:
    """The bytes of requests, replies and maps as DJL Serving 0.<version> lays them out: up to 26 the utf8 prefix is an i16."""

    def __init__(self, version: int = 27) -> None:
        self._prefix = struct.Struct(">h" if version <= 26 else ">i")
        self._key = lru_cache(maxsize=64)(self._text)  # few, and the same in every message

    def encode_request(self, request: Input) -> bytes:
        return self._properties(request.properties) + self._content(request.content)

    def request(self, source: Source) -> Input:
        properties = self._read_properties(source)
        return Input(properties, self._read_content(source, source.integer(_I16)))

    def encode_response(self, reply: Output) -> Iterator[bytes]:
        """The reply's bytes in the pieces that must be flushed one by one: a whole message, or a header and its frames."""
        head = _I16.pack(reply.code) + self._key(reply.message) + self._properties(reply.properties)
        if reply.stream is None:
            yield head + self._content(reply.content)
            return
        yield head + _I16.pack(-1)
        yield from _frames(reply.stream)

    def response(self, source: Source) -> Output:
        """A reply; a stream's frames are joined into one content item without a key."""
        code = source.integer(_I16)
        reply = Output(code, self._read_text(source) or "")
        reply.properties = self._read_properties(source)
        count = source.integer(_I16)
        if count == -1:
            reply.content.add(None, _read_frames(source))
        else:
            reply.content = self._read_content(source, count)
        return reply

    def encode_map(self, values: Mapping[str, Any]) -> bytes:
        return self._properties(values)

    def decode_map(self, data: bytes) -> dict[str, str]:
        """The map that `encode_map` wrote. Raises WireError when bytes are missing or left over."""
        source = Source(data)
        try:
            values = self._read_properties(source)
        except _MissingError:
            raise WireError(f"a map of {len(data)} bytes is cut off") from None
        if source.rest:
            raise WireError(f"a map of {len(data)} bytes has {source.rest} bytes left over")
        return values

    def _properties(self, values: Mapping[str, Any]) -> bytes:
        pairs = [self._key(key) + self._text(str(value)) for key, value in values.items()]
        return _count(len(values)) + b"".join(pairs)

    def _content(self, content: PairList) -> bytes:
        items = [self._key(key) + _I32.pack(len(value)) + value for key, value in content.pairs]
        return _count(content.size()) + b"".join(items)

    def _text(self, text: str | None) -> bytes:
        if text is None:
            return self._prefix.pack(-1)
        data = text.encode("utf-8", "replace")  # a lone surrogate has no UTF-8 form
        try:
            return self._prefix.pack(len(data)) + data
        except struct.error:
            raise WireError(
                f"a text of {len(data)} bytes does not fit the {self._prefix.size}-byte length of this version"
            ) from None

    def _read_text(self, source: Source) -> str | None:
        length = source.integer(self._prefix)
        if length < 0:
            return None
        try:
            return source.take(length).decode()
        except UnicodeDecodeError as error:
            raise WireError(f"a text is not UTF-8: {error}") from None

    def _read_properties(self, source: Source) -> dict[str, str]:
        values = {}
        for _ in range(_checked(source.integer(_I16))):
            key = self._read_text(source)
            values[key or ""] = self._read_text(source) or ""
        return values

    def _read_content(self, source: Source, count: int) -> PairList:
        content = PairList()
        for _ in range(_checked(count)):
            key = self._read_text(source)
            content.add(key, source.take(source.integer(_I32)))
        return content


_I8, _I16, _I32 = struct.Struct(">b"), struct.Struct(">h"), struct.Struct(">i")


def _count(count: int) -> bytes:
    if count > MAX_COUNT:
        raise WireError(f"{count} items do not fit a message; at most {MAX_COUNT} do")
    return _I16.pack(count)


def _checked(length: int) -> int:
    if not 0 <= length <= MAX_LENGTH:
        raise WireError(f"length {length} must be between 0 and {MAX_LENGTH}")
    return length


def _frames(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Frames of a stream. It ends with the empty five-byte frame even after an error, whose text goes in a frame of its own:
    a last frame with data may reach the host in two reads, which it cannot parse (djl-contract 2.3)."""
    try:
        for piece in pieces:
            yield _I8.pack(1) + _I32.pack(len(piece)) + piece
    except Exception as error:
        logger.exception("a stream's generator failed")
        text = str(error).encode()
        yield _I8.pack(1) + _I32.pack(len(text)) + text
    yield _I8.pack(0) + _I32.pack(0)


def _read_frames(source: Source) -> bytes:
    pieces, more = [], 1
    while more:
        more = source.integer(_I8)
        pieces.append(source.take(source.integer(_I32)))
    return b"".join(pieces)


def read(parse: Callable[[Source], T], stream: BinaryIO) -> T:
    """Run a parser on a blocking stream (a socket's makefile("rb")). Raises Disconnected at its end, WireError on bad bytes."""

    def more(length: int) -> bytes:
        data = stream.read(length)
        if len(data) < length:
            raise Disconnected()
        return data

    return parse(Source(more=more))


async def messages(parse: Callable[[Source], T], reader: asyncio.StreamReader) -> AsyncIterator[T]:
    """One message after the other from an asyncio stream. Bytes are taken as they lie there, all that have come at once; a message
    of which some are missing is parsed anew once they are here. Raises Disconnected at the stream's end, WireError on bad bytes."""
    source = Source()
    while True:
        start = source.place
        try:
            message = parse(source)
        except _MissingError as error:
            source = Source(await _with_more(reader, source.data[start:], error.num_missing))
        else:
            yield message


async def _with_more(reader: asyncio.StreamReader, rest: bytes, num_missing: int) -> bytes:
    """The rest and what comes next, at least so many bytes."""
    pieces = [rest]
    while num_missing > 0:
        pieces.append(await reader.read(max(num_missing, READ_BYTES)))
        if not pieces[-1]:
            raise Disconnected()
        num_missing -= len(pieces[-1])
    return b"".join(pieces)
