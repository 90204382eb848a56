"""Which models a server is to load: the words of SERVING_LOAD_MODELS, a model store, HF_MODEL_ID or a folder (contract 5.3).

Looks at folders, reads no environment and no serving.properties.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lmi_dist import ConfigError
from lmi_dist_handler.words import Word

ENTRY = re.compile(r"(\[?([^?]+?)]?=)?(.+)")
ENGINES = {"mpi": "MPI", "python": "Python", "deepspeed": "MPI"}
ANY_DEVICE = ("", "*", "0", "-1", "cpu")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".jar", ".war", ".mar")
DEFAULT_STORE = Path("/opt/ml/model")
NAME = re.compile(r"[\w.-]{0,128}")
THREE_WAYS = "set OPTION_MODEL_ID to a folder or hub id, or MODEL_DIR to a folder with serving.properties, or SERVING_LOAD_MODELS"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model to load. `url` is a folder or an s3:// url of a checkpoint; `model_id` stands before any other."""

    url: str
    origin: str
    name: str = ""
    version: str = ""
    engine: str = ""
    model_id: str = ""

    @property
    def folder(self) -> Path | None:
        """The model's folder; None where there is none: a url, or a folder that does not exist."""
        path = Path(self.url)
        return path.resolve() if self.url and "://" not in self.url and os.path.isdir(path) else None

    @property
    def model_name(self) -> str:
        """As given, else the last element of the url."""
        return self.name or re.sub(r"[^\w.-]", "_", self.url.rstrip("/").rpartition("/")[2]) or "model"


def entries(model_dir: Path | None, words: Mapping[str, Word], server: Mapping[str, Word]) -> list[Entry]:
    """What to load, by the first of: a folder on the command line, MODEL_DIR, load_models, model_store, SageMaker's folder; then
    HF_MODEL_ID's model. None of them: OPTION_MODEL_ID's. Empty only where a list or a store says so."""
    named = model_dir or ("MODEL_DIR" in words and Path(words["MODEL_DIR"].value))
    if named:
        if not os.path.isdir(named):
            raise ConfigError(f"{'--model-dir' if model_dir else 'MODEL_DIR'}={str(named)!r} is not a folder")
        return [Entry(str(named.resolve()), "--model-dir" if model_dir else "MODEL_DIR")]
    found = _listed_entries(server) + ([hub_entry(words["HF_MODEL_ID"].value)] if "HF_MODEL_ID" in words else [])
    is_told = "load_models" in server or "model_store" in server
    return found if found or is_told else [Entry("", "")]


def _listed_entries(server: Mapping[str, Word]) -> list[Entry]:
    store = server["model_store"].value if "model_store" in server else ""
    if "load_models" in server:
        text = server["load_models"]
        return parse_entries(text.value, store or str(DEFAULT_STORE), text.origin)
    return parse_entries("ALL", store, "model_store") if store else default_entries()


def folder_as_model(entry: Entry) -> Word:
    """The model's folder, or the s3:// url given for it, is the checkpoint itself. ConfigError if it cannot be."""
    if entry.url.startswith("s3://"):
        return Word(entry.url, entry.origin, "option.model_id")
    if entry.folder and (entry.folder / "config.json").exists():
        return Word(str(entry.folder), entry.origin, "option.model_id")
    if entry.folder:
        raise ConfigError(f"{entry.folder} holds neither option.model_id in a serving.properties nor a config.json; {THREE_WAYS}")
    missing = f"{entry.origin}: {entry.url!r} is not a folder and option.model_id is not set" if entry.url else "no model was given"
    raise ConfigError(f"{missing}; {THREE_WAYS}")


def check_own_checkpoint(entry: Entry, for_all: Word | None) -> None:
    """One of several models must not lose its own checkpoint to an option.model_id that was meant for all. Raises ConfigError."""
    if for_all and entry.folder and (entry.folder / "config.json").exists():
        raise ConfigError(
            f"{for_all}={for_all.value!r} would take the place of the checkpoint in {entry.folder}; leave it out, "
            f"or write option.model_id into the serving.properties of each model"
        )


def absolute(word: Word, folder: Path | None) -> Word:
    """A relative path made absolute, against the model's folder, else the current one: workers start in another folder. Looked for
    without pathlib, which raises on an unknown ~user and on a long name."""
    for path in ([folder / word.value] if folder else []) + [Path(os.path.expanduser(word.value))]:
        if "://" not in word.value and os.path.isdir(path):
            return replace(word, value=str(path.resolve()))
    return word


def check_name(name: str, origin: str) -> str:
    """A model's name or version, which routes, logs and metrics can carry; may be empty."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{origin}={name!r} must be at most 128 letters, digits, dots, dashes and underscores")
    return name


def canonical_engine(name: str, origin: str) -> str:
    """`MPI` or `Python`; ConfigError for an engine that is not ours."""
    engine = ENGINES.get(name.lower())
    if engine is None:
        raise ConfigError(f"{origin}: engine={name!r} is not one of ours; use MPI or Python")
    return engine


def parse_entries(text: str, store: str, origin: str) -> list[Entry]:
    """Entries of `ALL`, `NONE` or a list at commas and blanks of `[name[:version[:engine[:devices]]]=]url`."""
    if text.strip().upper() == "NONE":
        return []
    if text.strip().upper() == "ALL":
        return store_entries(store) if store else []
    return [parse_entry(word, origin) for word in re.split(r"[,\s]+", text) if word]


def parse_entry(word: str, origin: str) -> Entry:
    """One element. Raises ConfigError for a form, an engine or devices that we do not have."""
    match = ENTRY.fullmatch(word)
    fields = (match.group(2) or "").split(":") if match else []
    if match is None or len(fields) > 4:
        raise ConfigError(f"{origin}: {word!r} must look like [name[:version[:engine[:devices]]]=]folder")
    name, version, engine, devices = (*fields, "", "", "", "")[:4]
    check_name(name, f"{origin}: name")
    check_name(version, f"{origin}: version")
    if any(device not in ANY_DEVICE for device in devices.split(";")):
        raise ConfigError(f"{origin}: devices={devices!r} is known but not built yet; leave it out")
    engine = canonical_engine(engine, origin) if engine else ""
    return Entry(check_url(match.group(3), origin), origin, name, version, engine)


def check_url(url: str, origin: str) -> str:
    """A folder's path or an s3:// url; ConfigError for anything that would have to be fetched or unpacked first."""
    url = url.removeprefix("file://")
    if "://" in url and not url.startswith("s3://"):
        raise ConfigError(f"{origin}: {url!r} is known but not built yet; give a folder, or a hub id as option.model_id")
    if url.endswith(ARCHIVES):
        raise ConfigError(f"{origin}: {url!r} is an archive; unpack it and give the folder")
    return url


def store_entries(store: str) -> list[Entry]:
    """A store of folders is one model each; a store with plain files in it is one model itself."""
    try:
        children = sorted(path for path in Path(store).iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"model_store={store!r} cannot be read: {error.strerror}") from None
    if all(path.is_dir() or path.name.endswith(ARCHIVES) for path in children):
        return [Entry(check_url(str(path), "model_store"), "model_store") for path in children]
    return [Entry(store, "model_store")]


def hub_entry(model_id: str) -> Entry:
    """The model that HF_MODEL_ID adds: a hub id, an s3:// url or a folder."""
    name = re.sub(r"\W", "_", model_id)
    if os.path.isdir(model_id):
        return Entry(model_id, "HF_MODEL_ID", name)
    return Entry("", "HF_MODEL_ID", name, model_id=check_url(model_id, "HF_MODEL_ID"))


def default_entries() -> list[Entry]:
    """Where SageMaker puts a model, if something lies there."""
    return store_entries(str(DEFAULT_STORE)) if DEFAULT_STORE.is_dir() else []
