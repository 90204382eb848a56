"""What GPUs' ranks do through torch.distributed, with gloo in NCCL's place and tensors on the CPU: the same calls in
the same order."""

from pathlib import Path
from typing import Any

import driving
import pytest
import ranks
import tiny_models
import torch

from lmi_dist import ops
from lmi_dist.device_group import ONE_SHOT_BYTES, DeviceGroup
from lmi_dist.errors import DeviceError, KernelError, RankError
from lmi_dist.parallel import Ranks
from lmi_dist.plan import Plan

NUMBERS = (1, 33, 4096, ONE_SHOT_BYTES // 8, ONE_SHOT_BYTES // 8 + 1, 400_001)  # both ways of summing, odd sizes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


def term(rank: int, number: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(97 * number + rank)).to(dtype)


def begin(link: Any) -> None:
    link.publish(Plan(0)) if link.ranks.rank == 0 else link.next_plan()


@pytest.mark.parametrize("size", [2, 3])
def test_sum_is_in_rank_order_and_rounded_once(size: int, tmp_path: Path) -> None:
    cases = [(number, dtype) for number in NUMBERS for dtype in DTYPES]

    def sums(link: Any) -> list[torch.Tensor]:
        link.join_gpus(tmp_path / "store", CPU, "gloo")
        return [link.all_reduce(term(link.ranks.rank, *case)) for case in cases]

    with ranks.Group(size, sums) as group:
        results = group.results()

    for index, (number, dtype) in enumerate(cases):
        total = term(0, number, dtype).float()
        for rank in range(1, size):
            total = total + term(rank, number, dtype).float()
        for result in results:
            assert torch.equal(result[index], total.to(dtype)), (number, dtype)


def test_small_sums_go_through_the_gpus_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-in, whose ranks map each other's memory: up to a size, and with the bits of the other way."""
    monkeypatch.setattr("lmi_dist.device_group.PEER_BYTES", 1 << 16)
    numbers = (1, 8191, 8192, 8193, 20_001)

    def sums(link: Any) -> tuple[list[torch.Tensor], int]:
        with ops.using("sim", 1):
            link.join_gpus(tmp_path / "store", CPU, "gloo")
            summed, plain = [], ops.Peers.all_reduce

            def note(peers: ops.Peers, x: torch.Tensor) -> torch.Tensor:
                summed.append(x.numel())
                return plain(peers, x)

            monkeypatch.setattr(ops.Peers, "all_reduce", note)
            return [link.all_reduce(term(link.ranks.rank, number, torch.float32)) for number in numbers], summed

    with ranks.Group(2, sums) as group:
        for result, summed in group.results():
            assert summed == [1, 8191, 8192]
            for number, x in zip(numbers, result, strict=True):
                assert torch.equal(x, term(0, number, torch.float32) + term(1, number, torch.float32))


def test_gpu_that_cannot_be_reached_leaves_all_to_nccl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(peers: ops.Peers, handles: list[bytes]) -> None:
        raise KernelError("peers_map: another GPU's memory cannot be mapped: peer access is not supported")

    def sums(link: Any) -> tuple[torch.Tensor, list[str]]:
        caplog.set_level("INFO", "lmi_dist.device_group")
        if link.ranks.rank == 1:
            monkeypatch.setattr(ops.Peers, "map", refuse)
        with ops.using("sim", 1):
            link.join_gpus(tmp_path / "store", CPU, "gloo")
            monkeypatch.setattr(ops.Peers, "all_reduce", lambda *_: pytest.fail("one of them cannot"))
            return link.all_reduce(term(link.ranks.rank, 5, torch.float32)), [record.getMessage() for record in caplog.records]

    with ranks.Group(2, sums) as group:
        (first, others), (second, own) = group.results()

    assert torch.equal(first, second)
    assert others[-1] == "sums over ranks go through gloo alone: another rank says why"
    assert own[-1].endswith("gloo alone: peers_map: another GPU's memory cannot be mapped: peer access is not supported")


def test_shape_stays_and_the_sum_is_in_place(tmp_path: Path) -> None:
    def add(link: Any) -> tuple[bool, torch.Tensor]:
        link.join_gpus(tmp_path / "store", CPU, "gloo")
        x = torch.full((3, 5), float(link.ranks.rank + 1))
        return link.all_reduce(x) is x, x

    with ranks.Group(2, add) as group:
        assert all(same and torch.equal(x, torch.full((3, 5), 3.0)) for same, x in group.results())


def test_gather_joins_unequal_parts_on_rank_0(tmp_path: Path) -> None:
    def gather(link: Any) -> torch.Tensor:
        link.join_gpus(tmp_path / "store", CPU, "gloo")
        mine = link.ranks.slice(7, "columns")
        return link.gather(torch.arange(14.0).view(2, 7)[:, mine].contiguous(), 7)

    with ranks.Group(3, gather) as group:
        first, *others = group.results()

    assert torch.equal(first, torch.arange(14.0).view(2, 7))
    assert [tuple(other.shape) for other in others] == [(2, 2), (2, 3)]


def test_failed_step_ends_all_ranks(tmp_path: Path) -> None:
    """They could only wait for it: what a GPU waits for is not left."""

    def fail(link: Any) -> str:
        link.join_gpus(tmp_path / "store", CPU, "gloo")
        begin(link)
        if link.ranks.rank == 0:
            return ""
        with pytest.raises(DeviceError) as told:
            link.drop(ValueError("no"))
        return str(told.value)

    with ranks.Group(2, fail) as group:
        assert "rank 1 has failed in a step in which the GPUs of the others wait for it" in group.results()[1]


def test_rank_that_does_not_come_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmi_dist.device_group.TIMEOUT_S", 0.5)

    with pytest.raises(RankError, match="the ranks could not be joined by gloo: "):
        DeviceGroup(Ranks(0, 2), tmp_path / "store", CPU, "gloo")


def test_model_over_the_group_says_what_it_says_over_shared_memory(tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path / "model")

    def logits(link: Any, backend: str) -> torch.Tensor:
        if backend:
            link.join_gpus(tmp_path / "store", CPU, backend)
        with ops.using("cpu", 1):
            runner = driving.make_runner(folder, link=link, tensor_parallel_degree=2)
            begin(link)
            return driving.logits_at_every_position(runner, tiny_models.prompt_of(9))

    told = []
    for backend in ("", "gloo"):
        with ranks.Group(2, lambda link, backend=backend: logits(link, backend)) as group:
            told.append(group.results()[0])
    assert torch.equal(*told)
