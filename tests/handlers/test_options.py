"""The table of options against EngineConfig, and serving.properties.example against both."""

import re
from pathlib import Path
from typing import Any

import pytest
from lmi_dist_handler.options import ENGINE, HANDLER, HOST, OPTIONS, PLAIN_ENGINE, SERVER_FIELDS
from lmi_dist_handler.settings import HandlerConfig, ServerSettings, WorkerConfig
from pydantic import BaseModel

from lmi_dist import EngineConfig

EXAMPLE = (Path(__file__).parents[2] / "serving.properties.example").read_text(encoding="ascii").splitlines()
DESCRIBED: list[tuple[str, type[BaseModel], str]] = [
    *((f"option.{name}", EngineConfig, field) for name, field in ENGINE.items()),
    *((f"option.{name}", HandlerConfig, name) for name in HANDLER),
    *((key, EngineConfig, key) for key in PLAIN_ENGINE),
    *((key, WorkerConfig, field) for key, field in HOST.items() if key != "engine"),
    *((f"SERVING_{name.upper()}", ServerSettings, name) for name in SERVER_FIELDS),
]


def example_of(key: str) -> tuple[str, str]:
    """The comment above the last line that shows `key`, and its value there."""
    place = max(i for i, line in enumerate(EXAMPLE) if line.startswith(f"#{key}="))
    return EXAMPLE[place - 1], EXAMPLE[place].partition("=")[2]


def told(value: Any) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_every_engine_field_has_an_option() -> None:
    assert sorted((*ENGINE.values(), *PLAIN_ENGINE)) == sorted(EngineConfig.model_fields)


def test_every_handler_field_has_an_option() -> None:
    assert {*HANDLER, "engine", "model_name", "dialect"} == set(HandlerConfig.model_fields)


def test_every_server_and_worker_field_has_a_word() -> None:
    assert {*SERVER_FIELDS, "origin"} == set(ServerSettings.model_fields)
    assert {*HOST.values()} == {*WorkerConfig.model_fields, "engine"}


def test_example_shows_exactly_the_table() -> None:
    shown = {match[1] for line in EXAMPLE if (match := re.match(r"#([\w.]+)=", line)) and not match[1].startswith("SERVING_")}

    assert shown == set(OPTIONS)


@pytest.mark.parametrize(("key", "owner", "field"), DESCRIBED, ids=[key for key, _, _ in DESCRIBED])
def test_example_tells_meaning_and_default(key: str, owner: type[BaseModel], field: str) -> None:
    info = owner.model_fields[field]
    default = "none, must be given" if info.is_required() else told(info.default)

    comment, value = example_of(key)

    assert comment == f"# {info.description} (default: {default})"
    assert value == default or default in ("unset", "none, must be given")


@pytest.mark.parametrize("option", [row for row in OPTIONS.values() if row.about], ids=lambda row: row.key)
def test_example_says_why_a_word_does_little(option: Any) -> None:
    comment, value = example_of(option.key)

    assert comment == f"# {option.about}" + (f"; use {option.field}" if option.reader == "replaced" else "")
    assert option.reader in ("replaced", "ignored") or value == " | ".join(option.neutral)


def test_example_as_it_stands_sets_nothing() -> None:
    assert all(line.startswith("#") or not line for line in EXAMPLE)
