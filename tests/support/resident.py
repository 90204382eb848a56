"""Which of a tensor's memory the system has handed out."""

import ctypes
import resource

import torch


def resident_bytes(part: torch.Tensor) -> int:
    """Of a tensor's memory that whole pages hold, what the system has handed out."""
    page = resource.getpagesize()
    begin, end = -(-part.data_ptr() // page), (part.data_ptr() + part.nbytes) // page
    pages = (ctypes.c_ubyte * (end - begin))()
    assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(begin * page), ctypes.c_size_t(len(pages) * page), pages) == 0
    return page * sum(each & 1 for each in pages)
