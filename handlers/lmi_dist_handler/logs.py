"""How the server logs: one line a record on stderr, as text or as JSON, which is known only once the settings are read."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from logging.handlers import MemoryHandler
from typing import Literal

LogFormat = Literal["text", "json"]

TEXT = "%(asctime)s %(levelname)s %(message)s"
HOST_MARKS = ("Python engine started.", "[METRICS]", "ModelServerTelemetry:")  # what DJL's host reads out of a worker's lines
EARLY_RECORDS = 10_000  # kept at most until the format is known


class JsonFormatter(logging.Formatter):
    """A record as one JSON object; what `extra={"fields": …}` holds stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)


class Early:
    """Keeps records until `use` tells their form. Left without, it lets them go as text."""

    def __init__(self) -> None:
        self._memory = MemoryHandler(EARLY_RECORDS, flushLevel=logging.CRITICAL + 1)
        logging.basicConfig(level=logging.INFO, handlers=[self._memory], force=True)

    def use(self, form: LogFormat) -> None:
        """From now on, and for what was logged before."""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
        self._memory.setTarget(handler)
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)  # closes the memory, which lets its records go


@contextlib.contextmanager
def early() -> Iterator[Early]:
    """Log in whatever form is chosen within; an exception lets the records go as text."""
    kept = Early()
    try:
        yield kept
    except BaseException:
        kept.use("text")
        raise


class Defuse(logging.Filter):
    """Takes the last letter off what DJL's host would act on: a client's own text may be in a record."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.exc_text = _defused(record.exc_text or "") or None
        message = record.getMessage()
        if _defused(message) != message:
            record.msg, record.args = _defused(message), ()
        return True


def defuse(handlers: Iterable[logging.Handler]) -> None:
    """Let no handler write a line that means something to DJL's host."""
    for handler in handlers:
        if not any(isinstance(one, Defuse) for one in handler.filters):
            handler.addFilter(Defuse())


def _defused(text: str) -> str:
    for mark in HOST_MARKS:
        text = text.replace(mark, mark[:-1])
    return text
