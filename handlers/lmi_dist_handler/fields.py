"""Typed reading of a client's JSON: each accessor gives a value or raises RequestError that names field, value and rule.

A null is as good as nothing. What was never asked for can be named in one warning.
"""

import itertools
import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lmi_dist import RequestError

logger = logging.getLogger(__name__)

SHOWN = 100  # characters of a value that a message repeats
MAX_NAMED = 16  # unknown fields of one object that the log names


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds. Raises RequestError for anything else. NaN and Infinity, which are not JSON, are left for
    their field's rule to refuse: that names the field."""
    try:
        value = json.loads(body.decode("utf-8"))
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError("the body escapes half of a surrogate pair; send whole characters") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}; send JSON in UTF-8") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply; send a flat object") from None
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}" if body.strip() else "the body is empty; send a JSON object") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class Fields:
    """One JSON object of a request; `path` stands before its names in messages."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values = {name: value for name, value in values.items() if value is not None}
        self.path = path
        self._known: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self.take(name) is not None

    def name(self, name: str) -> str:
        return f"{self.path}{name}"

    def take(self, name: str) -> Any:
        """The value as it is, None if there is none."""
        self._known.add(name)
        return self.values.get(name)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        return default if value is None else value

    def integer(self, name: str, minimum: int, maximum: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum or (maximum is not None and value > maximum):
            most = f" and at most {maximum}" if maximum is not None else ""
            raise self.refuse(name, f"must be an integer of at least {minimum}{most}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string that is not empty, or the default."""
        value = self.take(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise RequestError(f"{self.name(name)} is missing; it must be a string", self.name(name))
        if not isinstance(value, str) or not value:
            raise self.refuse(name, "must be a string that is not empty")
        return value

    def texts(self, name: str, most: int) -> list[str]:
        """A list of strings, none of them empty: at least one, at most `most`."""
        values = self.items(name)
        if not values or not all(isinstance(value, str) and value for value in values):
            raise self.refuse(name, "must be a string, or a list of strings, none empty")
        if len(values) > most:
            raise RequestError(
                f"{self.name(name)} has {len(values)} entries, but at most {most} go into one request", self.name(name)
            )
        return values

    def items(self, name: str) -> list[Any]:
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            raise self.refuse(name, "must be a list")
        return value or []

    def section(self, name: str) -> "Fields":
        """A nested object; empty when absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, "must be an object")
        return Fields(value or {}, f"{self.name(name)}.")

    def between(self, name: str, low: float, high: float) -> None:
        """A number's range that is the dialect's rule, not the engine's; its type is checked with the engine's."""
        value = self.take(name)
        if isinstance(value, int | float) and not low <= value <= high:
            raise self.refuse(name, f"must be between {low} and {high}")

    def only(self, name: str, *neutral: object, way_out: str = "leave it out") -> None:
        """A field that is known but not built yet: only values that change nothing are taken."""
        value = self.take(name)
        if value is not None and value not in neutral:
            raise self.refuse(name, f"is known but not built yet; {way_out}")

    def ignore(self, *names: str) -> None:
        """Fields that have no effect, by design."""
        self._known.update(names)

    def warn_of_unknown(self) -> None:
        """Name, once in this process, each field that nobody has asked for; of many only some, for a log has its limits."""
        for name in itertools.islice((name for name in self.values if name not in self._known), MAX_NAMED):
            _warn_once(f"{self.path}{name}"[:SHOWN])

    def refuse(self, name: str, rule: str) -> RequestError:
        return RequestError(f"{self.name(name)}={_shown(self.values.get(name))} {rule}", self.name(name))


@lru_cache(maxsize=1024)
def _warn_once(name: str) -> None:
    logger.warning("request parameter %r is unknown and ignored", name)
