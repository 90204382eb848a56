"""Where `lmi-dist demo` and `lmi-dist bench` keep the models that they make, and how a folder there is complete or absent."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def default_cache() -> Path:
    """The user's own, the same for every project folder."""
    return Path.home() / ".cache" / "lmi-dist"


def leave(number: int, frame: FrameType | None) -> None:
    """Handler of a signal: end as by sys.exit, so that what was begun is cleared away."""
    sys.exit(128 + number)


def _unfinished(pid: int) -> str:
    return f".unfinished-{pid}-"


def clear_unfinished(folder: Path, pid: int) -> None:
    """Remove what a process that was killed has begun of `folder`."""
    for begun in folder.parent.glob(f"{_unfinished(pid)}*"):
        shutil.rmtree(begun, ignore_errors=True)


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` when the block ends well and vanishes when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=_unfinished(os.getpid()), dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
