"""A model comes from a folder, the hub or s3; only what is needed is fetched, and only once."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fake_hub
import huggingface_hub.constants as hub
import pytest
from moto import mock_aws

from lmi_dist.errors import CheckpointError, ConfigError
from lmi_dist.fetch import Progress, fetch

CONFIG = {"config.json": b"{}", "tokenizer.json": b"{}", "tokenizer.model": b"t", "chat_template.jinja": b"c"}
SAFETENSORS = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"22"}
PICKLES = {"pytorch_model.bin": b"p"}
OTHERS = {"README.md": b"r", "modeling.py": b"boom", "onnx/config.json": b"{}", "original/consolidated.safetensors": b"o"}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


# ---- folder ----


def test_folder_is_itself(tmp_path: Path) -> None:
    assert fetch(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["/no/such/folder", "./none", "~/none/at/all", "~0/model", "a/b/c", "/" + "d" * 5000])
def test_missing_folder_is_named(model: str) -> None:
    with pytest.raises(CheckpointError, match=f"model={model} is not a folder"):
        fetch(model)


def test_file_in_place_of_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(CheckpointError, match="is not a folder"):
        fetch(str(tmp_path / "config.json"))


# ---- hub ----


def at_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    monkeypatch.setattr(hub, "ENDPOINT", address)
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))


def test_hub_gives_safetensors_and_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub.serve({**CONFIG, **SAFETENSORS, **PICKLES, **OTHERS}) as (address, _):
        at_hub(monkeypatch, address, tmp_path)

        assert names(fetch(fake_hub.REPOSITORY)) == {*CONFIG, *SAFETENSORS}


def test_hub_gives_pickles_where_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub.serve({**CONFIG, **PICKLES, **OTHERS}) as (address, _):
        at_hub(monkeypatch, address, tmp_path)

        assert names(fetch(fake_hub.REPOSITORY)) == {*CONFIG, *PICKLES}


def test_second_fetch_from_hub_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub.serve({**CONFIG, **SAFETENSORS}) as (address, asked):
        at_hub(monkeypatch, address, tmp_path)
        fetch(fake_hub.REPOSITORY, fake_hub.COMMIT)
        asked.clear()

        fetch(fake_hub.REPOSITORY, fake_hub.COMMIT)

        assert not [path for path in asked if "/resolve/" in path]


@pytest.mark.parametrize(("model", "revision"), [("org/none", None), (fake_hub.REPOSITORY, "no-such-branch")])
def test_unknown_model_of_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, revision: str | None) -> None:
    with fake_hub.serve(CONFIG) as (address, _):
        at_hub(monkeypatch, address, tmp_path)

        with pytest.raises(CheckpointError, match=f"model={model} revision={revision or 'main'} is not a folder and cannot"):
            fetch(model, revision)


def test_dead_hub_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub.serve({}) as (address, _):
        pass
    at_hub(monkeypatch, address, tmp_path)

    with pytest.raises(CheckpointError, match="cannot be had from the hub"):
        fetch(fake_hub.REPOSITORY)


# ---- s3 ----


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        made = boto3.resource("s3").Bucket("models")
        made.create()
        yield made


def put(bucket: Any, files: dict[str, bytes], prefix: str = "a/b/") -> None:
    for name, body in files.items():
        bucket.put_object(Key=prefix + name, Body=body)


@pytest.mark.parametrize(
    ("weights", "taken"), [({**SAFETENSORS, **PICKLES}, SAFETENSORS), (PICKLES, PICKLES)], ids=["safetensors", "bin"]
)
def test_s3_gives_what_is_needed(tmp_path: Path, bucket: Any, weights: dict[str, bytes], taken: dict[str, bytes]) -> None:
    put(bucket, {**CONFIG, **weights, **OTHERS})

    folder = fetch("s3://models/a/b/", cache=tmp_path)

    assert names(folder) == {*CONFIG, *taken}
    assert all((folder / name).read_bytes() == body for name, body in taken.items())


def test_s3_bucket_itself_may_be_the_model(tmp_path: Path, bucket: Any) -> None:
    put(bucket, {**CONFIG, **SAFETENSORS}, prefix="")

    assert names(fetch("s3://models", cache=tmp_path)) == {*CONFIG, *SAFETENSORS}


def test_complete_copy_of_s3_is_reused(tmp_path: Path, bucket: Any) -> None:
    put(bucket, {**CONFIG, **SAFETENSORS})
    folder = fetch("s3://models/a/b", cache=tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    fetch("s3://models/a/b", cache=tmp_path)

    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_changed_and_truncated_files_of_s3_are_fetched_again(tmp_path: Path, bucket: Any) -> None:
    put(bucket, {**CONFIG, **SAFETENSORS})
    folder = fetch("s3://models/a/b", cache=tmp_path)
    put(bucket, {"config.json": b"[]"})
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"2")

    fetch("s3://models/a/b", cache=tmp_path)

    assert (folder / "config.json").read_bytes() == b"[]"
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == b"22"


@pytest.mark.parametrize("url", ["s3://models/nothing/here", "s3://no-such-bucket/a", "s3://"])
def test_nothing_at_s3_is_told(tmp_path: Path, bucket: Any, url: str) -> None:
    with pytest.raises(CheckpointError, match=f"model={url} "):
        fetch(url, cache=tmp_path)


def test_s3_without_boto3_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)

    with pytest.raises(ConfigError, match=r"pip install lmi-dist\[s3\]"):
        fetch("s3://models/a", cache=tmp_path)


# ---- progress ----


def test_progress_logs_now_and_then_off_a_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    clock = iter(range(1000))  # one second a look
    monkeypatch.setattr("lmi_dist.fetch.time.monotonic", lambda: float(next(clock)))

    with Progress("loading", 1000) as progress:
        for _ in range(10):
            progress.advance(100)

    assert [line.partition(" of ")[0] for line in caplog.messages] == [f"loading: {share} %" for share in (20, 40, 60, 80, 100)]


def test_short_work_logs_no_progress(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    with Progress("loading", 1000) as progress:
        for _ in range(100):
            progress.advance(10)

    assert caplog.messages == []


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    with Progress("loading", 1000) as progress:
        progress.advance(1000)

    assert "100%" in capsys.readouterr().err
