"""What a client asks for with POST /models: parameters to an Entry and to words, its url confined (contract 6.8).

A url is a folder in the model store, by its path or by its name there; any other only where the operator allows it.
"""

from collections.abc import Mapping
from pathlib import Path

from lmi_dist import ConfigError
from lmi_dist_handler.load_models import ANY_DEVICE, DEFAULT_STORE, Entry, canonical_engine, check_name, check_url
from lmi_dist_handler.settle import not_built, unknown_parameter
from lmi_dist_handler.words import Word

ORIGIN = "POST /models"

# parameters that are words of serving.properties under another name, or under the same
KEYS = {
    "batch_size": "batch_size", "job_queue_size": "job_queue_size", "max_batch_delay": "max_batch_delay",
    "max_idle_time": "max_idle_time", "min_worker": "minWorkers", "max_worker": "maxWorkers",
}  # fmt: skip
PARAMETERS = ("url", "model_name", "model_version", "engine", "device", "synchronous", *KEYS)


def registration(parameters: Mapping[str, str], store: Path | None, *, any_url: bool) -> tuple[Entry, dict[str, Word]]:
    """The model to load, and what the parameters say of it. Raises ConfigError by name for one that is unknown, not built or
    outside the store."""
    given = {name: Word(value.strip(), ORIGIN, name) for name, value in parameters.items()}
    for name, word in given.items():
        if name not in PARAMETERS:
            raise unknown_parameter(word, PARAMETERS)
    if "url" not in given or not given["url"].value:
        raise ConfigError("Parameter url is required.")
    texts = {name: word.value for name, word in given.items()}
    if texts.get("device", "") not in ANY_DEVICE:
        raise not_built(given["device"], ANY_DEVICE[1:])
    engine = canonical_engine(texts["engine"], ORIGIN) if texts.get("engine") else ""
    url = confined(texts["url"], store, any_url=any_url)
    name = check_name(texts.get("model_name", ""), f"{ORIGIN}: model_name")
    version = check_name(texts.get("model_version", ""), f"{ORIGIN}: model_version")
    words = {KEYS[name]: word for name, word in given.items() if name in KEYS and word.value}
    return Entry(url, ORIGIN, name, version, engine), words


def confined(url: str, store: Path | None, *, any_url: bool) -> str:
    """The real path of a folder in the store; with `any_url` also any other folder and s3:// urls. ConfigError with the way out."""
    url = check_url(url, ORIGIN)
    path = None if "://" in url else _resolved(url, store)
    if path and store and path.is_relative_to(store.resolve()):
        return _existing(path, url)
    if not any_url:
        where = f"outside the model store {store}; put the model there" if store else "in no model store; set SERVING_MODEL_STORE"
        raise ConfigError(f"{ORIGIN}: url={url!r} lies {where}, or allow any url with SERVING_ALLOW_ANY_MODEL_URL=true")
    return _existing(path, url) if path else url


def _resolved(url: str, store: Path | None) -> Path:
    try:
        path = (store / url if store else Path(url)).resolve()
        path.is_dir()  # may not like it either
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{ORIGIN}: url={url!r} is no path: {why}") from None
    return path


def _existing(path: Path, url: str) -> str:
    if not path.is_dir():
        raise ConfigError(f"{ORIGIN}: url={url!r} is not a folder")
    return str(path)


def store_of(model_store: str | None) -> Path | None:
    """The folder that models may be registered from; unset: where SageMaker puts them, if that exists."""
    if model_store:
        return Path(model_store)
    return DEFAULT_STORE if DEFAULT_STORE.is_dir() else None
