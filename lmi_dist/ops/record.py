"""A forward recorded while it runs: the argument structs of its calls are kept, and one call into the library runs them again.

The CPU's twin of a CUDA graph. Tensors that the forward makes come from an Arena; one that Python has dropped leaves its place to
the next, in the recording as in each replay. What the forward reads from outside (weights, cache, the step's integers) must stay
where it is. Only our own operations and views can be recorded; anything else that torch is asked for is an obstacle, told by name.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmi_dist.ops import abi, column
from lmi_dist.ops.abi import Library

LINE = 64  # bytes: tensors begin at a multiple of it

Bytes = NDArray[np.uint8]


class Replayable(Protocol):
    """A forward that runs again by one call. `result`: what it gives; a replay of any that shares its memory may overwrite it."""

    result: Tensor

    def replay(self) -> Tensor:
        """Run it on what its inputs hold now. Returns `result`. Raises what the plain forward's failing call would."""


class Recorded(NamedTuple):
    """A forward's result, good until the next one, and how to run it again; else what stands against that."""

    result: Tensor
    recording: Replayable | None
    obstacle: str


class Arena:
    """Memory for what recorded forwards make: one for all of a model's, since no two run at the same time."""

    def __init__(self, max_rows: int) -> None:
        """max_rows: of the largest forward to be recorded. A smaller one's tensors get places that would do for it, so that all
        recordings together take no more memory than one."""
        self.max_rows = max_rows
        self._pieces: list[Bytes] = []
        self._free: list[Bytes] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype, num_rows: int) -> Tensor:
        """A tensor for a forward of num_rows rows, its contents undefined. Its place is free again when its last view is gone."""
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        piece = self._take_piece(-(-num_bytes * self.max_rows // num_rows))
        memory = piece[:num_bytes]
        weakref.finalize(memory, self._free.append, piece).atexit = False
        return torch.from_numpy(memory).view(dtype).view(tuple(shape))

    def record(self, forward: Callable[[], Tensor], num_rows: int) -> Recorded:
        """Run it, and keep it as a Recording."""
        recorder = Recorder(self, num_rows)
        return Recorded(*recorder.run(forward), recorder.obstacle)

    @property
    def num_bytes(self) -> int:
        """Of all places together."""
        return sum(piece.nbytes for piece in self._pieces)

    def holds(self, x: Tensor) -> bool:
        return self._piece_of(x) is not None

    def lend(self, x: Tensor) -> Tensor:
        """x, that may be looked at until the next forward: its place is free all the same. x has no gaps."""
        piece = self._piece_of(x)
        if piece is None:
            return x
        begin = x.data_ptr() - piece.ctypes.data
        return torch.from_numpy(piece[begin : begin + x.nbytes]).view(x.dtype).view(x.shape)

    def _take_piece(self, num_bytes: int) -> Bytes:
        """The smallest free one that is large enough, or a new one."""
        fitting = [index for index, piece in enumerate(self._free) if piece.nbytes >= num_bytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))
        memory = np.empty(num_bytes + LINE, np.uint8)
        begin = -memory.ctypes.data % LINE
        self._pieces.append(memory[begin : begin + max(num_bytes, 1)])
        return self._pieces[-1]

    def _piece_of(self, x: Tensor) -> Bytes | None:
        address = x.data_ptr()
        return next((piece for piece in self._pieces if 0 <= address - piece.ctypes.data < piece.nbytes), None)


class Recording:
    """Calls that can be made again, with what they look at."""

    def __init__(self, library: Library, calls: Sequence[abi.Call], result: Tensor, arena: Arena, kept: list[Tensor]) -> None:
        self.result = result
        self.calls = calls
        self._library, self._memory = library, (arena, kept)  # alive as long as this is
        call = library.header.structs["lmi_call"]
        self._array = (call * len(calls))(*[call(each.operation, ctypes.addressof(each.args)) for each in calls])

    def replay(self) -> Tensor:
        library = self._library
        library.check(library.function("replay")(self._array, len(self._array), library.stream()))
        return self.result


class Recorder(TorchDispatchMode):
    """For one forward: keeps this thread's calls into the library in use, and gives new tensors places in the arena. `obstacle`:
    the first thing that could not be recorded."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and to say so would import the compiler: 4 s at the first decode step."""
        return False

    def __init__(self, arena: Arena, num_rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.obstacle = ""
        self._library, self._arena, self._num_rows = column.library(), arena, num_rows
        self._calls: list[abi.Call] = []
        self._kept: list[Tensor] = []
        if self._library is None:
            self.obstacle = "the torch column has no calls"

    def run(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Recording | None]:
        """Run it and record it. Gives its result too; None where there was an obstacle."""
        with self, abi.watching(self._keep):
            result = forward()
        if self.obstacle or self._library is None:
            return result, None
        lent = self._arena.lend(result)
        return lent, Recording(self._library, self._calls, lent, self._arena, self._kept)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.empty.memory_format:
            return self._arena.take(args[0], kwargs.get("dtype") or torch.get_default_dtype(), self._num_rows)
        if function is torch.ops.aten.new_empty.default:
            return self._arena.take(args[1], kwargs.get("dtype") or args[0].dtype, self._num_rows)
        result = function(*args, **kwargs)
        if function is torch.ops.aten.lift_fresh.default or not _is_view(args, result, function):
            self.obstacle = self.obstacle or f"torch's {function}"
        return result

    def _keep(self, library: Library, call: abi.Call, tensors: Sequence[Tensor]) -> None:
        if library is not self._library:
            self.obstacle = self.obstacle or f"a call into {library.path.name}"
        self._calls.append(call)
        self._kept += [tensor for tensor in tensors if not self._arena.holds(tensor)]


def _is_view(args: Sequence[Any], result: Any, function: Any) -> bool:
    """Whether torch has done nothing but look at its first argument in another way."""
    results = result if isinstance(result, (list, tuple)) else [result]
    if function._schema.is_mutable or not all(isinstance(each, Tensor) for each in chain(args[:1], results)):
        return False
    address = args[0].untyped_storage().data_ptr()
    return all(each.untyped_storage().data_ptr() == address for each in results)
