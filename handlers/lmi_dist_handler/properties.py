"""The operator's words to settings: serving.properties, OPTION_*, SERVING_*, HF_* and the command line, each value with its origin.

The only reader of the environment. Knows no default and no rule of the engine: those are EngineConfig's. Layers, highest first
(contract 5.1), of a model's words: command line, SERVING_LOAD_MODELS or HF_MODEL_ID, serving.properties, OPTION_* and ARGS_*, other
variables that mean one of these; of the server's words: command line, SERVING_*, config.properties.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmi_dist import ConfigError, EngineConfig
from lmi_dist_handler.load_models import (
    DEFAULT_STORE,
    Entry,
    canonical_engine,
    default_entries,
    hub_entry,
    parse_entries,
)
from lmi_dist_handler.options import (
    FORMATTERS,
    HOST,
    OPTIONS,
    SECRETS,
    SERVER_FIELDS,
    UNBUILT_FORMATTERS,
    WORKER_PROPERTIES,
    Formatter,
    Option,
)
from lmi_dist_handler.server_words import server_words
from lmi_dist_handler.settle import not_built, resolve_degree, settle
from lmi_dist_handler.words import Word, argument_words, environment_words, file_words, option_words

MASK = "***"
NO_WORDS: Mapping[str, str] = MappingProxyType({})
OURS = ("lmi-dist", "vllm", "auto")  # values of rolling_batch that mean this engine
THREE_WAYS = "set OPTION_MODEL_ID to a folder or hub id, or MODEL_DIR to a folder with serving.properties, or SERVING_LOAD_MODELS"


class ServerSettings(BaseModel):
    """What the host process needs. `origin` tells where each value that is not a default came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen at")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port; 0: any that is free")
    max_request_size: int = Field(default=67108864, ge=1, description="bytes of a body at most")
    job_queue_size: int = Field(default=1000, ge=1, description="requests that may wait")
    predict_timeout: int = Field(default=240, ge=1, description="seconds that a step may take")
    model_loading_timeout: int = Field(default=1200, ge=1, description="seconds until a model must be ready")
    chunked_read_timeout: int = Field(default=120, ge=1, description="seconds between two pieces of an answer")
    api_key: str | None = Field(default=None, min_length=1, description="bearer key that every route but /ping asks for")
    origin: Mapping[str, str] = Field(default_factory=dict)


class HandlerConfig(BaseModel):
    """What a worker needs: how to run the model and how to answer."""

    def table(self) -> list[tuple[str, str, str]]:
        """Rows (word, value in use, origin); a secret only as set or unset."""
        words = {field: key for key, field in HOST.items()} | {name: f"SERVING_{name.upper()}" for name in SERVER_FIELDS}
        names = [name for name in type(self).model_fields if name != "origin"]
        return [(words[name], _told(name, getattr(self, name)), self.origin.get(name, "default")) for name in names]

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    engine: EngineConfig
    model_name: str
    output_formatter: Formatter | None = Field(default=None, description="form of answers; unset: the request's `stream` decides")
    tgi_compat: bool = Field(default=False, description="token fields and frames as in text-generation-inference")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One model. `values` is what its workers get as init properties: option name, without `option.`, to text."""

    name: str
    version: str
    folder: Path | None
    engine: str
    values: Mapping[str, str]
    origin: Mapping[str, str]
    handler: HandlerConfig

    def engine_config(self) -> EngineConfig:
        return self.handler.engine

    def init_properties(self) -> dict[str, str]:
        """The properties of the init request (contract 3.5)."""
        return {**self.values, "model_name": self.name, "handler": "handle"}

    def table(self) -> list[tuple[str, str, str]]:
        """Rows (option, value in use, origin) of every option that has an effect, then of those given that have none."""
        rows = [
            (key, _told(option.name, self._in_use(option)), self.origin.get(option.name, "default")) for key, option in _effective()
        ]
        idle = [OPTIONS[key] for name in self.values for key in (f"option.{name}", name) if key in OPTIONS]
        ignored = [row for row in idle if row.reader == "ignored"]
        return rows + [
            (row.key, _told(row.name, self.values[row.name]), f"{self.origin[row.name]}; no effect: {row.about}") for row in ignored
        ]

    def _in_use(self, option: Option) -> object:
        if option.reader == "engine":
            return getattr(self.handler.engine, option.field)
        if option.field == "rolling_batch":
            return self.values.get("rolling_batch", "lmi-dist")
        return getattr(self.handler, option.field)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that an operator can say, resolved."""

    server: ServerSettings
    models: tuple[ModelSettings, ...]


def load(model_dir: Path | None, environ: Mapping[str, str] = os.environ, arguments: Mapping[str, str] = NO_WORDS) -> Settings:
    """Settings of a server. `model_dir` is the command line's, `arguments` its other words: `option.X` and plain keys of
    serving.properties for every model, ServerSettings' fields, `load_models`, `model_store` and `config_file` for the server.
    Raises ConfigError that names the first word at fault, where it was written, the rule and the way out."""
    words = environment_words(environ)
    server = server_words(words, arguments)
    entries = _entries(model_dir, words, server)
    queue = {key: word for key, word in server.items() if key == "job_queue_size"}
    shared = {**queue, **option_words(words), **argument_words(arguments)}
    models = tuple(_model(entry, shared, environ) for entry in entries)
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two models have the same name among {', '.join(names)}; name them as in SERVING_LOAD_MODELS=name=folder"
        )
    return Settings(_server_settings(server, models), models)


def from_init(properties: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> HandlerConfig:
    """What a worker makes of its init request. Same table and rules; a word that is unknown here only warns, because DJL
    hands on all that a model's file holds, its own words too. Raises ConfigError."""
    words = {_key(name): Word(_text(name, value), _key(name), _key(name)) for name, value in properties.items()}
    own = {key: word for key, word in words.items() if key not in WORKER_PROPERTIES}
    if not _has_model(own) and "model_dir" in words:
        own["option.model_id"] = words["model_dir"]
    settled = _with_queue(resolve_degree(settle(own, inside_djl=True), environ))
    if not _has_model(settled):
        raise ConfigError("option.model_id is missing from the init request")
    name = words["model_name"].value if "model_name" in words else Path(settled["option.model_id"].value).name
    return _handler_config(settled, name)


def _entries(model_dir: Path | None, words: Mapping[str, Word], server: Mapping[str, Word]) -> list[Entry]:
    """What to load, by the first of: a folder on the command line, MODEL_DIR, load_models, model_store, SageMaker's folder; then
    HF_MODEL_ID's model. None of them: OPTION_MODEL_ID's."""
    named = model_dir or ("MODEL_DIR" in words and Path(words["MODEL_DIR"].value))
    if named:
        if not named.is_dir():
            raise ConfigError(f"{'--model-dir' if model_dir else 'MODEL_DIR'}={str(named)!r} is not a folder")
        return [Entry(str(named.resolve()), "--model-dir" if model_dir else "MODEL_DIR")]
    found = _listed_entries(server) + ([hub_entry(words["HF_MODEL_ID"].value)] if "HF_MODEL_ID" in words else [])
    if not found and "load_models" not in server:
        found = [Entry("", "")]
    if not found:
        raise ConfigError(f"no model to load; {THREE_WAYS}")
    return found


def _listed_entries(server: Mapping[str, Word]) -> list[Entry]:
    store = server["model_store"].value if "model_store" in server else ""
    if "load_models" in server:
        text = server["load_models"]
        return parse_entries(text.value, store or str(DEFAULT_STORE), text.origin)
    return parse_entries("ALL", store, "model_store") if store else default_entries()


def _model(entry: Entry, shared: Mapping[str, Word], environ: Mapping[str, str]) -> ModelSettings:
    folder = entry.folder
    path = folder / "serving.properties" if folder else None
    from_file = file_words(path) if path and path.exists() else {}
    on_command_line = {key: word for key, word in shared.items() if word.origin == "command line"}
    words = {**shared, **from_file, **_entry_words(entry, environ), **on_command_line}
    if not _has_model(words):
        words["option.model_id"] = _folder_as_model(entry)
    settled = _with_queue(resolve_degree(settle(words, inside_djl=False), environ))
    settled["option.model_id"] = _absolute(settled["option.model_id"], folder)
    engine = settled.get("engine")
    return ModelSettings(
        name=entry.model_name,
        version=entry.version,
        folder=folder,
        engine=canonical_engine(engine.value, str(engine.origin)) if engine else "MPI",
        values={OPTIONS[key].name: word.value for key, word in settled.items()},
        origin={OPTIONS[key].name: word.origin for key, word in settled.items()},
        handler=_handler_config(settled, entry.model_name),
    )


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


def _folder_as_model(entry: Entry) -> Word:
    """The model's folder, or the s3:// url given for it, is the checkpoint itself. ConfigError if it cannot be."""
    if entry.url.startswith("s3://"):
        return Word(entry.url, entry.origin, "option.model_id")
    if entry.folder and (entry.folder / "config.json").exists():
        return Word(str(entry.folder), entry.origin, "option.model_id")
    if entry.folder:
        raise ConfigError(f"{entry.folder} holds neither option.model_id in a serving.properties nor a config.json; {THREE_WAYS}")
    missing = f"{entry.origin}: {entry.url!r} is not a folder and option.model_id is not set" if entry.url else "no model was given"
    raise ConfigError(f"{missing}; {THREE_WAYS}")


def _absolute(word: Word, folder: Path | None) -> Word:
    """A relative path made absolute, against the model's folder, else the current one: workers start in another folder."""
    for path in ([folder / word.value] if folder else []) + [Path(word.value).expanduser()]:
        if "://" not in word.value and path.is_dir():
            return replace(word, value=str(path.resolve()))
    return word


def _handler_config(words: Mapping[str, Word], model_name: str) -> HandlerConfig:
    _check_rolling_batch(words)
    _check_formatter(words)
    engine = {OPTIONS[key].field: word for key, word in words.items() if OPTIONS[key].reader == "engine"}
    config = EngineConfig.of(_values(engine), {name: str(word) for name, word in engine.items()})
    own = {OPTIONS[key].field: word for key, word in words.items() if OPTIONS[key].reader == "handler"}
    own.pop("rolling_batch", None)  # checked above; all of its values mean this engine
    return _validated(HandlerConfig, own, {"engine": config, "model_name": model_name})


def _check_rolling_batch(words: Mapping[str, Word]) -> None:
    word, is_async = words.get("option.rolling_batch"), words.get("option.async_mode")
    if word is None or word.value.lower() in OURS:
        return
    if word.value.lower() != "disable":
        raise ConfigError(f"{word}={word.value!r} is not this engine; use {' or '.join(OURS)}")
    if is_async is None or is_async.value.lower() != "true":
        raise not_built(word, OURS)


def _check_formatter(words: Mapping[str, Word]) -> None:
    word = words.get("option.output_formatter")
    if word and word.value in UNBUILT_FORMATTERS:
        raise not_built(word, FORMATTERS)


def _server_settings(words: Mapping[str, Word], models: tuple[ModelSettings, ...]) -> ServerSettings:
    given = {key: word for key, word in words.items() if key in SERVER_FIELDS}
    for name in ("predict_timeout", "model_loading_timeout", "job_queue_size"):
        wishes = {model.values[name]: model.origin[name] for model in models if name in model.values}
        if len(wishes) > 1:
            raise ConfigError(f"models of one server must agree on {name}, not ask for {' and '.join(sorted(wishes))}")
        for value, origin in wishes.items():
            given[name] = Word(value, origin, name)
    return _validated(ServerSettings, given, {"origin": {name: word.origin for name, word in given.items()}})


Model = TypeVar("Model", bound=BaseModel)


def _validated(model: type[Model], words: Mapping[str, Word], others: Mapping[str, object]) -> Model:
    """A `model` from words and ready values; ConfigError names the first word at fault."""
    try:
        return model.model_validate({**_values(words), **others})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        word = words[str(first["loc"][0])]
        raise ConfigError(f"{word}={word.value!r} is refused: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _values(words: Mapping[str, Word]) -> dict[str, object]:
    return {name: word.value for name, word in words.items()}


def _key(name: str) -> str:
    """The key in serving.properties of an init property."""
    return f"option.{name}" if f"option.{name}" in OPTIONS else name


def _text(name: str, value: object) -> str:
    if callable(value):
        raise ConfigError(f"{name}: a function of model.py is known but not built yet; remove it")
    return str(value)


def _effective() -> list[tuple[str, Option]]:
    return [(key, option) for key, option in OPTIONS.items() if option.reader in ("engine", "handler")]


def _shown(value: object) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
def _told(name: str, value: object) -> str:
    """The value of an option as anybody may see it."""
    return MASK if name in SECRETS and value is not None else _shown(value)


    """A value as an operator would write it, without the name and password that a url may hold."""
    if isinstance(value, str) and "://" in value:
        return re.sub(r"://[^/@\s]*@", f"://{MASK}@", value)
