"""Sums over ranks by the GPUs themselves: each rank a process with a stand-in of its own, whose memory the others map."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from kernel_cases import DTYPES, rand, same_bits
from torch import Tensor

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library

pytestmark = pytest.mark.sim_column

MAX_BYTES = 600 << 10  # more than all blocks take at once
NUMBERS = (1, 7, 33, 4096, 8191, 150_001)


def term(rank: int, number: int, dtype: torch.dtype, call: int = 0) -> Tensor:
    return rand(number, dtype=dtype, seed=1000 * call + 97 * number + rank)


def total(size: int, *case: Any) -> Tensor:
    """In fp32 in rank order, rounded once."""
    terms = [term(rank, *case) for rank in range(size)]
    return sum((each.float() for each in terms[1:]), terms[0].float()).to(terms[0].dtype)


def run(folder: Path, size: int, body: Callable[[ops.Peers, int], Any]) -> list[Any]:
    """body(peers, rank) of all ranks, with the column that is chosen."""

    def join(link: Any) -> Any:
        rank, store = link.ranks.rank, dist.FileStore(str(folder / "store"), size)
        peers = ops.Peers(rank, size, MAX_BYTES)
        store.set(str(rank), peers.handle)
        peers.map([store.get(str(other)) for other in range(size)])
        return body(peers, rank)

    return ranks.run(size, join)


@pytest.mark.parametrize("size", [2, 4])
def test_sum_is_in_rank_order_and_rounded_once(library: Library, size: int, tmp_path: Path) -> None:
    cases = [(number, dtype) for number in NUMBERS for dtype in DTYPES]

    results = run(tmp_path, size, lambda peers, rank: [peers.all_reduce(term(rank, *case)) for case in cases])

    for index, case in enumerate(cases):
        assert all(same_bits(result[index], total(size, *case)) for result in results), case


def test_message_may_begin_anywhere_on_each_rank(library: Library, tmp_path: Path) -> None:
    def add(peers: ops.Peers, rank: int) -> Tensor:
        memory = torch.full((200,), 7.0, dtype=torch.bfloat16)
        peers.all_reduce(memory[3 * rank : 3 * rank + 99].copy_(term(rank, 99, torch.bfloat16)))
        return memory

    for rank, memory in enumerate(run(tmp_path, 2, add)):
        assert same_bits(memory[3 * rank : 3 * rank + 99], total(2, 99, torch.bfloat16))
        assert (memory == 7.0).sum() >= 101


@pytest.mark.parametrize("late", [None, 0, 1])
def test_many_calls_in_a_row_keep_apart(library: Library, late: int | None, tmp_path: Path) -> None:
    """Of sizes that take more blocks and fewer; one rank comes late to every fifth."""
    numbers = [(37, 5000, 9001)[call % 3] for call in range(60)]

    def add(peers: ops.Peers, rank: int) -> list[Tensor]:
        sums = []
        for call, number in enumerate(numbers):
            if rank == late and call % 5 == 0:
                time.sleep(0.02)
            sums.append(peers.all_reduce(term(rank, number, torch.float32, call)))
        return sums

    results = run(tmp_path, 2, add)

    for call, number in enumerate(numbers):
        assert all(same_bits(result[call], total(2, number, torch.float32, call)) for result in results), call


def test_recorded_sum_is_made_again_by_the_same_call(library: Library, tmp_path: Path) -> None:
    """As a CUDA graph does: what tells one call from the next is not among the arguments."""

    def add(peers: ops.Peers, rank: int) -> list[Tensor]:
        x = term(rank, 100, torch.float32)
        _, recording = ops.Recorder(ops.Arena(1), 1).run(lambda: peers.all_reduce(x))
        assert recording is not None
        sums = []
        for call in range(1, 6):
            x.copy_(term(rank, 100, torch.float32, call))
            recording.replay()
            sums.append(x.clone())
        return sums

    for sums in run(tmp_path, 2, add):
        assert all(same_bits(x, total(2, 100, torch.float32, call)) for call, x in enumerate(sums, 1))


@pytest.mark.parametrize(
    ("rank", "size", "what"), [(0, 1, "size=1 must be 2 to 8"), (8, 9, "size=9"), (2, 2, "rank=2 must be 0 to 1")]
)
def test_group_that_cannot_be_is_refused(library: Library, rank: int, size: int, what: str) -> None:
    with pytest.raises(KernelError, match=f"peers_create: {what}"):
        ops.Peers(rank, size, MAX_BYTES)


def test_message_that_cannot_be_is_refused(library: Library) -> None:
    peers = ops.Peers(0, 2, 64)
    assert (peers.takes(torch.ones(16)), peers.takes(torch.ones(17))) == (True, False)

    for x, what in (
        (torch.ones(17), "bytes of x=68 must be 0 to 64"),
        (torch.ones(2, 4)[:, :2], "x has gaps"),
        (torch.ones(2, dtype=torch.int32), "x has dtype|x is"),
        (torch.ones(2), "memory is not mapped"),
    ):
        with pytest.raises(KernelError, match=f"peer_all_reduce: .*(?:{what})"):
            peers.all_reduce(x)


def test_process_that_has_gone_cannot_be_mapped(library: Library) -> None:
    (handle, _) = ranks.run(2, lambda link: ops.Peers(link.ranks.rank, 2, 64).handle)
    peers = ops.Peers(1, 2, 64)

    with pytest.raises(KernelError, match="peers_map: another rank's memory: No such file or directory"):
        peers.map([handle, peers.handle])


@pytest.mark.parametrize("column", ["cpu", "torch"])
def test_other_columns_have_no_peers(column: str) -> None:
    with ops.using(column, 1), pytest.raises(KernelError, match=r"this column has no GPUs|the torch column has no memory"):
        ops.Peers(0, 2, 64)
