"""The stand-in for a GPU: it does what a GPU does, and it bites where a GPU would only sometimes. Kernels in
support/sim_faults.cu, both ways of changing fibers."""

import ctypes

import pytest
from sim_kernels import ORDERS, SimKernels


@pytest.fixture(scope="module", params=["registers", "ucontext"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimKernels:
    flags = ["-DLMI_SIM_UCONTEXT"] if request.param == "ucontext" else []
    return SimKernels.build("sim_faults.cu", tmp_path_factory.mktemp("sim"), 1024, *flags)


def counted(kernels: SimKernels) -> tuple[int, ...]:
    """Bank conflicts, sectors touched and needed since the last time; counts from now on."""
    counters = (ctypes.c_uint64 * 3)()
    kernels.library.count(counters)
    return tuple(counters)


@pytest.mark.parametrize("order", ORDERS)
def test_barrier_orders_what_threads_share(kernels: SimKernels, order: str) -> None:
    expected = [(thread + 1) % 128 for thread in range(128)]

    assert kernels.results_of("rotate", 1, order) == expected


@pytest.mark.parametrize("order", ORDERS)
def test_missing_barrier_is_seen_in_every_order(kernels: SimKernels, order: str) -> None:
    expected = [(thread + 1) % 128 for thread in range(128)]

    assert kernels.results_of("rotate", 0, order) != expected


def test_threads_that_never_meet_are_reported(kernels: SimKernels) -> None:
    report = kernels.run("divergent", 64)

    assert "deadlock in divergent, block (0,0,0): 128 threads wait: t0 in __syncthreads" in report
    assert kernels.run("rotate", 1) == ""  # the next launch is sound


@pytest.mark.parametrize("order", ORDERS)
def test_named_barrier_waits_for_its_count(kernels: SimKernels, order: str) -> None:
    assert kernels.results_of("named", 128, order)[32:] == [7.0] * 96


def test_named_barrier_refuses_a_wrong_count(kernels: SimKernels) -> None:
    assert "whole warps" in kernels.run("named", 100)
    assert "deadlock" in kernels.run("named", 160)


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_of_two_masks_meet_apart(kernels: SimKernels, order: str) -> None:
    def expected(lane: int) -> float:
        votes = sum(other > 9 for other in range(lane % 2, 32, 2))
        first = lane // 16 * 16
        other = (lane + 4 if lane + 4 < first + 16 else lane) if lane % 2 == 0 else (lane - 4 if lane - 4 >= first else lane)
        return (lane ^ 2) + 100 * votes + 10000 * other

    assert kernels.results_of("shuffle", 0, order) == [expected(thread % 32) for thread in range(128)]


def test_missing_lane_is_reported(kernels: SimKernels) -> None:
    assert "31 threads wait: t0 in __shfl_sync" in kernels.run("missing_lane", 5)


@pytest.mark.parametrize("order", ORDERS)
def test_atomics_add_up(kernels: SimKernels, order: str) -> None:
    assert kernels.results_of("atomic", 0, order, 4) == [sum(range(first, 128, 4)) for first in range(4)]


def test_unwritten_shared_memory_is_no_number(kernels: SimKernels) -> None:
    assert all(value != value for value in kernels.results_of("poison"))


@pytest.mark.parametrize("distance", [1, 20])
def test_write_beyond_shared_memory_is_reported(kernels: SimKernels, distance: int) -> None:
    assert f"was written {4 * distance - 4} bytes beyond a piece of 512" in kernels.run("overrun", distance)
    assert kernels.run("overrun", 0) == ""


@pytest.mark.parametrize(("offset", "words"), [(120, "multiple of 16"), (128, "out of bounds"), (4096, "out of bounds")])
def test_matrix_outside_of_shared_memory_is_reported(kernels: SimKernels, offset: int, words: str) -> None:
    assert words in kernels.run("out_of_bounds", offset)
    assert kernels.run("out_of_bounds", 112) == ""


@pytest.mark.parametrize(("stride", "conflicts"), [(16, 0), (128, 7), (64, 3), (144, 0), (0, 0)])
def test_bank_conflicts_are_counted(kernels: SimKernels, stride: int, conflicts: int) -> None:
    counted(kernels)

    kernels.run("conflict", stride)

    assert counted(kernels)[0] == conflicts


@pytest.mark.parametrize(("stride", "touched"), [(1, 4), (2, 8), (8, 32), (0, 1)])
def test_scattered_reads_are_counted(kernels: SimKernels, stride: int, touched: int) -> None:
    counted(kernels)

    kernels.run("stride", stride)

    assert counted(kernels)[1:] == (touched, 4)


@pytest.mark.parametrize("order", ORDERS)
def test_copy_is_there_once_waited_for(kernels: SimKernels, order: str) -> None:
    expected = [float(i) if i % 4 < 3 else 0.0 for i in range(512)]  # 12 of 16 bytes are read, the rest is 0

    for left in (0, 1):
        assert kernels.results_of("copy", left, order, 512) == expected


@pytest.mark.parametrize("order", ORDERS)
def test_copy_that_is_not_waited_for_is_missed(kernels: SimKernels, order: str) -> None:
    assert any(value != value for value in kernels.results_of("copy", 2, order, 512))


def test_unknown_order_is_refused(kernels: SimKernels) -> None:
    assert not kernels.library.set_order(b"sideways")
