"""A model's own model.py: its functions that read requests and write answers (contract 7.8). Runs in the worker, only when allowed.

model.py imports djl_python, which is there only inside DJL; else modules of that name with what formatters need stand in for it.
"""

import contextlib
import csv
import importlib.util
import inspect
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lmi_dist import ConfigError
from lmi_dist_handler import request_io
from lmi_dist_handler.wire import Input, Output

NUM_ARGUMENTS = (1, 6, 5)  # that a function may take which writes answers: DJL 0.28 and later, 0.27, 0.26
MARKS = ("is_input_formatter", "is_output_formatter")


@dataclass(frozen=True, slots=True)
class Functions:
    """A model's own functions; None where it has none."""

    input_formatter: Callable[..., Any] | None = None
    output_formatter: Callable[..., Any] | None = None


NONE = Functions()


def given(properties: Mapping[str, Any]) -> Functions:
    """What DJL has found in model.py and handed over among the init properties."""
    named = {name: properties.get(name) for name in ("input_formatter", "output_formatter")}
    found = {name: function for name, function in named.items() if callable(function)}
    return _checked(Functions(**found)) if found else NONE


def load(folder: Path, is_allowed: bool | None) -> Functions:
    """The functions of a folder's model.py. Raises ConfigError if it cannot be run, or if nobody said whether to."""
    path = folder / "model.py"
    if not is_allowed:
        _check_unmarked(path, is_allowed)
        return NONE
    if not path.is_file():
        raise ConfigError(f"option.allow_model_py=true, but {path} does not exist; write it, or leave the option out")
    functions = vars(_run(path)).values()
    found = [[function for function in functions if getattr(function, mark, False) is True] for mark in MARKS]
    if not any(found):
        raise ConfigError(
            f"{path} has no function with @input_formatter or @output_formatter; write one, or leave allow_model_py out"
        )
    return _checked(Functions(*(functions[-1] if functions else None for functions in found)))


def num_arguments(function: Callable[..., Any]) -> int:
    """How many a function that writes answers takes, of NUM_ARGUMENTS. Raises ConfigError for any other."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # built in
        return 1
    for count in NUM_ARGUMENTS:
        with contextlib.suppress(TypeError):
            signature.bind(*range(count))
            return count
    raise ConfigError(
        f"the output formatter {getattr(function, '__name__', function)}{signature} must take one argument, the request's output, "
        "or the five or six that DJL 0.26 and 0.27 give"
    )


def _checked(functions: Functions) -> Functions:
    if functions.output_formatter is not None:
        num_arguments(functions.output_formatter)
    return functions


def _check_unmarked(path: Path, is_allowed: bool | None) -> None:
    """Answers in another form than the model's author wrote would be a surprise: an operator has to say yes or no."""
    if is_allowed is None and path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        if "@input_formatter" in text or "@output_formatter" in text:
            raise ConfigError(f"{path} has formatters of its own; run it with option.allow_model_py=true, or set it to false")


def _run(path: Path) -> ModuleType:
    _stand_in()
    spec = importlib.util.spec_from_file_location("model", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a stranger's file raises is told by its name
        raise ConfigError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def _stand_in() -> None:
    """Put modules of djl_python's names in place, unless the real ones are there."""
    if "djl_python" in sys.modules or importlib.util.find_spec("djl_python") is not None:
        return
    classes = {name: value for name, value in vars(request_io).items() if isinstance(value, type)}
    contents: dict[str, dict[str, Any]] = {
        "djl_python": {"Input": Input, "Output": Output, "__path__": []},
        "djl_python.inputs": {"Input": Input},
        "djl_python.outputs": {"Output": Output},
        "djl_python.request_io": classes,
        "djl_python.output_formatter": {**classes, "output_formatter": request_io.output_formatter},
        "djl_python.input_parser": {"input_formatter": request_io.input_formatter},
        "djl_python.encode_decode": {"decode": decode},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def decode(inputs: Input, content_type: str | None) -> Any:
    """djl_python.encode_decode.decode (contract 3.3), of what holds text. Raises ValueError for a body that is not of its type."""
    kind = content_type or ""
    text = inputs.get_as_string()
    if "text/csv" in kind:
        return _decode_csv(text)
    if "text/plain" in kind:
        return {"inputs": [text]}
    if "application/x-www-form-urlencoded" in kind:
        return {"inputs": text}
    if not kind or "application/json" in kind:
        return json.loads(text) if text or kind else {"inputs": ""}
    return {"inputs": inputs.get_as_bytes()}


def _decode_csv(text: str) -> dict[str, Any]:
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    names = set(rows[0]) if rows else set()
    if not names & {"question", "context", "inputs"}:
        raise ValueError("CSV must have a header row with a column question, context or inputs")
    return {"inputs": [row["inputs"] for row in rows] if "inputs" in names else rows}
