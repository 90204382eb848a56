"""What an operator says to the server rather than to a model: config.properties, SERVING_*, the command line."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from lmi_dist import ConfigError
from lmi_dist_handler.options import OPTIONS, SERVER_FIELDS, SERVER_IGNORED, SERVER_UNBUILT
from lmi_dist_handler.settle import nearest, not_built, unknown
from lmi_dist_handler.words import Word, file_words

logger = logging.getLogger(__name__)

FOR_MODELS = ("job_queue_size", "reserved_memory_mb")  # of every model that says nothing else
SERVER_KEYS = {*SERVER_FIELDS, *FOR_MODELS, "inference_address", "load_models"}
KNOWN_SERVER_KEYS = SERVER_KEYS | set(SERVER_UNBUILT) | SERVER_IGNORED


def server_words(words: Mapping[str, Word], arguments: Mapping[str, str]) -> dict[str, Word]:
    """The server's words by name of the field, those of an address split up."""
    layers = (_config_file_words(words, arguments), _serving_words(words), _server_arguments(arguments))
    found: dict[str, Word] = {}
    for layer in layers:
        if "inference_address" in layer:
            found.update(_address_words(layer["inference_address"]))
        found.update(layer)
    _check_management(found)
    return found


def _config_file_words(words: Mapping[str, Word], arguments: Mapping[str, str]) -> dict[str, Word]:
    home = words["MODEL_SERVER_HOME"].value if "MODEL_SERVER_HOME" in words else ""
    usual = Path(home, "conf/config.properties")
    if "config_file" not in arguments and not (home and usual.exists()):
        return {}
    found = file_words(Path(arguments.get("config_file", usual)))
    for key, word in found.items():
        if key not in KNOWN_SERVER_KEYS:
            raise ConfigError(unknown(word, nearest(key, KNOWN_SERVER_KEYS)))
    return _built_server_words(found)


def _serving_words(words: Mapping[str, Word]) -> dict[str, Word]:
    """SERVING_*. An unknown one only warns: in a cluster a service called `serving` puts some there."""
    found = {name.removeprefix("SERVING_").lower(): word for name, word in words.items() if name.startswith("SERVING_")}
    for key in [key for key in found if key not in KNOWN_SERVER_KEYS]:
        near = nearest(key, KNOWN_SERVER_KEYS)
        logger.warning("ignored: %s", unknown(found.pop(key), near and f"SERVING_{near.upper()}"))
    return _built_server_words(found)


def _server_arguments(arguments: Mapping[str, str]) -> dict[str, Word]:
    found = {key: Word(value, "command line", key) for key, value in arguments.items() if key in KNOWN_SERVER_KEYS}
    known = KNOWN_SERVER_KEYS | set(OPTIONS) | {"config_file"}
    for key, value in arguments.items():
        if key not in known and not key.startswith("option."):
            raise ConfigError(unknown(Word(value, "command line", key), nearest(key, known)))
    return _built_server_words(found)


def _built_server_words(found: Mapping[str, Word]) -> dict[str, Word]:
    """Without words that have no effect; ConfigError for one that would need what is not built."""
    for key, neutral in SERVER_UNBUILT.items():
        if key in found and key != "management_address" and found[key].value not in neutral:
            raise not_built(found[key], neutral)
    return {key: word for key, word in found.items() if key in SERVER_KEYS or key == "management_address"}


def _address_words(word: Word) -> dict[str, Word]:
    try:
        address = urlsplit(word.value)
        host, port = address.hostname, address.port
    except ValueError:
        host, port = None, None
    if not host or urlsplit(word.value).scheme != "http":
        raise ConfigError(f"{word}={word.value!r} must look like http://127.0.0.1:8080")
    return {"host": replace(word, value=host), "port": replace(word, value=str(port or 80))}


def _check_management(words: Mapping[str, Word]) -> None:
    management, inference = words.get("management_address"), words.get("inference_address")
    if management and (inference is None or management.value != inference.value):
        raise ConfigError(f"{management}={management.value!r}: another address than inference_address is known but not built yet")
