"""Output (contract 2.3, 2.6, 3.2)."""

import json
import logging

from djl_python import codec
from djl_python.pair_list import PairList

MESSAGE = "invoke handler failure" if codec.IS_TODAYS else "prediction failure"


def to_json(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2, separators=(",", ":"))


def to_bytes(value):
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    return (value if isinstance(value, str) else to_json(value)).encode()


def _output_formatter(value):
    return to_json({"outputs": value}) + "\n"


class Output:
    def __init__(self, code=200, message="OK"):
        self.code = code
        self.message = message
        self.properties = {}
        self.content = PairList()
        self.stream_content = None
        self.formatter = None
        self.finalizer = None
        self.arguments = ()

    def set_code(self, code):
        self.code = code
        return self

    def set_message(self, message):
        self.message = message
        return self

    def add_property(self, key, value):
        self.properties[key] = str(value) if codec.IS_TODAYS else value
        return self

    def error(self, error, code=424, message=MESSAGE):
        self.code, self.message = code, message
        self.add_property("content-type", "application/json")
        self.add({"code": code, "message": message, "error": error})
        return self

    def add(self, value, key=None, batch_index=None):
        if batch_index is not None:
            key = f"batch_{batch_index}.{key or ''}"
        self.content.add(key, to_bytes(value))
        return self

    def add_as_json(self, value, key=None, batch_index=None):
        return self.add(to_json(value), key, batch_index)

    def add_stream_content(self, stream_content, output_formatter=_output_formatter):
        self.stream_content, self.formatter = stream_content, output_formatter
        return self

    def finalize(self, function, *arguments):
        self.finalizer, self.arguments = function, arguments
        return self

    def execute_finalize(self):
        try:
            if self.finalizer is not None:
                self.finalizer(*self.arguments)
        except Exception:
            logging.exception("failed to finalize")

    @staticmethod
    def binary_encode(values):
        pairs = [codec.text(key) + codec.text(str(value)) for key, value in values.items()]
        return codec.I16.pack(len(pairs)) + b"".join(pairs)

    def head(self):
        pairs = [codec.text(key) + codec.text(value) for key, value in self.properties.items()]
        return codec.I16.pack(self.code) + codec.text(self.message) + codec.I16.pack(len(pairs)) + b"".join(pairs)

    def send(self, connection):
        if self.stream_content is not None:
            connection.sendall(self.head() + codec.I16.pack(-1))
            self._send_stream(connection)
            return
        content = zip(self.content.keys, self.content.values, strict=True)
        items = [codec.text(key) + codec.I32.pack(len(value)) + value for key, value in content]
        connection.sendall(self.head() + codec.I16.pack(len(items)) + b"".join(items))

    def _send_stream(self, connection):
        last = b""
        try:
            for value in self.stream_content:
                data = to_bytes(self.formatter(value) if self.formatter else value)
                connection.sendall(codec.I8.pack(1) + codec.I32.pack(len(data)) + data)
        except Exception as error:
            logging.exception("the stream failed")
            last = str(error).encode()
        connection.sendall(codec.I8.pack(0) + codec.I32.pack(len(last)) + last)


if codec.IS_TODAYS:
    Output.get_properties = lambda self: self.properties
    Output.get_property = lambda self, key: self.properties.get(key)
