"""The kernel tests once more on a library with AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitized"
LIBRARY = BUILD / "liblmi_cpu.so"

# An operation told that its input has one row more than it has.
OUT_OF_BOUNDS = """
import sys, torch
from pathlib import Path
from lmi_dist.ops.abi import Library
library = Library(Path(sys.argv[1]))
args = library.header.structs["lmi_activation_args"]()
for name, rows in (("out", 3), ("x", 2)):
    tensor = torch.zeros(rows, 64)
    setattr(args, name, library.header.structs["lmi_tensor"](tensor.data_ptr(), (3, 64), (64, 1), 2, 0))
    globals()[name] = tensor
library.check(library.function("activation")(args, None))
print("not caught")
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Builds the library (nothing to do when nothing has changed) and gives what a process that opens it needs."""
    cmake = [sys.executable, "-m", "cmake"]
    run(
        [
            *cmake,
            "-S",
            str(ROOT / "kernels"),
            "-B",
            str(BUILD),
            "-G",
            "Ninja",
            "-DLMI_SANITIZE=ON",
            "-DCMAKE_MAKE_PROGRAM=" + ninja(),
        ]
    )
    run([*cmake, "--build", str(BUILD), "--target", "lmi_cpu"])
    # The sanitizer must be loaded before anything else, and the C++ library with it, for exceptions.
    linked = subprocess.run(["ldd", LIBRARY], capture_output=True, text=True, check=True).stdout
    preload = re.findall(r"=> (\S*(?:asan|libstdc\+\+|libc\+\+)\S*)", linked)
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(sorted(preload, key=lambda path: "asan" not in path)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.mark.timeout(600)  # the build counts as its own: four levels with sanitizers, 100 s of CPU time when all is new
def test_kernels_pass_under_sanitizers(environment: dict[str, str]) -> None:
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels",
        "--column=cpu",
        f"--library={LIBRARY}",
        "--levels=base,best",
        "--threads=2",
        "-x",
    ]

    output = run([*tests, "-k", "not bits"], env=environment)  # those repeat what others run, to compare it

    assert int(re.search(r"(\d+) passed", output)[1]) > 500  # type: ignore[index]  # pytest says it


def test_amx_level_is_right_with_its_instructions_in_c(environment: dict[str, str]) -> None:
    """Few machines have AMX: the same sources on twins of its instructions (kernels/common/amx_twin.h), bits included."""
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels/test_linear.py",
        "tests/kernels/test_attention.py",
        "--column=cpu",
        f"--library={LIBRARY}",
        "--levels=amx-emulated",
    ]

    output = run([*tests, "--threads=2", "-x"], env=environment)

    assert int(re.search(r"(\d+) passed", output)[1]) > 200  # type: ignore[index]  # pytest says it


def test_sanitizer_catches_reading_beyond_a_tensor(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_BOUNDS, str(LIBRARY)], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )

    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "not caught" not in done.stdout


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_cuda_column_passes_under_sanitizers(environment: dict[str, str]) -> None:
    """On its stand-in: what a kernel reads or writes outside of its tensors and its shared memory."""
    run([sys.executable, "-m", "cmake", "--build", str(BUILD), "--target", "lmi_sim"])
    library = LIBRARY.with_name("liblmi_sim.so")
    tests = [sys.executable, "-m", "pytest", "tests/kernels", "--column=sim", f"--library={library}", "-x"]

    output = run([*tests, "-k", "random and not bits"], env=environment)

    assert int(re.search(r"(\d+) passed", output)[1]) > 400  # type: ignore[index]  # pytest says it


def ninja() -> str:
    """The one beside this Python, which an installed package brought, or the system's."""
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else "ninja"


def run(command: list[str], env: dict[str, str] | None = None) -> str:
    """Its output; an AssertionError with all of it when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
