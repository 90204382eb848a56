"""A checkpoint's tensors by name: their shapes without reading them, and this rank's slices, mapped piece by piece.

Pages of a mapped file count as this process' memory while the mapping lives. So every piece is at most PIECE_BYTES of a mapping
of its own that dies with it, and the peak of loading is what has been packed so far plus one piece.
"""

import json
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lmi_dist.errors import CheckpointError
from lmi_dist.fetch import Progress, fetch
from lmi_dist.link import Link
from lmi_dist.parallel import Ranks

__all__ = ["WHOLE", "Checkpoint", "Inventory", "Progress", "Renamed", "TensorInfo", "Weights", "fetch"]

PIECE_BYTES = 8 << 20  # large against the cost of opening a file, small against any model
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NOT_WEIGHTS = re.compile(r"(consolidated.*|adapter_model.*|training_args|optimizer|scheduler|scaler|rng_state.*)\.\w+")
SHARD = re.compile(r".*-(\d+)-of-(\d+)\.\w+")
WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def size_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


class Checkpoint:
    """The tensors of a folder: safetensors or torch files, one or many. Raises CheckpointError on missing or corrupt files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: Mapping[str, TensorInfo] = {}
        for file in _files(folder):
            self.tensors = {**self.tensors, **_contents(file)}
        self._pickle: _OpenPickle | None = None

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.tensors.values())

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> torch.Tensor:
        """A tensor, or its rows [rows] and, if it has two dimensions, columns [columns]; mapped from the file, not to be
        written. Its pages are given back when it dies. Raises CheckpointError."""
        info = self.tensors[name]
        with _told(info.file):
            if info.file.suffix == ".safetensors":
                with safe_open(info.file, "pt") as file:
                    return _cut(file.get_slice(name), len(info.shape), rows, columns)
            return _cut(self._open_pickle(info.file).read(name), len(info.shape), rows, columns)

    def _open_pickle(self, file: Path) -> "_OpenPickle":
        budget = max(PIECE_BYTES, self.size_bytes // 32)
        if self._pickle is None or self._pickle.file != file or self._pickle.served_bytes > budget:
            self._pickle = None  # the old mapping goes before the new one comes
            self._pickle = _OpenPickle(file)
        return self._pickle


class _OpenPickle:
    """A torch file whose index takes long to read, so that its mapping serves several tensors; a Checkpoint opens it anew when the
    pages read through it have come to a small share of the model."""

    def __init__(self, file: Path) -> None:
        self.file, self.tensors, self.served_bytes = file, _load_pickle(file), 0

    def read(self, name: str) -> torch.Tensor:
        self.served_bytes += min(self.tensors[name].nbytes, PIECE_BYTES)
        return self.tensors[name]


def _cut(view: Any, dims: int, rows: slice, columns: slice) -> torch.Tensor:
    part: torch.Tensor = view[rows, columns] if dims == 2 else view[rows] if dims else view[...]
    return part


@dataclass(eq=False)
class Weights:
    """What a model is built from: this rank's slices of a checkpoint's tensors, in the dtype of the model. format: a row of quant's
    table. device: where everything comes to lie. advance: is told of the bytes read."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    link: Link
    format: str = "unquantized"
    device: torch.device = field(default=torch.device("cpu"), kw_only=True)
    advance: Callable[[int], None] = field(default=lambda num_bytes: None, kw_only=True)

    def __post_init__(self) -> None:
        self._buffer = torch.empty(0, dtype=self.dtype, device="cpu")

    @property
    def ranks(self) -> Ranks:
        return self.link.ranks

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice = WHOLE) -> torch.Tensor:
        """Rows [rows] of a tensor that must have `shape`, in memory of our own. Raises CheckpointError."""
        out = torch.empty((len(range(shape[0])[rows]), *shape[1:]), dtype=self.dtype, device=self.device)
        for row, piece in self.pieces(name, shape, rows):
            out[row : row + len(piece)] = piece
        return out

    def pieces(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: slice = WHOLE,
        columns: slice = WHOLE,
        *,
        transposed: bool = False,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The same without a copy of the whole: (row of the slice, some rows from there on), ascending. A piece must not be
        written, and is gone when the next one comes. `transposed`: in the file the columns are the rows."""
        info = self.checkpoint.tensors.get(name)
        stored = shape[::-1] if transposed else shape
        if info is None or info.shape != stored:
            raise _mismatch([name] if info is None else [], [] if info is None else [_wrong(name, info, stored)])
        mine = range(shape[0])[rows]
        step = max(1, PIECE_BYTES * shape[0] // max(info.size_bytes, 1))
        for first in range(mine.start, mine.stop, step):
            part = slice(first, min(first + step, mine.stop))
            read = self.checkpoint.read(name, columns, part).T if transposed else self.checkpoint.read(name, part, columns)
            yield first - mine.start, self._placed(read)
            self.advance(info.size_bytes * (part.stop - part.start) // shape[0])

    def number(self, name: str) -> float | None:
        """The value of a tensor of one element; None if there is no such tensor. Raises CheckpointError."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            return None
        if info.num_elements != 1:
            raise _mismatch([], [_wrong(name, info, (1,))])
        return float(self.checkpoint.read(name))

    def _placed(self, piece: torch.Tensor) -> torch.Tensor:
        """On the device, in the model's dtype. To a GPU it goes from pinned memory, which torch uses again once the copy is
        done, and the next piece is read meanwhile."""
        if self.device.type != "cuda":
            return self._converted(piece).to(self.device)
        staged = torch.empty(piece.shape, dtype=self.dtype, device="cpu", pin_memory=True)
        return staged.copy_(piece).to(self.device, non_blocking=True)

    def _converted(self, piece: torch.Tensor) -> torch.Tensor:
        """In the model's dtype, row by row: in one buffer for all, since thousands of short-lived ones would leave the heap full
        of holes."""
        if piece.dtype == self.dtype and piece.stride(-1) == 1:
            return piece
        if piece.numel() > self._buffer.numel():
            self._buffer = torch.empty(piece.numel(), dtype=self.dtype, device="cpu")
        return self._buffer[: piece.numel()].view(piece.shape).copy_(piece)


class Renamed(Weights):
    """A part of a checkpoint for a model that calls it otherwise: what it asks for as `name` is `rename(name)` in the whole."""

    def __init__(self, whole: Weights, rename: Callable[[str], str]) -> None:
        super().__init__(whole.checkpoint, whole.dtype, whole.link, whole.format, device=whole.device)
        self._whole, self._rename = whole, rename

    def has(self, name: str) -> bool:
        return self._whole.has(self._rename(name))

    def pieces(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: slice = WHOLE,
        columns: slice = WHOLE,
        *,
        transposed: bool = False,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        return self._whole.pieces(self._rename(name), shape, rows, columns, transposed=transposed)

    def number(self, name: str) -> float | None:
        return self._whole.number(self._rename(name))


@dataclass(eq=False)
class Inventory(Weights):
    """Weights that read nothing but single numbers. A model built from it, and thrown away, tells all that the checkpoint lacks
    before its weights are loaded: see `verify`. num_bytes: that building the model reads; a tied embedding is read twice."""

    num_bytes: int = field(default=0, init=False)
    _asked: set[str] = field(default_factory=set, init=False)
    _missing: dict[str, None] = field(default_factory=dict, init=False)  # each once, in the order in which they were asked for
    _wrong: dict[str, None] = field(default_factory=dict, init=False)

    def pieces(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: slice = WHOLE,
        columns: slice = WHOLE,
        *,
        transposed: bool = False,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        info = self.checkpoint.tensors.get(name)
        stored = shape[::-1] if transposed else shape
        self._asked.add(name)
        if info is None:
            self._missing[name] = None
        elif info.shape != stored:
            self._wrong[_wrong(name, info, stored)] = None
        else:
            self.num_bytes += info.size_bytes * len(range(shape[0])[rows]) // shape[0]
        return iter(())

    def number(self, name: str) -> float | None:
        self._asked.add(name)
        return super().number(name)

    def verify(self, ignored: Collection[str] = ()) -> None:
        """Raises CheckpointError on missing tensors, wrong shapes and tensors that nobody asked for, except where one of the
        patterns `ignored` matches the end of the name."""
        surplus = [
            name
            for name in self.checkpoint.tensors
            if name not in self._asked and not any(re.search(f"{pattern}$", name) for pattern in ignored)
        ]
        if self._missing or self._wrong or surplus:
            raise _mismatch(self._missing, self._wrong, surplus)


def _wrong(name: str, info: TensorInfo, shape: tuple[int, ...]) -> str:
    return f"{name} has shape {list(info.shape)}, expected {list(shape)}"


def _mismatch(missing: Collection[str], wrong: Collection[str], surplus: Collection[str] = ()) -> CheckpointError:
    kinds = {"missing": missing, "of a wrong shape": wrong, "not part of this architecture": surplus}
    told = [f"{len(found)} {kind} ({_first(found)})" for kind, found in kinds.items() if found]
    return CheckpointError(f"the checkpoint's tensors are not what config.json promises: {'; '.join(told)}")


def _first(names: Collection[str], most: int = 5) -> str:
    return ", ".join(list(names)[:most]) + (", ..." if len(names) > most else "")


# ---- files ----


def _files(folder: Path) -> list[Path]:
    """The files that hold the weights; safetensors first, and an index where there is one."""
    if not folder.is_dir():
        raise CheckpointError(f"model={folder} is not a folder")
    for suffixes in ((".safetensors",), (".bin", ".pt")):
        indexes = [path for suffix in suffixes for path in sorted(folder.glob(f"*{suffix}.index.json"))]
        if indexes:
            return _indexed(indexes[0])
        files = [path for path in sorted(folder.iterdir()) if path.suffix in suffixes and not NOT_WEIGHTS.fullmatch(path.name)]
        if files:
            return _complete(files)
    raise CheckpointError(f"model={folder} holds no weights; expected *.safetensors, or *.bin or *.pt of torch")


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint: {error!r}") from error
    files = [index.parent / Path(name).name for name in names]  # only the name: an index must not point out of its folder
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {len(missing)} of {len(files)} files of {index.name}: {_first(missing)}")
    return files


def _complete(files: list[Path]) -> list[Path]:
    """Raises CheckpointError when the names say -i-of-n and one of the n is not there."""
    shards = [match for match in (SHARD.fullmatch(file.name) for file in files) if match]
    for shard in shards:
        if len(shards) != int(shard[2]):
            raise CheckpointError(f"{files[0].parent} lacks shards: {shard[0]} is one of {int(shard[2])}, found {len(shards)}")
    return files


def _contents(file: Path) -> dict[str, TensorInfo]:
    with _told(file):
        if file.suffix == ".safetensors":
            return _safetensors_contents(file)
        return {name: TensorInfo(file, tuple(x.shape), x.dtype) for name, x in _load_pickle(file).items()}


def _safetensors_contents(file: Path) -> dict[str, TensorInfo]:
    contents = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 not a mapping
            view = opened.get_slice(name)
            if view.get_dtype() not in SAFETENSORS_DTYPES:
                raise CheckpointError(f"{file}: {name} has dtype {view.get_dtype()}, which is not supported")
            contents[name] = TensorInfo(file, tuple(view.get_shape()), SAFETENSORS_DTYPES[view.get_dtype()])
    return contents


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Names to mapped tensors, nothing read yet. weights_only: a checkpoint must not run code."""
    values: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise CheckpointError(f"{file} must hold a dict of tensors by name, as save_pretrained writes it")
    return values


@contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} is corrupt, truncated or not readable: {str(error).splitlines()[0]}") from error
