"""What becomes of an operator's words by the table of options: known, replaced, not built yet, misspelt; and `max`."""

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lmi_dist import ConfigError
from lmi_dist_handler import gpus
from lmi_dist_handler.options import OPTIONS, Option
from lmi_dist_handler.words import Word

logger = logging.getLogger(__name__)


def settle(words: Mapping[str, Word], *, inside_djl: bool) -> dict[str, Word]:
    """Words by key of a known option that is not a replaced one. Raises ConfigError for what is unknown or not built."""
    settled: dict[str, Word] = {}
    for key, word in words.items():
        option = OPTIONS.get(key)
        if option is None:
            _refuse_unknown(key, word, inside_djl)
        elif option.reader == "replaced":
            settled |= _replaced(option, word, {**words, **settled})
        else:
            _check_built(option, word, inside_djl)
            if option.reader == "ignored" and not inside_djl:  # DJL's own host has dealt with it, and sets some by itself
                logger.warning("%s=%r has no effect: %s", word, word.value, option.about)
            settled[key] = word
    return settled


def _refuse_unknown(key: str, word: Word, inside_djl: bool) -> None:
    near = nearest(key, OPTIONS)
    if word.written.startswith("OPTION_"):
        near = near.replace("option.", "OPTION_").upper()
    if not inside_djl:
        raise ConfigError(unknown(word, near))
    logger.warning("ignored: %s", unknown(word, near))


def unknown(word: Word, near: str, otherwise: str = "serving.properties.example lists all there are") -> str:
    """The sentence that refuses an unknown word; `near` is what may have been meant."""
    return f"{word} is unknown; {f'did you mean {near}?' if near else otherwise}"


def unknown_parameter(word: Word, known: Sequence[str]) -> ConfigError:
    """The same for a parameter of a route that takes `known`."""
    return ConfigError(unknown(word, nearest(word.written, known), f"there are {', '.join(known)}"))


def nearest(key: str, known: Iterable[str]) -> str:
    """The known name that is most alike, or "". `option.` left out or put before a plain key is the likeliest slip."""
    by_lower = {name.lower(): name for name in known}
    likely = [f"option.{key}".lower(), key.removeprefix("option.").lower()]
    close = [name for name in likely if name in by_lower] or difflib.get_close_matches(key.lower(), by_lower, 1, 0.7)
    return by_lower[close[0]] if close else ""


def _replaced(option: Option, word: Word, words: Mapping[str, Word]) -> dict[str, Word]:
    value = option.becomes.get(word.value.lower()) if option.becomes else word.value
    if value is None:
        raise ConfigError(f"{word}={word.value!r} must be one of {', '.join(option.becomes)}")
    logger.warning("%s is deprecated; use %s", word, f"{option.field}={value}" if value else "nothing: it is the default")
    if value and option.field in words:
        raise ConfigError(f"{word} and {words[option.field]} could not both be set; remove the first")
    return {option.field: replace(word, value=value)} if value else {}


def _check_built(option: Option, word: Word, inside_djl: bool) -> None:
    is_open = option.reader == "unbuilt" or (option.reader == "host_unbuilt" and not inside_djl)
    if is_open and word.value.lower() not in [value.lower() for value in option.neutral]:
        raise not_built(word, option.neutral)


def not_built(word: Word, neutral: tuple[str, ...]) -> ConfigError:
    way_out = f" or write {' or '.join(neutral)}" if neutral else ""
    return ConfigError(f"{word}={word.value!r} is known but not built yet; leave it out{way_out}")


def resolve_degree(words: dict[str, Word], environ: Mapping[str, str]) -> dict[str, Word]:
    key = "option.tensor_parallel_degree"
    if key in words and words[key].value.lower() == "max":
        device = words["option.device"].value.lower() if "option.device" in words else "auto"
        takes_gpus = device == "cuda" or (device == "auto" and gpus.can_use_gpus())
        degree = max(1, gpus.num_visible_gpus(environ)) if takes_gpus else 1
        words[key] = replace(words[key], value=str(degree), origin=f"{words[key].origin} (max)")
    return words
