"""nvcc takes the CUDA column without a warning, and no kernel spills registers (both are errors, see kernels/CMakeLists.txt); what
comes out opens on a machine without a GPU and says what is missing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc, as README says may be")


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
