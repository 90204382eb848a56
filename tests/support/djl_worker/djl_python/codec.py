"""The primitives of the wire (contract 2.1), as the version in `__version__` has them."""

import struct

from djl_python import __version__

MINOR = int(__version__.split(".")[1])
IS_TODAYS = MINOR > 29
TEXT = struct.Struct(">h" if MINOR <= 26 else ">i")
I8, I16, I32 = struct.Struct(">b"), struct.Struct(">h"), struct.Struct(">i")


def take(connection, length):
    data = bytearray()
    while len(data) < length:
        packet = connection.recv(length - len(data))
        if not packet:
            raise ValueError("Connection disconnected")
        data.extend(packet)
    return bytes(data)


def take_integer(connection, layout):
    return layout.unpack(take(connection, layout.size))[0]


def take_text(connection):
    length = take_integer(connection, TEXT)
    return None if length < 0 else take(connection, length).decode()


def text(value):
    if value is None:
        return TEXT.pack(-1)
    data = value.encode()  # 26 converts nothing: a value that is no text fails here
    return TEXT.pack(len(data)) + data
