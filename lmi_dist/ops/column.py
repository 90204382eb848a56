"""Which column runs the operations: a library (CPU, CUDA, or for tests the CUDA column's stand-in on a CPU) or torch. Chosen once
for the process; every operation looks here. Chosen apart from a tensor's device, so that tests can run any column on the same
tensors."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import lmi_dist.ops
from lmi_dist.errors import KernelError
from lmi_dist.ops import flash
from lmi_dist.ops.abi import Library, find_library

logger = logging.getLogger(__name__)

DEVICES = {"cpu": "cpu", "cuda": "cuda", "sim": "cpu"}  # of a column's tensors
ON_DEVICE = ("cuda", "sim")  # columns for a GPU, of which one is tested on a CPU
MULTIPLIES_TO_FP32 = "dtype" in torch.ops.aten.mm.overloads()  # bf16 and fp16, on a GPU


@dataclass(frozen=True)
class Column:
    """library: None for torch. description: for people. takes_torchs_product: for dense linears, whose weights stay row-major.
    takes_flash_attn: for prompts."""

    name: str
    library: Library | None
    num_threads: int
    description: str
    takes_torchs_product: bool = False
    takes_flash_attn: bool = False


_chosen: Column | None = None
_libraries: dict[Path, Library] = {}  # opened once for the process: the loader keeps a library anyway


def select(
    column: str = "auto",
    num_threads: int | None = None,
    *,
    path: Path | None = None,
    batch_invariant: bool = True,
    flash_attn: bool = False,
) -> str:
    """Take a column for all operations from now on, with num_threads (None: as many as this process may use CPUs).

    column: "auto" (the CPU library if it is built, else torch), "cpu", "cuda", "torch", or "sim" for tests. path: that library
    instead of the installed one. batch_invariant: False lets a column for a GPU take torch's product (cuBLAS) for dense linears,
    which sums in another order for another number of rows. flash_attn: such a column leaves prompts to flash-attn. Returns and logs
    what was taken. Raises KernelError when a library is asked for that is not there, cannot be opened, or does not run on this
    machine, or if flash-attn is not there."""
    global _chosen
    opened = _open(column, num_threads or len(os.sched_getaffinity(0)), path)
    if opened.name in ON_DEVICE:
        opened = _with_product(opened, batch_invariant=batch_invariant)
        opened = _with_flash_attn(opened) if flash_attn else opened
    _chosen = opened
    logger.info("kernels: %s", _chosen.description)
    return _chosen.description


def describe() -> str:
    """What `select` took, such as "cpu avx512 (base avx2 avx512), 2 threads" or "torch (library not built)"."""
    return chosen().description


def chosen() -> Column:
    """The column in use; "auto" is taken if nothing was selected."""
    if _chosen is None:
        select()
    assert _chosen is not None  # select sets it
    return _chosen


def library() -> Library | None:
    """The library that runs the operations; None: torch does."""
    return (_chosen or chosen()).library


def cuda_architectures() -> tuple[str, ...]:
    """What the CUDA library was built for, as CMake names it: 80-real, 90a-real, ... Raises KernelError if there is none."""
    path = find_library(list(lmi_dist.ops.__path__), "liblmi_cuda.so")
    if path is None:
        raise KernelError("liblmi_cuda.so is not built; install the package where there is nvcc, with LMI_CUDA=ON")
    opened = _libraries.get(path) or _libraries.setdefault(path, Library(path, DEVICES["cuda"]))
    return tuple(opened.describe().rpartition("(")[2].rstrip(")").split())


def cpu_library() -> Library:
    """The CPU library, whichever column runs the operations. Raises KernelError if it is not built."""
    path = find_library(list(lmi_dist.ops.__path__))
    if path is None:
        raise KernelError("liblmi_cpu.so is not built, and without it ranks cannot share a model; install the package")
    return _libraries.get(path) or _libraries.setdefault(path, Library(path))


@contextmanager
def using(
    column: str,
    num_threads: int | None = None,
    *,
    path: Path | None = None,
    level: str = "best",
    batch_invariant: bool = True,
    flash_attn: bool = False,
) -> Iterator[Library | None]:
    """For tests: another column, number of threads, instruction level and choices within a `with`. Gives its library."""
    global _chosen
    before, torch_threads = chosen(), torch.get_num_threads()
    select(column, num_threads, path=path, batch_invariant=batch_invariant, flash_attn=flash_attn)
    opened = library()
    if opened is not None:
        opened.set_level(level)
    try:
        yield opened
    finally:
        if opened is not None:
            opened.set_level("best")
        if before.library is not None:
            before.library.set_threads(before.num_threads)
        torch.set_num_threads(torch_threads)
        _chosen = before


def _open(column: str, num_threads: int, path: Path | None) -> Column:
    if column not in ("auto", "torch", *DEVICES):
        raise KernelError(f"column={column!r} must be auto, torch, {', '.join(DEVICES)}")
    name = "cpu" if column in ("auto", "torch") else column
    path = path or find_library(list(lmi_dist.ops.__path__), f"liblmi_{name}.so")
    if column == "torch" or (column == "auto" and path is None):
        torch.set_num_threads(num_threads)
        return Column("torch", None, num_threads, f"torch{'' if path else ' (library not built)'}, {num_threads} threads")
    if path is None:
        raise KernelError(f"kernels={name} needs liblmi_{name}.so, which is not built; install the package{_ways_out(name)}")
    opened = _libraries.get(path) or _libraries.setdefault(path, Library(path, DEVICES[name]))
    opened.set_level("best")
    opened.set_threads(num_threads)
    torch.set_num_threads(1)  # what is left to torch is small, and its waiting threads would take the library's CPUs
    return Column(name, opened, num_threads, f"{opened.describe()}, {num_threads} threads")


def _with_product(column: Column, *, batch_invariant: bool) -> Column:
    """Which product its dense linears take, and why."""
    obstacle = "batch_invariant=true" if batch_invariant else _torch_obstacle()
    product = f"our kernels, {obstacle}" if obstacle else "torch's product, cuBLAS on a GPU"
    return replace(column, description=f"{column.description}; dense linears: {product}", takes_torchs_product=not obstacle)


def _with_flash_attn(column: Column) -> Column:
    flash.varlen_function()
    version = getattr(sys.modules["flash_attn"], "__version__", "")
    return replace(column, description=f"{column.description}; prompts: flash-attn {version}", takes_flash_attn=True)


def _torch_obstacle() -> str:
    """Logits are wanted in fp32: in bf16 there would be ties."""
    return "" if MULTIPLIES_TO_FP32 else f"since torch {torch.__version__} multiplies bf16 to no fp32 (2.8 does)"


def _ways_out(name: str) -> str:
    return " where there is nvcc, or use cpu" if name == "cuda" else ", or use torch"
