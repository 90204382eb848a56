"""Input (contract 3.1)."""

import csv
import io
import json

from djl_python import codec
from djl_python.pair_list import PairList


class Input:
    def __init__(self):
        self.function_name = None
        self.properties = {}
        self.content = PairList()

    def read(self, connection):
        for _ in range(codec.take_integer(connection, codec.I16)):
            key = codec.take_text(connection)
            self.properties[key] = codec.take_text(connection)
        for _ in range(codec.take_integer(connection, codec.I16)):
            key = codec.take_text(connection)
            self.content.add(key, codec.take(connection, codec.take_integer(connection, codec.I32)))
        self.function_name = self.properties.get("handler")

    def get_function_name(self):
        return self.function_name

    def get_properties(self):
        return self.properties

    def get_property(self, key):
        return next((value for name, value in self.properties.items() if name.lower() == key.lower()), None)

    def get_content(self):
        return self.content

    def contains_key(self, key):
        return self.content.contains(key)

    def is_empty(self):
        return self.content.is_empty()

    def is_batch(self):
        return "batch_size" in self.properties

    def get_batch_size(self):
        return int(self.properties.get("batch_size", 1))

    def get_batches(self):
        if not self.is_batch():
            return [self]
        batches = [Input() for _ in range(self.get_batch_size())]
        for batch in batches:
            batch.function_name = self.function_name
        for key, value in self.properties.items():
            if key.startswith("batch_") and key != "batch_size":
                batches[int(key[6:9])].properties[key[10:]] = value
        for index in range(self.content.size()):
            key = self.content.key_at(index)
            batches[int(key[6:9])].content.add(key[10:], self.content.value_at(index))
        return batches

    def get_as_bytes(self, key=None):
        if self.content.is_empty():
            return None
        if key is not None:
            if not self.content.contains(key):
                raise KeyError(f"requested data for key:{key} is not found!")
            return self.content.get(key)
        return self.content.get("data") if self.content.contains("data") else self.content.value_at(0)

    def get_as_string(self, key=None):
        return self.get_as_bytes(key).decode()

    def get_as_json(self, key=None):
        return json.loads(self.get_as_bytes(key))

    def get_as_csv(self, key=None):
        return list(csv.DictReader(io.StringIO(self.get_as_string(key))))
