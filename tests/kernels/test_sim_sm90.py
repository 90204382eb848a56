"""The stand-in's Hopper: barriers in shared memory, the copy engine and products of four warps do what a GPU does, and what a GPU
leaves undefined is reported or gives no number. Kernels in support/sim_faults_sm90.cu."""

import pytest
import torch
from sim_kernels import ORDERS, SimKernels
from torch import Tensor

# ---- faults, by number as in sim_faults_sm90.cu ----
WRONG_PHASE, EARLY, LATE, NO_INIT, OVERWRITTEN = range(1, 6)
UNFENCED, NO_WAIT, FEWER_BYTES, MORE_BYTES, ODD_BYTES, UNFENCED_WRITE, FENCED_WRITE, LEFT, TWICE = range(10, 19)
NO_FENCE, NO_PROXY_FENCE, NO_COMMIT, EARLY_READ, EARLY_WRITE, LATE_LEFT, FEW_LANES, ONE_WAIT, DIFFERENT = range(20, 29)
TRANSPOSED, IN_REGISTERS, FP16 = 1, 2, 4
NUMBERS = torch.arange(1 << 14) % 251 - 125


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> SimKernels:
    return SimKernels.build("sim_faults_sm90.cu", tmp_path_factory.mktemp("sim"), 64 * 256)


# ---- barriers in shared memory ----


@pytest.mark.parametrize("order", ORDERS)
def test_phases_of_a_barrier_hand_over(kernels: SimKernels, order: str) -> None:
    results = kernels.results_of("phases", 0, order, 512)

    assert [results[128 * phase + 32 : 128 * phase + 128] for phase in range(4)] == [[10.0 * phase + 1] * 96 for phase in range(4)]


@pytest.mark.parametrize("order", ORDERS)
def test_waiting_for_the_wrong_phase_is_seen(kernels: SimKernels, order: str) -> None:
    report = kernels.run("phases", WRONG_PHASE, order)

    assert report or [kernels.results[128 * phase + 40] for phase in range(4)] != [1.0, 11.0, 21.0, 31.0]


def test_phase_that_ends_early_is_seen(kernels: SimKernels) -> None:
    """The writer goes on when a third of the readers have read: some order lets it."""
    outcomes = [kernels.run("phases", EARLY, order) or list(kernels.results[:512]) for order in ORDERS]

    assert any(outcome != outcomes[0] for outcome in outcomes)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (LATE, "t0 in mbarrier.try_wait"),
        (NO_INIT, "there is no mbarrier"),
        (OVERWRITTEN, "was written over"),
    ],
)
def test_misuse_of_a_barrier_is_reported(kernels: SimKernels, fault: int, words: str) -> None:
    assert words in kernels.run("phases", fault)


# ---- copies ----


@pytest.mark.parametrize("order", ORDERS)
def test_bulk_copies_are_there_once_waited_for(kernels: SimKernels, order: str) -> None:
    for fault in (0, FENCED_WRITE):
        assert kernels.results_of("bulk", fault, order, 512) == NUMBERS[:512].tolist()


@pytest.mark.parametrize("order", ORDERS)
def test_bulk_copy_that_is_not_waited_for_is_missed(kernels: SimKernels, order: str) -> None:
    assert any(value != value for value in kernels.results_of("bulk", NO_WAIT, order, 512))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (UNFENCED, "fence_mbarriers"),
        (FEWER_BYTES, "128 threads wait: t0 in mbarrier.try_wait"),
        (MORE_BYTES, "128 threads wait: t0 in mbarrier.try_wait"),
        (ODD_BYTES, "a bulk copy of 520 bytes: whole times 16"),
        (UNFENCED_WRITE, "is not fenced"),
        (LEFT, "a bulk copy is on its way when the block ends"),
        (TWICE, "more arrivals than the 1 that"),
    ],
)
def test_misuse_of_a_copy_is_reported(kernels: SimKernels, fault: int, words: str) -> None:
    assert words in kernels.run("bulk", fault)


@pytest.mark.parametrize("corner", [(0, 0, 0), (8, 3, 4), (-8, 18, 1), (16, -2, 4), (0, 0, 5), (0, 0, -1), (72, 5, 2)])
@pytest.mark.parametrize("order", ["forward", "random"])
def test_box_is_swizzled_and_zero_outside(kernels: SimKernels, corner: tuple[int, int, int], order: str) -> None:
    column, row, plane = corner
    padded = torch.zeros(15, 60, 272)
    padded[5:10, 20:40, 100:172] = NUMBERS[: 5 * 20 * 72].view(5, 20, 72)
    expected = padded[plane + 5, row + 20 : row + 28, column + 100 : column + 164]

    argument = column + 100 + 1000 * (row + 100) + 1000000 * (plane + 100)
    laid_down = torch.tensor(kernels.results_of("box", argument, order, 512)).view(8, 8, 8)

    chunks = torch.arange(8)[None] ^ torch.arange(8)[:, None]
    assert torch.equal(laid_down.gather(1, chunks[..., None].expand(8, 8, 8)).flatten(1), expected)


def test_map_that_a_driver_refuses_is_refused(kernels: SimKernels) -> None:
    assert "a driver refuses" in kernels.run("refused_map", 73)
    assert kernels.run("refused_map", 80) == ""


# ---- matrices ----


@pytest.mark.parametrize("order", ORDERS)
def test_stored_matrices_are_loaded_back(kernels: SimKernels, order: str) -> None:
    """Number 8 lane + 2 j + i in register j: row lane / 4, column 2 (lane % 4) + i of matrix j."""
    stored = torch.arange(256).view(8, 4, 4, 2).permute(2, 0, 1, 3).reshape(4, 8, 8)
    expected = stored.transpose(1, 2).view(4, 8, 4, 2).permute(1, 2, 0, 3).flatten()

    assert kernels.results_of("matrices", 0, order, 256) == expected.tolist()


# ---- products ----


def product(columns: int, kind: int) -> Tensor:
    a, b = NUMBERS[:2048].view(64, 32), NUMBERS[2048 : 2048 + 32 * columns]
    return a @ (b.view(32, columns) if kind & TRANSPOSED else b.view(columns, 32).T)


# 64 transposed columns lie together
WIDTHS = [(columns, kind) for columns in (8, 16, 32, 64, 128, 256) for kind in range(8) if columns >= 64 or not kind & TRANSPOSED]


@pytest.mark.parametrize(("columns", "kind"), WIDTHS)
@pytest.mark.parametrize("order", ["forward", "random"])
def test_products_of_four_warps(kernels: SimKernels, columns: int, kind: int, order: str) -> None:
    results = kernels.results_of("products", columns + 100000 * kind, order, 64 * columns)

    assert torch.equal(torch.tensor(results).view(64, columns).int(), product(columns, kind).int())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (NO_FENCE, "without wgmma.fence"),
        (NO_PROXY_FENCE, "what thread 0 wrote at shared address"),
        (NO_COMMIT, "wgmma.wait_group before wgmma.commit_group"),
        (EARLY_WRITE, "registers of D are written before the wait"),
        (LATE_LEFT, "changes registers of A before the wait"),
        (FEW_LANES, "127 threads wait: t0 in wgmma.wait_group"),
        (DIFFERENT, "differ in descriptors"),
    ],
)
def test_misuse_of_products_is_reported(kernels: SimKernels, fault: int, words: str) -> None:
    kind = 0 if fault == NO_PROXY_FENCE else IN_REGISTERS

    assert words in kernels.run("products", 64 + 1000 * fault + 100000 * kind)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", [EARLY_READ, ONE_WAIT])
def test_sums_that_are_not_waited_for_are_no_numbers(kernels: SimKernels, fault: int, order: str) -> None:
    results = kernels.results_of("products", 64 + 1000 * fault, order, 64)

    assert any(value != value for value in results)


# ---- registers ----


def test_registers_move_between_warp_groups(kernels: SimKernels) -> None:
    assert kernels.run("registers", 0) == ""
    assert "setmaxnreg: 68608 registers in all" in kernels.run("registers", 1)
    assert "in setmaxnreg" in kernels.run("registers", 2)
