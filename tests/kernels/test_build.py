"""The build finds nvcc or goes without, and says which; so do the tests."""

import subprocess
import sys
from pathlib import Path

from nvcc import NVCC

ROOT = Path(__file__).parents[2]
SAYS = "CUDA column: not built, for there is no nvcc (set CUDACXX or CUDA_HOME); the others do not need it"


def test_build_without_nvcc_says_so_and_has_the_other_columns(tmp_path: Path) -> None:
    ninja = Path(sys.executable).with_name("ninja")
    nvcc = {Path("/usr/local/cuda/bin"), *(Path(found).parent for found in [NVCC] if found)}
    options = [f"-DCMAKE_IGNORE_PATH={';'.join(map(str, nvcc))}", f"-DCMAKE_MAKE_PROGRAM={ninja if ninja.exists() else 'ninja'}"]
    cmake = [sys.executable, "-m", "cmake"]

    done = subprocess.run(
        [*cmake, "-S", ROOT / "kernels", "-B", tmp_path, "-G", "Ninja", *options], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert SAYS in done.stdout
    built = (tmp_path / "build.ninja").read_text()
    assert [f"liblmi_{name}.so" in built for name in ("cpu", "sim", "cuda")] == [True, True, False]


def test_suite_without_nvcc_says_what_it_does_not_check() -> None:
    code = "import shutil, sys, pytest; shutil.which = lambda *_: None; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-n", "0", "--collect-only", "tests/kernels/test_nvcc.py", "tests/kernels/test_build.py"]

    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "not checked, for there is no nvcc: that the CUDA column compiles (tests marked nvcc)" in done.stdout
    assert "test_build_without_nvcc" in done.stdout
    assert "test_cuda_column_compiles" not in done.stdout
