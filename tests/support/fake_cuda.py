"""What torch.cuda and our CUDA library say of GPUs that are not there: set by a test, answered by patches."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from lmi_dist import device, local_link, ops
from lmi_dist.device_group import DeviceGroup
from lmi_dist.errors import KernelError
from lmi_dist.ops import column
from lmi_dist.ops.abi import find_library
from lmi_dist.parallel import Ranks

GIGA = 1_000_000_000


@dataclass
class FakeCuda:
    """GPUs as a test wants them; all fields may be changed at any time."""

    is_built: bool = True
    init_error: str = ""  # of torch.cuda.init
    num_gpus: int = 1
    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    library: tuple[str, ...] | str = ("90a-real",)  # what it is built for, or why it cannot be opened
    total_bytes: int = 80 * GIGA
    free_bytes: int = 79 * GIGA
    reserved_bytes: int = 3 * GIGA
    lasting_error: str = ""  # of torch.cuda.synchronize
    peak_bytes: int = 2 * GIGA  # of tensors while the largest step runs, beside those there before
    used: list[torch.device] = field(default_factory=list)  # by set_device

    def init(self) -> None:
        if self.init_error:
            raise RuntimeError(self.init_error)

    def synchronize(self, where: torch.device) -> None:
        if self.lasting_error:
            raise RuntimeError(self.lasting_error)

    def architectures(self) -> tuple[str, ...]:
        if isinstance(self.library, str):
            raise KernelError(self.library)
        return self.library


def install(patch: pytest.MonkeyPatch) -> FakeCuda:
    """torch.cuda with one good GPU."""
    fake = FakeCuda()
    patch.setattr(torch.backends.cuda, "is_built", lambda: fake.is_built)
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.cuda, "init", fake.init)
    patch.setattr(torch.cuda, "device_count", lambda: fake.num_gpus)
    patch.setattr(torch.cuda, "get_device_name", lambda _: fake.name)
    patch.setattr(torch.cuda, "get_device_capability", lambda _: fake.capability)
    patch.setattr(torch.cuda, "mem_get_info", lambda _: (fake.free_bytes, fake.total_bytes))
    patch.setattr(torch.cuda, "memory_reserved", lambda _: fake.reserved_bytes)
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    patch.setattr(torch.cuda, "memory_allocated", lambda _: GIGA)
    patch.setattr(torch.cuda, "max_memory_allocated", lambda _: GIGA + fake.peak_bytes)
    patch.setattr(torch.cuda, "synchronize", fake.synchronize)
    patch.setattr(torch.cuda, "set_device", fake.used.append)
    patch.setattr(ops, "cuda_architectures", fake.architectures)
    return fake


def install_with_tensors(patch: pytest.MonkeyPatch) -> FakeCuda:
    """The same, whose tensors are fake_gpu's, whose kernels the stand-in runs, and which gloo joins."""
    import fake_gpu  # registers a device for the rest of the process

    def join(ranks: Ranks, store: Path, place: torch.device, _: str) -> DeviceGroup:
        return DeviceGroup(ranks, store, place, "gloo")

    fake = install(patch)
    patch.setattr(local_link, "DeviceGroup", join)
    patch.setattr(device, "GPU", fake_gpu.FAKE_GPU.type)
    patch.setitem(column.DEVICES, "cuda", fake_gpu.FAKE_GPU.type)
    patch.setattr(column, "_libraries", {})
    patch.setattr(column, "find_library", lambda folders, name="liblmi_cpu.so": find_library(folders, name.replace("cuda", "sim")))
    return fake
