"""SERVING_LOAD_MODELS' words, model stores and engines."""

from pathlib import Path

import pytest
from lmi_dist_handler.load_models import (
    Entry,
    absolute,
    canonical_engine,
    entries,
    hub_entry,
    parse_entries,
    parse_entry,
    store_entries,
)
from lmi_dist_handler.words import Word

from lmi_dist import ConfigError


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/m", ("", "", "", "/m")),
        ("test::MPI=/m", ("test", "", "MPI", "/m")),
        ("test:v2:Python:*=/m", ("test", "v2", "Python", "/m")),
        ("[test]=/m", ("test", "", "", "/m")),
        ("[test:1.0]=file:///m", ("test", "1.0", "", "/m")),
        ("x::DeepSpeed=s3://b/m", ("x", "", "MPI", "s3://b/m")),
    ],
)
def test_element_is_split(word: str, expected: tuple[str, ...]) -> None:
    entry = parse_entry(word, "SERVING_LOAD_MODELS")

    assert (entry.name, entry.version, entry.engine, entry.url) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a:b:c:d:e=/m", "must look like"),
        ("a/b=/m", "name='a/b' must be at most 128 letters, digits, dots, dashes and underscores"),
        ("a:1 2=/m", "version='1 2' must be"),
        ("a::PyTorch=/m", "engine='PyTorch' is not one of ours"),
        ("a:::1;2=/m", "devices='1;2' is known but not built yet"),
        ("a=djl://x/y", "is known but not built yet; give a folder"),
        ("a=https://x/y", "is known but not built yet"),
        ("a=/m/model.tar.gz", "is an archive; unpack it"),
    ],
)
def test_element_is_refused_by_name(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_entry(word, "SERVING_LOAD_MODELS")


def test_list_is_cut_at_commas_and_blanks() -> None:
    assert [entry.url for entry in parse_entries("a=/x, /y  b=/z", "", "")] == ["/x", "/y", "/z"]


def test_none_loads_nothing(tmp_path: Path) -> None:
    assert parse_entries("NONE", str(tmp_path), "") == []


def test_store_of_folders_is_one_model_each(tmp_path: Path) -> None:
    for name in ("a", "b", ".hidden"):
        (tmp_path / name).mkdir()

    assert [entry.model_name for entry in parse_entries("ALL", str(tmp_path), "")] == ["a", "b"]


def test_store_with_files_is_one_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()

    assert [entry.url for entry in store_entries(str(tmp_path))] == [str(tmp_path)]


def test_missing_store_is_named() -> None:
    with pytest.raises(ConfigError, match="model_store='/no/such' cannot be read: No such file"):
        store_entries("/no/such")


def test_name_is_the_last_of_the_path() -> None:
    assert Entry("/opt/ml/model/", "").model_name == "model"
    assert Entry("", "").model_name == "model"


@pytest.mark.parametrize(("name", "engine"), [("MPI", "MPI"), ("python", "Python"), ("DeepSpeed", "MPI")])
def test_engine_names_are_ours(name: str, engine: str) -> None:
    assert canonical_engine(name, "here") == engine


@pytest.mark.parametrize("name", ["org/name", "~0/model", "~0", "d" * 5000, "s3://bucket/prefix"])
def test_model_that_is_no_folder_stays_as_it_is(tmp_path: Path, name: str) -> None:
    word = Word(name, "serving.properties:1", "option.model_id")

    assert absolute(word, tmp_path) == word
    assert Entry(name, "SERVING_LOAD_MODELS").folder is None
    assert hub_entry(name).model_id == name


def test_model_dir_that_is_no_folder_is_named() -> None:
    with pytest.raises(ConfigError, match=r"MODEL_DIR='ddd.*' is not a folder"):
        entries(None, {"MODEL_DIR": Word("d" * 5000, "environment", "MODEL_DIR")}, {})
