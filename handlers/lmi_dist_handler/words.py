"""Where an operator's words stand: the environment, serving.properties, the command line. Each is a Word: value and origin.

Reads what it is given: properties.py alone looks at the process's environment.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import javaproperties

from lmi_dist import ConfigError
from lmi_dist_handler.options import OPTIONS

logger = logging.getLogger(__name__)

NEWLINE = re.compile(r"\r\n|\r|\n")  # Java's; str.splitlines knows more
INVERTED = {"true": "false", "false": "true"}

# Variable to the variable it stands for, where that one is unset; in order, so that chains work (contract 5.4).
TRANSLATIONS = (
    ("HF_MODEL_QUANTIZE", "OPTION_QUANTIZE"),
    ("HF_MODEL_TRUST_REMOTE_CODE", "OPTION_TRUST_REMOTE_CODE"),
    ("HF_TRUST_REMOTE_CODE", "OPTION_TRUST_REMOTE_CODE"),
    ("SM_NUM_GPUS", "TENSOR_PARALLEL_DEGREE"),
    ("TENSOR_PARALLEL_DEGREE", "OPTION_TENSOR_PARALLEL_DEGREE"),
    ("PIPELINE_PARALLEL_DEGREE", "OPTION_PIPELINE_PARALLEL_DEGREE"),
    ("MAX_CONCURRENT_REQUESTS", "SERVING_JOB_QUEUE_SIZE"),
    ("MAX_BATCH_PREFILL_TOKENS", "OPTION_MAX_ROLLING_BATCH_PREFILL_TOKENS"),
    ("MAX_BATCH_SIZE", "OPTION_MAX_ROLLING_BATCH_SIZE"),
    ("ENABLE_CUDA_GRAPHS", "OPTION_ENFORCE_EAGER"),
    ("CUDA_MEMORY_FRACTION", "OPTION_GPU_MEMORY_UTILIZATION"),
    ("SAGEMAKER_STARTUP_TIMEOUT", "OPTION_MODEL_LOADING_TIMEOUT"),
    ("MODEL_LOADING_TIMEOUT", "OPTION_MODEL_LOADING_TIMEOUT"),
    ("SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS", "OPTION_PREDICT_TIMEOUT"),
    ("PREDICT_TIMEOUT", "OPTION_PREDICT_TIMEOUT"),
    ("SAGEMAKER_NUM_MODEL_WORKERS", "SERVING_MIN_WORKERS"),
    ("SAGEMAKER_NUM_MODEL_WORKERS", "SERVING_MAX_WORKERS"),
    ("SAGEMAKER_MAX_REQUEST_SIZE", "SERVING_MAX_REQUEST_SIZE"),
    ("SAGEMAKER_MAX_PAYLOAD_IN_MB", "SERVING_MAX_REQUEST_SIZE"),
    ("HF_MODEL_REVISION", "HF_REVISION"),
    ("DJL_ENTRY_POINT", "OPTION_ENTRYPOINT"),
    ("DJL_OFFLINE", "SERVING_OFFLINE"),
    ("PYTHON_EXECUTABLE", "OPTION_PYTHONEXECUTABLE"),
)


@dataclass(frozen=True, slots=True)
class Word:
    """A value as it was given, where, and under which name there."""

    value: str
    origin: str
    written: str

    def __str__(self) -> str:
        return self.written if self.origin == self.written else f"{self.origin}: {self.written}"


def environment_words(environ: Mapping[str, str]) -> dict[str, Word]:
    """Variables that are not empty, and under their targets' names those that stand for others."""
    words = {name: Word(value.strip(), name, name) for name, value in environ.items() if value.strip()}
    for source, target in TRANSLATIONS:
        if source in words and target not in words:
            words[target] = replace(words[source], value=_translated(source, words[source]))
    return words


def parse_env(value: object) -> object:
    """The pairs of `option.env`: cut at commas, then at the first `=` (contract 1.8). Raises ValueError for one without a name."""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
    for i, (name, separator, _) in enumerate(pairs):
        if not separator or not name.strip():
            # not shown: it may be a secret's other half
            raise ValueError(f"pair {i + 1} of {len(pairs)} must look like NAME=value")
    return {name.strip(): text.strip() for name, _, text in pairs}


def _translated(source: str, word: Word) -> str:
    if source == "ENABLE_CUDA_GRAPHS":
        return INVERTED.get(word.value.lower(), word.value)
    if source == "SAGEMAKER_MAX_PAYLOAD_IN_MB" and word.value.isdecimal():
        return str(int(word.value) << 20)
    return word.value


def option_words(words: Mapping[str, Word]) -> dict[str, Word]:
    """OPTION_* and ARGS_* by key of serving.properties."""
    found: dict[str, Word] = {}
    for name, word in words.items():
        prefix, _, rest = name.partition("_")
        if rest and prefix in ("OPTION", "ARGS"):
            is_plain = prefix == "ARGS" or rest == "ENGINE"
            found[_spelled(rest if is_plain else f"option.{rest}")] = word
    return found


def _spelled(key: str) -> str:
    """The key of that name whatever its case (`OPTION_ENTRYPOINT` is `option.entryPoint`); lower case if there is none."""
    return next((known for known in OPTIONS if known.lower() == key.lower()), key.lower())


def argument_words(arguments: Mapping[str, str]) -> dict[str, Word]:
    """What the command line says of models."""
    given = {key: value for key, value in arguments.items() if key.startswith("option.") or key in OPTIONS}
    return {key: Word(value, "command line", key) for key, value in given.items()}


def file_words(path: Path) -> dict[str, Word]:
    """Words of a Java properties file; the last of several wins, with a warning. Raises ConfigError for an empty value and a bad
    escape."""
    found: dict[str, Word] = {}
    line = 1
    try:
        for item in javaproperties.parse(BytesIO(path.read_bytes())):
            if isinstance(item, javaproperties.KeyValue):
                _warn_of_two(found.get(item.key), item.value)
                found[item.key] = Word(item.value.strip(), f"{path.name}:{line}", item.key)
            line += len(NEWLINE.findall(item.source))
    except (OSError, javaproperties.InvalidUEscapeError) as error:
        raise ConfigError(f"{path} cannot be read at line {line}: {error}") from None
    for word in found.values():
        if not word.value:
            raise ConfigError(f"{word} has no value; give one or remove the line")
    return found


def _warn_of_two(first: Word | None, value: str) -> None:
    if first and first.value != value.strip():
        logger.warning("%s is set again further down, which counts", first)
