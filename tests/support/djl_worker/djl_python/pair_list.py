"""PairList (contract 3.1)."""


class PairList:
    def __init__(self):
        self.keys = []
        self.values = []

    def add(self, key, value):
        self.keys.append(key)
        self.values.append(value)

    def get(self, key):
        return next((value for name, value in zip(self.keys, self.values, strict=True) if name == key), None)

    def contains(self, key):
        return key in self.keys

    def key_at(self, index):
        return self.keys[index]

    def value_at(self, index):
        return self.values[index]

    def size(self):
        return len(self.keys)

    def is_empty(self):
        return not self.keys

    def get_keys(self):
        return self.keys

    def get_values(self):
        return self.values
