"""Where a model comes from: a folder, the Hugging Face hub or s3://; and how long work on its bytes is shown.

First stage of loading; what it returns is always a local folder, which weights.py and config.py read.
"""

import logging
import os
import re
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from lmi_dist.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

CONFIG_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
SAFETENSORS_PATTERNS = ("*.safetensors",)
PICKLE_PATTERNS = ("*.bin", "*.pt")
LINE_INTERVAL_S = 2.0
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CACHE = Path.home() / ".cache" / "lmi-dist" / "s3"


class Progress:
    """Shows how many of `total` bytes are done: a bar on a terminal, elsewhere log lines, of which what is done within
    LINE_INTERVAL_S has none."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, max(total, 1), 0
        self.next_line = time.monotonic() + LINE_INTERVAL_S
        self.bar = tqdm(total=total, desc=label, unit="B", unit_scale=True) if sys.stderr.isatty() else None

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes
        if self.bar is not None:
            self.bar.update(num_bytes)
        elif time.monotonic() >= self.next_line:
            self.next_line += LINE_INTERVAL_S
            logger.info("%s: %d %% of %.2f GB", self.label, 100 * self.done // self.total, self.total / 1e9)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()


def fetch(model: str, revision: str | None = None, *, cache: Path = CACHE) -> Path:
    """The local folder of `model`: itself, a snapshot of the hub, or a copy of s3://bucket/prefix below `cache`.
    Raises CheckpointError when there is no such model, ConfigError when a part needed to fetch it is not installed."""
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):  # pathlib would raise on an unknown ~user, and on a long name
        return folder
    if model.startswith("s3://"):
        return _fetch_s3(model, cache)
    if not HUB_ID.fullmatch(model) or os.path.exists(folder):
        raise CheckpointError(f"model={model} is not a folder; give a folder, a hub id like org/name, or s3://bucket/prefix")
    return _fetch_hub(model, revision)


# ---- the hub ----


def _fetch_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = _snapshot(model, revision, [*CONFIG_PATTERNS, *SAFETENSORS_PATTERNS])
        if not any(folder.glob("*.safetensors")):
            folder = _snapshot(model, revision, [*CONFIG_PATTERNS, *PICKLE_PATTERNS])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        place = f"model={model} revision={revision or 'main'}"
        raise CheckpointError(f"{place} is not a folder and cannot be had from the hub: {error}") from error
    return folder


def _snapshot(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    # patterns match across slashes: without the second line, other formats in sub-folders would come along
    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))


# ---- s3 ----


@dataclass(frozen=True, slots=True)
class _Object:
    key: str
    size_bytes: int
    etag: str

    @property
    def name(self) -> str:
        return self.key.rsplit("/", 1)[-1]


def _fetch_s3(url: str, cache: Path) -> Path:
    """Copy the wanted objects below `url` into a folder of `cache`. A file that is there under the same ETag is kept, so that
    an interrupted copy goes on and a complete one costs one listing."""
    client, failures = _s3_client()
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    folder = cache / bucket / prefix
    try:
        wanted = _wanted(_list_objects(client, bucket, f"{prefix}/" if prefix else ""))
        if not wanted:
            raise CheckpointError(f"model={url} holds no model files; give the prefix under which config.json lies")
        _copy(client, bucket, wanted, folder)
    except failures as error:
        raise CheckpointError(f"model={url} cannot be fetched: {error}") from error
    return folder


def _s3_client() -> tuple[Any, tuple[type[Exception], ...]]:
    """boto3's client and the errors that it raises."""
    try:
        import boto3  # type: ignore[import-untyped]
        from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError("model=s3://... needs boto3, which is not installed; pip install lmi-dist[s3]") from None
    return boto3.client("s3"), (Boto3Error, BotoCoreError, ClientError)


def _list_objects(client: Any, bucket: str, prefix: str) -> list[_Object]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
    return [_Object(item["Key"], item["Size"], item["ETag"]) for page in pages for item in page.get("Contents", ())]


def _wanted(objects: list[_Object]) -> list[_Object]:
    """Configuration, tokenizer and weights; pickles only where there are no safetensors."""
    weights = [item for item in objects if _matches(item.name, SAFETENSORS_PATTERNS)]
    weights = weights or [item for item in objects if _matches(item.name, PICKLE_PATTERNS)]
    return [item for item in objects if _matches(item.name, CONFIG_PATTERNS)] + weights


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _copy(client: Any, bucket: str, objects: list[_Object], folder: Path) -> None:
    """Fetch what is not there yet; a file appears under its name only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [item for item in objects if not _is_here(item, folder)]
    with Progress(f"fetching s3://{bucket}", sum(item.size_bytes for item in missing)) as progress:
        for item in missing:
            part = folder / f".{item.name}.part"
            client.download_file(bucket, item.key, str(part), Callback=progress.advance)
            part.replace(folder / item.name)
            _etag_file(item, folder).write_text(item.etag, encoding="utf-8")


def _is_here(item: _Object, folder: Path) -> bool:
    file, etag = folder / item.name, _etag_file(item, folder)
    return (
        file.exists() and file.stat().st_size == item.size_bytes and etag.exists() and etag.read_text(encoding="utf-8") == item.etag
    )


def _etag_file(item: _Object, folder: Path) -> Path:
    return folder / f".{item.name}.etag"
