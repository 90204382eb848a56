"""A column on a device for callers whose tensors lie on the CPU, so that the kernel tests run on a GPU as they stand."""

from pathlib import Path

import torch

from lmi_dist.ops.abi import Library


class Mirrored(Library):
    """What a call takes is copied to the device, memory between rows included, and copied back when the call has run."""

    def __init__(self, path: Path, device: str) -> None:
        """device: where the column works; "cpu" (the stand-in) copies to other places of the same memory."""
        super().__init__(path)
        self.far = Library(path, device)

    def call(self, name: str, **fields: torch.Tensor | float | None) -> None:
        pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by address: all bytes of a tensor's memory, here and there
        moved = {field: self._move(value, pairs) if isinstance(value, torch.Tensor) else value for field, value in fields.items()}
        self.far.call(name, **moved)
        for here, there in pairs.values():
            here.copy_(there)

    def _move(self, value: torch.Tensor, pairs: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """The same view of a copy; two views of one memory stay that. What no column takes comes back as it is, to be refused."""
        if value.device.type != "cpu":
            return value
        memory = value.untyped_storage()
        if memory.data_ptr() not in pairs:
            here = torch.empty(0, dtype=torch.uint8).set_(memory)
            pairs[memory.data_ptr()] = here, torch.empty_like(here, device=self.far.device).copy_(here)
        there = pairs[memory.data_ptr()][1].untyped_storage()
        empty = torch.empty(0, dtype=value.dtype, device=self.far.device)
        return empty.set_(there, value.storage_offset(), value.size(), value.stride())
