"""The host's end of DJL's wire, written from contract 2 and 4.4, apart from ours: requests to bytes, bytes to replies."""

import socket
import struct
from dataclasses import dataclass, field

I8, I16, I32 = struct.Struct(">b"), struct.Struct(">h"), struct.Struct(">i")


@dataclass
class Reply:
    """A worker's reply as it came: `raw` are all its bytes."""

    code: int
    message: str
    properties: dict[str, str]
    content: list[tuple[str | None, bytes]] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)  # of a stream
    is_stream: bool = False
    raw: bytes = b""


class HostWire:
    """One version's layout."""

    def __init__(self, minor: int) -> None:
        self.prefix = I16 if minor <= 26 else I32

    def text(self, value):
        if value is None:
            return self.prefix.pack(-1)
        data = value.encode()
        return self.prefix.pack(len(data)) + data

    def request(self, properties, content):
        """Properties sorted whatever their case, as a TreeMap has them; a content value of None has length 0."""
        pairs = sorted(properties.items(), key=lambda pair: pair[0].lower())
        head = I16.pack(len(pairs)) + b"".join(self.text(key) + self.text(value) for key, value in pairs)
        items = [self.text(key) + I32.pack(len(value or b"")) + (value or b"") for key, value in content]
        return head + I16.pack(len(items)) + b"".join(items)

    def map(self, data):
        """The map of a rolling batch's item. A map that is cut off, or has bytes behind it, kills the host's thread."""
        reader = Reader(Bytes(data))
        values = self._properties(reader)
        assert len(reader.raw) == len(data), "bytes are left over"
        return values

    def reply(self, connection):
        reader = Reader(connection)
        reply = Reply(reader.integer(I16), self._text(reader), self._properties(reader))
        count = reader.integer(I16)
        if count == -1:
            reply.is_stream = True
            more = 1
            while more:
                more = reader.integer(I8)
                reply.frames.append(reader.take(reader.integer(I32)))
        else:
            reply.content = [(self._text(reader), reader.take(reader.integer(I32))) for _ in range(count)]
        reply.raw = bytes(reader.raw)
        return reply

    def _text(self, reader):
        length = reader.integer(self.prefix)
        return None if length < 0 else reader.take(length).decode()

    def _properties(self, reader):
        return {self._text(reader): self._text(reader) for _ in range(reader.integer(I16))}


class Bytes:
    """Bytes that are read like a socket."""

    def __init__(self, data):
        self.data = data

    def recv(self, length):
        taken, self.data = self.data[:length], self.data[length:]
        return taken


class Reader:
    """Reads exactly, and keeps what it has read."""

    def __init__(self, connection: "socket.socket | Bytes") -> None:
        self.connection = connection
        self.raw = bytearray()

    def take(self, length):
        data = bytearray()
        while len(data) < length:
            packet = self.connection.recv(length - len(data))
            if not packet:
                raise ConnectionError("Python worker disconnected.")
            data += packet
        self.raw += data
        return bytes(data)

    def integer(self, layout):
        return layout.unpack(self.take(layout.size))[0]
