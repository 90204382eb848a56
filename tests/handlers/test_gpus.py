"""Counting GPUs without torch. No GPU is here: the driver's library is one that a compiler makes."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from lmi_dist_handler import gpus

from lmi_dist import device

UNKNOWN = 0  # for the major capability of a GPU that does not answer
# What gpus.py asks of NVML, in NVIDIA's prototypes.
NVML = """
typedef struct gpu *nvmlDevice_t;
static const int majors[] = {MAJORS};
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = sizeof majors / sizeof *majors; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *gpu) { *gpu = (nvmlDevice_t)(majors + index); return 0; }
int nvmlDeviceGetCudaComputeCapability(nvmlDevice_t gpu, int *major, int *minor) {
  *major = *(const int *)gpu;
  *minor = 5;
  return *major ? 0 : 15; /* GPU is lost */
}
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *, torch: str = "2.13.0", library: bool = True) -> None:
    """This torch, and perhaps our CUDA library; no driver."""
    if library:
        (folder / "liblmi_cuda.so").touch()
    monkeypatch.setattr(gpus.metadata, "version", lambda name: {"torch": torch}[name])
    monkeypatch.setattr(gpus.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(folder)]))
    monkeypatch.setattr(gpus, "NVML", str(folder / "not-there.so"))


def make_nvml(folder: Path, monkeypatch: pytest.MonkeyPatch, *majors: int, init: int = 0) -> None:
    """A driver whose GPUs have these major compute capabilities."""
    (folder / "nvml.c").write_text(NVML)
    numbers = ",".join(map(str, majors))
    command = ["cc", "-shared", "-fPIC", f"-DMAJORS={numbers}", f"-DINIT={init}", folder / "nvml.c", "-o", folder / "nvml.so"]
    subprocess.run(command, check=True)
    monkeypatch.setattr(gpus, "NVML", str(folder / "nvml.so"))


@pytest.mark.parametrize(
    ("environ", "num"),
    [({}, 0), ({"CUDA_VISIBLE_DEVICES": ""}, 0), ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2), ({"CUDA_VISIBLE_DEVICES": "3,-1,4"}, 1)],
)
def test_visible_gpus_are_counted(environ: dict[str, str], num: int) -> None:
    assert gpus.num_visible_gpus(environ) == num


def test_gpus_that_the_driver_lists_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    monkeypatch.setattr(gpus, "GPU_FOLDER", tmp_path / "gpus")

    assert gpus.num_visible_gpus({}) == 2


@pytest.mark.parametrize(
    ("torch", "library", "can_use"), [("2.13.0", True, True), ("2.13.0", False, False), ("2.13.0+cpu", True, False)]
)
def test_gpus_take_a_torch_with_cuda_and_our_library(
    torch: str, library: bool, can_use: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, torch=torch, library=library)

    assert gpus.can_use_gpus() == can_use


@pytest.mark.parametrize(
    ("majors", "can_use"),
    [((7,), False), ((7, 7), False), ((7, 8), True), ((7, UNKNOWN), True)],
)
def test_gpus_that_are_all_too_old_cannot_be_used(
    majors: tuple[int, ...], can_use: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    make_nvml(tmp_path, monkeypatch, *majors)

    assert gpus.can_use_gpus() == can_use


def test_capabilities_are_those_of_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nvml(tmp_path, monkeypatch, 7, 9)

    assert gpus.gpu_capabilities() == [(7, 5), (9, 5)]


def test_driver_that_does_not_start_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nvml(tmp_path, monkeypatch, 7, init=9)

    assert gpus.gpu_capabilities() is None


def test_least_capability_is_that_of_the_engine() -> None:
    assert gpus.LEAST_CAPABILITY == device.LEAST_CAPABILITY
