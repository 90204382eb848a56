"""When a CPU's memory is asked of the system, and when it is given back."""

import ctypes
import threading
import time
from collections.abc import Sequence

import torch

POPULATE_WRITE = 23  # madvise(2), since Linux 5.14
PAGE = 4096
LEAD_BLOCKS = 256  # 4096 tokens
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES, LARGEST_KEPT_BYTES = 256 << 20, 32 << 20  # the latter is the most that glibc takes
REST = 4  # times as long as it works does the thread leave the CPUs to the steps

_libc = ctypes.CDLL(None)


class PagesAhead:
    """The system clears a page when it is first written, which takes up to 5 ms for a huge one, and a step that comes to new blocks
    would wait for one of each tensor. A thread asks for those of the next blocks while steps go on, and ends when they are there.

    parts: the pool's tensors, each [N,...], or none; blocks are taken in ascending order until all have been written once.
    """

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._parts = parts
        self._num_blocks = len(parts[0]) if parts else 0
        self._num_asked = 0
        self.thread: threading.Thread | None = None  # the last one
        self.reach(0)

    def reach(self, block: int) -> None:
        """A step writes up to this block."""
        if block + LEAD_BLOCKS // 2 <= self._num_asked or self._num_asked == self._num_blocks:
            return
        first, self._num_asked = self._num_asked, min(block + LEAD_BLOCKS, self._num_blocks)
        self.thread = threading.Thread(target=self._ask, args=(first, self._num_asked), name="kv pages", daemon=True)
        self.thread.start()

    def _ask(self, first: int, end: int) -> None:
        """Where the system does not know such a wish the pages come as they are written."""
        madvise = _libc.madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for part in self._parts:
            block_bytes = part.nbytes // self._num_blocks
            begin = (part.data_ptr() + first * block_bytes) // PAGE * PAGE
            started = time.perf_counter()
            madvise(begin, part.data_ptr() + end * block_bytes - begin, POPULATE_WRITE)
            time.sleep(REST * (time.perf_counter() - started))


def keep_freed_memory() -> None:
    """From now on the memory of one operation's result is the next one's. glibc would give what is large back to the system, which
    clears each page that it gives out again: prompts of 2048 tokens through llama-1.1b have 480 MB of results, each up to 23."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        _libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
