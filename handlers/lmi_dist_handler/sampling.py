"""A client's sampling words to SamplingParams. Types and ranges are checked there, once; here only names and shapes change."""

from collections.abc import Mapping
from typing import Any

from lmi_dist import SamplingParams
from lmi_dist_handler.fields import Fields

# names that all schemas share, with SamplingParams' fields
COMMON = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "typical_p": "typical_p", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias", "seed": "seed", "n": "n", "best_of": "best_of", "min_tokens": "min_tokens", "stop": "stop",
    "stop_token_ids": "stop_token_ids", "include_stop_str_in_output": "include_stop_string",
    "skip_special_tokens": "skip_special_tokens", "ignore_eos": "ignore_eos",
}  # fmt: skip
# those of the LMI schema; max_tokens is what vLLM, to which DJL hands on the rest, calls max_new_tokens
LMI = {
    **COMMON, "max_tokens": "max_tokens", "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens",
    "ignore_eos_token": "ignore_eos", "stop_sequences": "stop",
}  # fmt: skip
ONE = {name: target for name, target in LMI.items() if name not in ("n", "best_of")}  # where there is one answer, whatever is asked


class Sampling:
    """Collects SamplingParams' fields and what the client calls them."""

    def __init__(self, fields: Fields, table: Mapping[str, str]) -> None:
        self.values: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        for name, target in table.items():
            if name in fields:
                self.put(target, _converted(fields, name, target), fields.name(name))

    def put(self, target: str, value: object, name: str) -> None:
        """A value under the client's name; stop strings of two names add up."""
        earlier = self.values.get(target)
        both_listed = isinstance(earlier, tuple) and isinstance(value, tuple)
        self.values[target] = (*earlier, *value) if both_listed else value  # type: ignore[misc]  # both are tuples
        self.names[target] = name

    def default(self, wishes: Mapping[str, float]) -> None:
        """The checkpoint's own wishes (generation_config.json) where the client has none."""
        for target, value in wishes.items():
            self.values.setdefault(target, max(0, int(value)) if target == "top_k" else value)

    def params(self) -> SamplingParams:
        """Raises RequestError that names the first of the client's fields at fault."""
        return SamplingParams.of(self.values, self.names)


def _converted(fields: Fields, name: str, target: str) -> object:
    """The value in the shape that SamplingParams takes."""
    value = fields.take(name)
    if target == "stop":
        return _strings(fields, name)
    if target == "stop_token_ids":
        return tuple(fields.items(name))
    if target == "logit_bias":
        return _bias(fields, name)
    return 0 if target == "top_k" and value == -1 else value


def _strings(fields: Fields, name: str) -> tuple[str, ...]:
    """One string or a list of them."""
    value = fields.take(name)
    strings = value if isinstance(value, list) else [value]
    if not all(isinstance(string, str) for string in strings):
        raise fields.refuse(name, "must be a string or a list of strings")
    return tuple(strings)


def _bias(fields: Fields, name: str) -> dict[int, Any]:
    """Token ids as integers: JSON has only strings for keys."""
    bias_of = fields.section(name).values
    for key in bias_of:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise fields.refuse(name, f"must map token ids to numbers; {key!r} is no token id")
    return {int(key): bias for key, bias in bias_of.items()}
