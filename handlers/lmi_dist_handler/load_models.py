"""Which models a server is to load: the words of SERVING_LOAD_MODELS, a model store, HF_MODEL_ID or a folder (contract 5.3).

Looks at folders, reads no environment and no serving.properties.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from lmi_dist import ConfigError

ENTRY = re.compile(r"(\[?([^?]+?)]?=)?(.+)")
ENGINES = {"mpi": "MPI", "python": "Python", "deepspeed": "MPI"}
ANY_DEVICE = ("", "*", "0", "-1", "cpu")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".jar", ".war", ".mar")
DEFAULT_STORE = Path("/opt/ml/model")


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
        return path.resolve() if self.url and "://" not in self.url and path.is_dir() else None

    @property
    def model_name(self) -> str:
        """As given, else the last element of the url."""
        return self.name or re.sub(r"[^\w.-]", "_", self.url.rstrip("/").rpartition("/")[2]) or "model"


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
    if Path(model_id).is_dir():
        return Entry(model_id, "HF_MODEL_ID", name)
    return Entry("", "HF_MODEL_ID", name, model_id=check_url(model_id, "HF_MODEL_ID"))


def default_entries() -> list[Entry]:
    """Where SageMaker puts a model, if something lies there."""
    return store_entries(str(DEFAULT_STORE)) if DEFAULT_STORE.is_dir() else []
