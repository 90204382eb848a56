"""What a step brings to its device and takes from it: one copy each way, that nobody waits for before the results are wanted."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGN = 256  # bytes, as torch aligns what it allocates: our kernels look at 16 bytes at once
DTYPES = {"i4": torch.int32, "f4": torch.float32, "u8": torch.uint64}  # by numpy's kind and size


def to_device(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """The arrays (int32, float32, uint64) as tensors on the device. To a GPU they go in one copy, from pinned memory, which torch
    gives to nobody else before the copy has been made; nothing waits for it."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    *starts, num_bytes = accumulate((-(-array.nbytes // ALIGN) * ALIGN for array in arrays.values()), initial=0)
    there = pinned(num_bytes, torch.uint8, device)
    bytes_here = there.numpy()
    for start, array in zip(starts, arrays.values(), strict=True):
        bytes_here[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = there.to(device, non_blocking=True)
    return {
        name: there[start : start + array.nbytes].view(DTYPES[array.dtype.str[1:]]).view(array.shape)
        for start, (name, array) in zip(starts, arrays.items(), strict=True)
    }


def pinned(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory on the host, for copies to or from this device."""
    return torch.empty(size, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


class Parcel:
    """Tensors on their way from a device to the host, in one copy behind all that the device was given before."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: one at least, of four bytes a number, all on one device. They may be overwritten by what comes behind."""
        self._forms = [(tensor.dtype, tensor.shape) for tensor in tensors]
        self._arrived: torch.cuda.Event | None = None
        device = tensors[0].device
        flat = [tensor.reshape(-1).view(torch.int32) for tensor in tensors]
        if device.type == "cpu":
            self._here = torch.cat(flat)
            return
        there = flat[0] if len(flat) == 1 else torch.cat(flat)
        self._here = pinned(len(there), torch.int32, device)
        self._here.copy_(there, non_blocking=True)
        if device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def open(self) -> list[Tensor]:
        """The tensors on the host. Waits until they are there, and for nothing that the device was given later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        parts = self._here.split([shape.numel() for _, shape in self._forms])
        return [part.view(dtype).view(shape) for part, (dtype, shape) in zip(parts, self._forms, strict=True)]
