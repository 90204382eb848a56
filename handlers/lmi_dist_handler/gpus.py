"""Which GPUs there are for a worker, told without torch: what `tensor_parallel_degree=max` counts before a worker is there."""

import ctypes
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path

GPU_FOLDER = Path("/proc/driver/nvidia/gpus")
NVML = "libnvidia-ml.so.1"  # comes with the driver
LEAST_CAPABILITY = (8, 0)  # as lmi_dist/device.py has it, which loads torch


def can_use_gpus() -> bool:
    """Whether what is here can use any: a torch with CUDA, our kernels for it, and a GPU that they run on."""
    ops = util.find_spec("lmi_dist.ops")
    folders = (ops and ops.submodule_search_locations) or ()
    if metadata.version("torch").endswith("+cpu") or not any((Path(each) / "liblmi_cuda.so").exists() for each in folders):
        return False
    capabilities = gpu_capabilities()
    return capabilities is None or any(each >= LEAST_CAPABILITY for each in capabilities)


def num_visible_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that a worker may use: CUDA_VISIBLE_DEVICES up to its first -1, else all that the driver lists."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(GPU_FOLDER.iterdir())) if GPU_FOLDER.is_dir() else 0
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return names.index("-1") if "-1" in names else len(names)


def gpu_capabilities() -> list[tuple[int, int]] | None:
    """Compute capabilities of the machine's GPUs, visible or not, as NVML of the driver tells; None where not of all."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        num = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(num)):
            return None
        found = [_capability(nvml, index) for index in range(num.value)]
    finally:
        nvml.nvmlShutdown()
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else None


def _capability(nvml: ctypes.CDLL, index: int) -> tuple[int, int] | None:
    gpu, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(gpu)):
        return None
    if nvml.nvmlDeviceGetCudaComputeCapability(gpu, ctypes.byref(major), ctypes.byref(minor)):
        return None
    return major.value, minor.value
