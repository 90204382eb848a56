"""When a CPU's memory is asked of the system, and when it is given back."""

import ctypes
import threading
import time
import weakref
from collections.abc import Sequence

import torch

POPULATE_WRITE = 23  # madvise(2), since Linux 5.14
PAGE = 4096
LEAD_BLOCKS = 256  # 4096 tokens that are there ahead of the steps
IDLE_BYTES = 1 << 30  # that are there once nobody has stepped for IDLE_S
IDLE_S = 0.5
PIECE_BLOCKS = 16
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES, LARGEST_KEPT_BYTES = 256 << 20, 32 << 20  # the latter is the most that glibc takes
REST = 4  # times as long as it works does the thread leave the CPUs to the steps

_libc = ctypes.CDLL(None)


class PagesAhead:
    """The system clears a page when it is first written, which takes up to 5 ms for a huge one, and a step that comes to new blocks
    would wait for one of each tensor. A thread asks for those of the next blocks while steps go on, and for more while none do; it
    ends when all are there, or the pool is gone.

    parts: the pool's tensors, each [N,...], or none; blocks are taken in ascending order until all have been written once.
    """

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._parts = parts
        self._num_blocks = len(parts[0]) if parts else 0
        self._idle_blocks = IDLE_BYTES // (sum(part.nbytes for part in parts) // self._num_blocks) if parts else 0
        self._num_written = self._num_asked = 0
        self._piece: list[torch.Tensor] = []  # what is left of the blocks that are being asked for
        self._stepped_at = time.monotonic()
        self._needed = threading.Event()
        weakref.finalize(self, self._needed.set)
        self.thread = threading.Thread(target=_ask, args=(weakref.ref(self), self._needed), name="kv pages", daemon=True)
        self.thread.start()

    def reach(self, block: int) -> None:
        """A step writes up to this block."""
        self._stepped_at = time.monotonic()
        self._num_written = max(self._num_written, block + 1)
        if self._num_written + LEAD_BLOCKS // 2 > self._num_asked:
            self._needed.set()

    @property
    def is_done(self) -> bool:
        return self._num_asked == self._num_blocks

    def ask(self) -> float | None:
        """Ask for one tensor's part of a piece, if any: a step beside it waits for one page, not for one of each.
        Returns for how long to rest; None: until a step needs more."""
        is_idle = time.monotonic() - self._stepped_at >= IDLE_S
        idle_end = self._num_written + max(LEAD_BLOCKS, self._idle_blocks)
        if not self._piece:
            end = min(self._num_blocks, idle_end if is_idle else self._num_written + LEAD_BLOCKS, self._num_asked + PIECE_BLOCKS)
            if end <= self._num_asked:
                return IDLE_S if idle_end > self._num_asked else None
            self._piece = [part[self._num_asked : end] for part in self._parts]
        started = time.perf_counter()
        memory = self._piece.pop()
        _populate(memory)
        if not self._piece:
            self._num_asked += len(memory)
        return REST * (time.perf_counter() - started)


def _ask(pages: "weakref.ref[PagesAhead]", needed: threading.Event) -> None:
    while (there := pages()) is not None and not there.is_done:
        rest_s = there.ask()
        del there  # or it would never be gone
        needed.wait(rest_s)
        needed.clear()


def _populate(memory: torch.Tensor) -> None:
    """Where the system does not know such a wish the pages come as they are written."""
    begin = memory.data_ptr() // PAGE * PAGE
    _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(memory.data_ptr() + memory.nbytes - begin), POPULATE_WRITE)


def keep_freed_memory() -> None:
    """From now on the memory of one operation's result is the next one's. glibc would give what is large back to the system, which
    clears each page that it gives out again: prompts of 2048 tokens through llama-1.1b have 480 MB of results, each up to 23."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        _libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
