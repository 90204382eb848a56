"""Memory that the GPUs of one machine map from each other's processes, and sums of small messages in it."""

import ctypes
from collections.abc import Sequence

from torch import Tensor

from lmi_dist.errors import KernelError
from lmi_dist.ops import column
from lmi_dist.ops.abi import Library

HANDLE_BYTES = 64


class Peers:
    """Rank `rank`'s part of what `size` ranks share, on this process' GPU until it ends. `handle`: for the others' `map`."""

    def __init__(self, rank: int, size: int, max_bytes: int) -> None:
        """max_bytes: of a message. Raises KernelError where it cannot be: the column is not a GPU's, or more than 8 ranks."""
        self._library, self.max_bytes = _library(), max_bytes
        handle = ctypes.create_string_buffer(HANDLE_BYTES)
        self._address = self._library.function("peers_create")(rank, size, max_bytes, ctypes.addressof(handle))
        if self._address is None:
            raise KernelError(self._library.function("error_message")().decode())
        self.handle = handle.raw

    def map(self, handles: Sequence[bytes]) -> None:
        """handles: of all ranks, in order. Raises KernelError if one GPU cannot reach another's memory."""
        every = ctypes.create_string_buffer(b"".join(handles))
        self._library.check(self._library.function("peers_map")(self._address, ctypes.addressof(every)))

    def takes(self, x: Tensor) -> bool:
        """Whether x, which is of one size on all ranks, is small enough."""
        return x.nbytes <= self.max_bytes

    def all_reduce(self, x: Tensor) -> Tensor:
        """x := sum of all ranks' x, in fp32 in rank order, rounded once; of one shape and dtype on all, without gaps. Returns x.
        All ranks make the same calls in the same order, and a CUDA graph may hold them. Raises KernelError."""
        self._library.call("peer_all_reduce", peers=self._address, x=x)
        return x


def _library() -> Library:
    library = column.library()
    if library is None:
        raise KernelError("the torch column has no memory that ranks share")
    return library
