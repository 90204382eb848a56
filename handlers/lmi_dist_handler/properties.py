"""The operator's words to settings: serving.properties, OPTION_*, SERVING_*, HF_* and the command line, each value with its origin.

The only reader of the environment. Knows no default: those are in settings.py and EngineConfig. Layers, highest first
(contract 5.1), of a model's words: command line, SERVING_LOAD_MODELS or HF_MODEL_ID, serving.properties, OPTION_* and ARGS_*, other
variables that mean one of these; of the server's words: command line, SERVING_*, config.properties.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lmi_dist import ConfigError, EngineConfig
from lmi_dist_handler.dialects import OURS, LmiDialect
from lmi_dist_handler.load_models import Entry, absolute, canonical_engine, check_own_checkpoint, entries, folder_as_model
from lmi_dist_handler.options import FORMATTERS, OPTIONS, SECRETS, SERVER_FIELDS, UNBUILT_FORMATTERS, WORKER_PROPERTIES
from lmi_dist_handler.registration import registration, store_of
from lmi_dist_handler.server_words import FOR_MODELS, server_words
from lmi_dist_handler.settings import MASK, HandlerConfig, ModelSettings, ServerSettings, WorkerConfig
from lmi_dist_handler.settle import not_built, resolve_degree, settle
from lmi_dist_handler.words import Word, argument_words, environment_words, file_words, option_words

NO_WORDS: Mapping[str, str] = MappingProxyType({})
OF_MODEL_PY = ("input_formatter", "output_formatter")  # DJL hands over functions under these names; model_py.py takes them
ENGINES = ("lmi-dist", "vllm", "auto")  # values of rolling_batch that mean this engine


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that an operator can say, resolved."""

    server: ServerSettings
    models: tuple[ModelSettings, ...]
    shared: Mapping[str, Word] = dataclasses.field(default_factory=dict)  # words for every model, also for those to be registered
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def register(self, parameters: Mapping[str, str]) -> ModelSettings:
        """Settings of the model that POST /models asks for (contract 6.8). Raises ConfigError by name."""
        store = store_of(self.server.model_store)
        entry, given = registration(parameters, store, any_url=self.server.allow_any_model_url)
        return _model(entry, self.shared, self.environ, self.server, given, is_alone=False)


def load(model_dir: Path | None, environ: Mapping[str, str] = os.environ, arguments: Mapping[str, str] = NO_WORDS) -> Settings:
    """Settings of a server. `model_dir` is the command line's, `arguments` its other words: `option.X` and plain keys of
    serving.properties for every model, ServerSettings' fields, `load_models`, `model_store` and `config_file` for the server.
    Raises ConfigError that names the first word at fault, where it was written, the rule and the way out."""
    words = environment_words(environ)
    server = server_words(words, arguments)
    found = entries(model_dir, words, server)
    settings = _server_settings(server)
    of_server = {key: word for key, word in server.items() if key in FOR_MODELS}
    shared = {**of_server, **option_words(words), **argument_words(arguments)}
    models = tuple(_model(entry, shared, environ, settings, {}, is_alone=len(found) == 1) for entry in found)
    names = [f"{model.name}:{model.version}".rstrip(":") for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two models have the same name among {', '.join(names)}; name them as in SERVING_LOAD_MODELS=name=folder"
        )
    return Settings(settings, models, shared, environ)


def from_init(properties: Mapping[str, Any], environ: Mapping[str, str] = os.environ, dialect: LmiDialect = OURS) -> HandlerConfig:
    """What a worker makes of its init request, for a host that speaks `dialect`. Same table and rules; a word that is unknown here
    only warns, because DJL hands on all that a model's file holds, its own words too. Raises ConfigError."""
    plain = {name: value for name, value in properties.items() if not (name in OF_MODEL_PY and callable(value))}
    words = {_key(name): Word(_text(name, value), _key(name), _key(name)) for name, value in plain.items()}
    own = {key: word for key, word in words.items() if key not in WORKER_PROPERTIES}
    if not _has_model(own) and "model_dir" in words:
        own["option.model_id"] = words["model_dir"]
    settled = _with_queue(resolve_degree(settle(own, inside_djl=True), environ))
    if not _has_model(settled):
        raise ConfigError("option.model_id is missing from the init request")
    name = words["model_name"].value if "model_name" in words else Path(settled["option.model_id"].value).name
    config = _handler_config(settled, name)
    if config.rolling_batch == "disable" and config.enable_streaming != "false" and int(properties.get("batch_size", 1)) > 1:
        raise ConfigError("We cannot enable streaming for dynamic batching")  # DJL's own sentence
    return config.model_copy(update={"dialect": dialect})


def _model(
    entry: Entry,
    shared: Mapping[str, Word],
    environ: Mapping[str, str],
    server: ServerSettings,
    given: Mapping[str, Word],
    *,
    is_alone: bool,
) -> ModelSettings:
    """One model from the words of all, those of its file and what was `given` for it alone."""
    folder = entry.folder
    path = folder / "serving.properties" if folder else None
    from_file = file_words(path) if path and path.exists() else {}
    on_command_line = {key: word for key, word in shared.items() if word.origin == "command line"}
    words = {**shared, **from_file, **_entry_words(entry, environ), **on_command_line, **given}
    if not (is_alone or _has_model(from_file)):
        check_own_checkpoint(entry, shared.get("option.model_id"))
    if not _has_model(words):
        words["option.model_id"] = folder_as_model(entry)
    settled = _with_queue(resolve_degree(settle(words, inside_djl=False), environ))
    _check_rolling(settled)
    settled["option.model_id"] = absolute(settled["option.model_id"], folder)
    engine = settled.get("engine")
    return ModelSettings(
        name=entry.model_name,
        version=entry.version,
        folder=folder,
        engine=canonical_engine(engine.value, str(engine.origin)) if engine else "MPI",
        values={OPTIONS[key].name: word.value for key, word in settled.items()},
        origin={OPTIONS[key].name: word.origin for key, word in settled.items()},
        handler=_handler_config(settled, entry.model_name),
        worker=(worker := _worker_config(settled, server)),
        environment=None if worker.env is None else {**environ, **worker.env},
    )


def _worker_config(words: Mapping[str, Word], server: ServerSettings) -> WorkerConfig:
    if "option.env" in words and not server.allow_env:
        raise ConfigError(f"{words['option.env']} is refused: a model may set variables only with SERVING_ALLOW_ENV=true")
    fields = {OPTIONS[key].field: word for key, word in words.items() if OPTIONS[key].reader == "host"}
    fields.pop("engine", None)
    return _validated(WorkerConfig, fields, {})


def _entry_words(entry: Entry, environ: Mapping[str, str]) -> dict[str, Word]:
    """What the list of models itself says of a model; for HF_MODEL_ID also its revision and task."""
    given = {"engine": entry.engine, "option.model_id": entry.model_id}
    found = {key: Word(value, entry.origin, key) for key, value in given.items() if value}
    if entry.origin == "HF_MODEL_ID":
        words = environment_words(environ)
        aside = {"option.revision": words.get("HF_REVISION"), "option.task": words.get("HF_TASK")}
        found |= {key: word for key, word in aside.items() if word}
    return found


def _with_queue(words: dict[str, Word]) -> dict[str, Word]:
    """The engine lets as many requests wait as the host does, unless told otherwise."""
    if "job_queue_size" in words:
        words.setdefault("option.max_queue_size", words["job_queue_size"])
    return words


def _has_model(words: Mapping[str, Word]) -> bool:
    return "option.model_id" in words or "option.s3url" in words


def _handler_config(words: Mapping[str, Word], model_name: str) -> HandlerConfig:
    _check_rolling_batch(words)
    _check_formatter(words)
    engine = {OPTIONS[key].field: word for key, word in words.items() if OPTIONS[key].reader == "engine"}
    config = EngineConfig.of(_values(engine), {name: str(word) for name, word in engine.items()})
    own = {OPTIONS[key].field: word for key, word in words.items() if OPTIONS[key].reader == "handler"}
    return _validated(HandlerConfig, own, {"engine": config, "model_name": model_name})


def _check_rolling_batch(words: Mapping[str, Word]) -> None:
    word = words.get("option.rolling_batch")
    if word is not None and word.value.lower() not in (*ENGINES, "disable"):
        raise ConfigError(f"{word}={word.value!r} is not this engine; use {' or '.join(ENGINES)}")


def _check_rolling(words: Mapping[str, Word]) -> None:
    """In our own host requests are always batched as they come."""
    word, is_async = words.get("option.rolling_batch"), words.get("option.async_mode")
    if word and word.value.lower() == "disable" and not (is_async and is_async.value.lower() == "true"):
        raise ConfigError(f"{word}={word.value!r} is for DJL's own host; leave it out or use {' or '.join(ENGINES)}")


def _check_formatter(words: Mapping[str, Word]) -> None:
    word = words.get("option.output_formatter")
    if word and word.value in UNBUILT_FORMATTERS:
        raise not_built(word, FORMATTERS)


def _server_settings(words: Mapping[str, Word]) -> ServerSettings:
    given = {key: word for key, word in words.items() if key in SERVER_FIELDS}
    return _validated(ServerSettings, given, {"origin": {name: word.origin for name, word in given.items()}})


Model = TypeVar("Model", bound=BaseModel)


def _validated(model: type[Model], words: Mapping[str, Word], others: Mapping[str, object]) -> Model:
    """A `model` from words and ready values; ConfigError names the first word at fault."""
    try:
        return model.model_validate({**_values(words), **others})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        value = MASK if name in SECRETS else repr(words[name].value)
        raise ConfigError(f"{words[name]}={value} is refused: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _values(words: Mapping[str, Word]) -> dict[str, object]:
    return {name: word.value for name, word in words.items()}


def _key(name: str) -> str:
    """The key in serving.properties of an init property."""
    return f"option.{name}" if f"option.{name}" in OPTIONS else name


def _text(name: str, value: object) -> str:
    if callable(value):
        raise ConfigError(f"{name} is a function, but must be text")
    return str(value)
