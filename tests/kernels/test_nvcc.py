"""nvcc takes the CUDA column without a warning, and no kernel spills registers (both are errors, see kernels/CMakeLists.txt); what
comes out opens on a machine without a GPU and says what is missing."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nvcc import NVCC

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.nvcc


def build(name: str, architectures: str) -> Path:
    """The library, built in a folder that stays, so that a second time costs nothing."""
    folder = ROOT / "build" / name
    ninja = Path(sys.executable).with_name("ninja")
    options = [f"-DLMI_CUDA_ARCHITECTURES={architectures}", f"-DCMAKE_MAKE_PROGRAM={ninja if ninja.exists() else 'ninja'}"]
    cmake = [sys.executable, "-m", "cmake"]
    run([*cmake, "-S", ROOT / "kernels", "-B", folder, "-G", "Ninja", *options])
    run([*cmake, "--build", folder, "--target", "lmi_cuda"])
    shutil.copy(ROOT / "kernels" / "include" / "lmi_kernels.h", folder)
    return folder / "liblmi_cuda.so"


def run(command: list[object]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# Holds more numbers than the registers that it is left with.
SPILLING = """
__global__ void __launch_bounds__(1024, 2) spilling(float *x) {
  float held[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = held[i] * held[63 - i];
}
"""


def test_kernel_that_spills_is_refused(tmp_path: Path) -> None:
    """By the flags with which every kernel of the column is built."""
    text = (ROOT / "kernels" / "CMakeLists.txt").read_text()
    flags = re.search(r"COMPILE_LANGUAGE:CUDA>:(.*?)>", text)[1].split(";")  # type: ignore[index]  # a promise of the file
    (tmp_path / "spilling.cu").write_text(SPILLING)
    command = [NVCC, "-arch=sm_90", "-O3", *flags, "-c", tmp_path / "spilling.cu", "-o", tmp_path / "spilling.o"]

    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert "Registers are spilled to local memory in function '_Z8spillingPf'" in done.stderr


def has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()


@pytest.mark.timeout(900)
def test_cuda_column_compiles_for_one_gpu() -> None:
    path = build("cuda", "90a-real")

    assert "(90a-real)" in Library(path, "cuda").describe()
    if not has_gpu():
        with pytest.raises(KernelError, match="there is no NVIDIA driver; install one, or use device=cpu"):
            ops.select("cuda", 1, path=path)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_cuda_column_compiles_for_every_gpu() -> None:
    assert "(80-real 89-real 90a-real 100-real 120)" in Library(build("cuda-release", "release"), "cuda").describe()
