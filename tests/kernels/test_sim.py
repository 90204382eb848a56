"""The stand-in for a GPU: it does what a GPU does, and it bites where a GPU would only sometimes. Kernels in
support/sim_faults.cu, both ways of changing fibers."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
ORDERS = ("forward", "reverse", "random", "random:1", "random:2")
SOURCES = [*sorted((KERNELS / "sim").glob("*.cc")), KERNELS / "common" / "check.cc", KERNELS / "cuda" / "runtime.cu"]


class Kernels:
    """The kernels of sim_faults.cu."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.message.restype = ctypes.c_char_p
        self.results = (ctypes.c_float * 1024).in_dll(self.library, "results")

    def run(self, name: str, argument: int = 0, order: str = "forward") -> str:
        """The report; "" if all went well."""
        assert self.library.set_order(order.encode())
        ctypes.memset(self.results, 0, ctypes.sizeof(self.results))
        status = getattr(self.library, name)(argument)
        return self.library.message().decode() if status else ""

    def results_of(self, name: str, argument: int = 0, order: str = "forward", num: int = 128) -> list[float]:
        assert self.run(name, argument, order) == ""
        return list(self.results[:num])

    def counted(self) -> tuple[int, ...]:
        """Bank conflicts, sectors touched and needed since the last time; counts from now on."""
        counted = (ctypes.c_uint64 * 3)()
        self.library.count(counted)
        return tuple(counted)


@pytest.fixture(scope="module", params=["registers", "ucontext"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler is not None
    path = tmp_path_factory.mktemp("sim") / "faults.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-DLMI_SIM", "-DLMI_LEVEL=sim"]
    flags += ["-DLMI_SIM_UCONTEXT"] if request.param == "ucontext" else []
    includes = [f"-I{KERNELS}", f"-I{KERNELS / 'include'}"]
    sources = ["-x", "c++", ROOT / "tests" / "support" / "sim_faults.cu", *SOURCES]
    subprocess.run([compiler, *flags, *includes, *sources, "-o", path], check=True)
    return Kernels(path)


@pytest.mark.parametrize("order", ORDERS)
def test_barrier_orders_what_threads_share(kernels: Kernels, order: str) -> None:
    expected = [(thread + 1) % 128 for thread in range(128)]

    assert kernels.results_of("rotate", 1, order) == expected


@pytest.mark.parametrize("order", ORDERS)
def test_missing_barrier_is_seen_in_every_order(kernels: Kernels, order: str) -> None:
    expected = [(thread + 1) % 128 for thread in range(128)]

    assert kernels.results_of("rotate", 0, order) != expected


def test_threads_that_never_meet_are_reported(kernels: Kernels) -> None:
    report = kernels.run("divergent", 64)

    assert "deadlock in divergent, block (0,0,0): 128 threads wait: t0 in __syncthreads" in report
    assert kernels.run("rotate", 1) == ""  # the next launch is sound


@pytest.mark.parametrize("order", ORDERS)
def test_named_barrier_waits_for_its_count(kernels: Kernels, order: str) -> None:
    assert kernels.results_of("named", 128, order)[32:] == [7.0] * 96


def test_named_barrier_refuses_a_wrong_count(kernels: Kernels) -> None:
    assert "whole warps" in kernels.run("named", 100)
    assert "deadlock" in kernels.run("named", 160)


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_of_two_masks_meet_apart(kernels: Kernels, order: str) -> None:
    def expected(lane: int) -> float:
        votes = sum(other > 9 for other in range(lane % 2, 32, 2))
        first = lane // 16 * 16
        other = (lane + 4 if lane + 4 < first + 16 else lane) if lane % 2 == 0 else (lane - 4 if lane - 4 >= first else lane)
        return (lane ^ 2) + 100 * votes + 10000 * other

    assert kernels.results_of("shuffle", 0, order) == [expected(thread % 32) for thread in range(128)]


def test_missing_lane_is_reported(kernels: Kernels) -> None:
    assert "31 threads wait: t0 in __shfl_sync" in kernels.run("missing_lane", 5)


@pytest.mark.parametrize("order", ORDERS)
def test_atomics_add_up(kernels: Kernels, order: str) -> None:
    assert kernels.results_of("atomic", 0, order, 4) == [sum(range(first, 128, 4)) for first in range(4)]


def test_unwritten_shared_memory_is_no_number(kernels: Kernels) -> None:
    assert all(value != value for value in kernels.results_of("poison"))


@pytest.mark.parametrize("distance", [1, 20])
def test_write_beyond_shared_memory_is_reported(kernels: Kernels, distance: int) -> None:
    assert f"was written {4 * distance - 4} bytes beyond a piece of 512" in kernels.run("overrun", distance)
    assert kernels.run("overrun", 0) == ""


@pytest.mark.parametrize(("offset", "words"), [(120, "multiple of 16"), (128, "out of bounds"), (4096, "out of bounds")])
def test_matrix_outside_of_shared_memory_is_reported(kernels: Kernels, offset: int, words: str) -> None:
    assert words in kernels.run("out_of_bounds", offset)
    assert kernels.run("out_of_bounds", 112) == ""


@pytest.mark.parametrize(("stride", "conflicts"), [(16, 0), (128, 7), (64, 3), (144, 0), (0, 0)])
def test_bank_conflicts_are_counted(kernels: Kernels, stride: int, conflicts: int) -> None:
    kernels.counted()

    kernels.run("conflict", stride)

    assert kernels.counted()[0] == conflicts


@pytest.mark.parametrize(("stride", "touched"), [(1, 4), (2, 8), (8, 32), (0, 1)])
def test_scattered_reads_are_counted(kernels: Kernels, stride: int, touched: int) -> None:
    kernels.counted()

    kernels.run("stride", stride)

    assert kernels.counted()[1:] == (touched, 4)


@pytest.mark.parametrize("order", ORDERS)
def test_copy_is_there_once_waited_for(kernels: Kernels, order: str) -> None:
    expected = [float(i) if i % 4 < 3 else 0.0 for i in range(512)]  # 12 of 16 bytes are read, the rest is 0

    for left in (0, 1):
        assert kernels.results_of("copy", left, order, 512) == expected


@pytest.mark.parametrize("order", ORDERS)
def test_copy_that_is_not_waited_for_is_missed(kernels: Kernels, order: str) -> None:
    assert any(value != value for value in kernels.results_of("copy", 2, order, 512))


def test_unknown_order_is_refused(kernels: Kernels) -> None:
    assert not kernels.library.set_order(b"sideways")
