"""The memory that the ranks of one machine share, and what they do through it: sum, gather, drop a step together.

Always the CPU library's, whichever column runs the operations: there is no other way from one process to another.
"""

import ctypes
import fcntl
import mmap
import os
from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lmi_dist.ops import column

SPINS = 2000  # looks at another rank's progress before sleeping: 20 to 60 us, as the kernels' threads do


class Segment:
    """Rank `rank`'s view. All ranks make the same calls in the same order between one `begin` and the next, one thread each."""

    def __init__(self, fd: int, rank: int, size: int) -> None:
        """Map the file `fd` that `create` has made, which is taken over. Raises KernelError if the CPU library is not built."""
        self._library, self._fd, self._size = column.cpu_library(), fd, size
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, rank)  # until this process ends, whatever its end
        self._memory = mmap.mmap(fd, self._library.function("link_bytes")(size))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        spins = SPINS if size <= len(os.sched_getaffinity(0)) else 0
        self._fields = {"memory": address, "rank": rank, "size": size, "fd": fd, "spins": spins}
        self._link = ctypes.byref(self._library.header.structs["lmi_link"](**self._fields))

    @staticmethod
    def create(size: int) -> int:
        """A file of its own for so many ranks, that has no name and is gone with its last user."""
        fd = os.memfd_create("lmi-dist", os.MFD_CLOEXEC)
        os.ftruncate(fd, column.cpu_library().function("link_bytes")(size))
        return fd

    def begin(self, turn: int = 0) -> int:
        """Begin a step: rank 0 without a turn, the others with what rank 0 got."""
        return int(self._library.function("link_begin")(self._link, turn))

    def drop(self, reason: str) -> None:
        """Let the others' calls of this step raise RankError with the reason."""
        self._library.check(self._library.function("link_drop")(self._link, reason.encode()))

    def all_reduce(self, x: Tensor) -> Tensor:
        """x := sum of all ranks' x, in fp32 in rank order, rounded once; of one shape and dtype on all, without gaps. Returns x.
        Raises RankError if another rank has ended or dropped the step."""
        self._library.call("all_reduce", x=x, **self._fields)
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """x: fp32 [R,widths[rank]]. Gives [R,sum(widths)] on rank 0, x on the others. Raises RankError as above."""
        starts = torch.frombuffer(array("i", [0, *accumulate(widths)]), dtype=torch.int32)  # to a Recorder this makes no tensor
        out = x.new_empty((len(x), sum(widths))) if self._fields["rank"] == 0 else None
        self._library.call("gather", out=out, x=x, starts=starts, **self._fields)
        return x if out is None else out
