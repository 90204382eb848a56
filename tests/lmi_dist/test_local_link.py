"""Ranks of one machine sum to equal bits, gather, drop a step together and notice each other's end."""

import json
import os
import resource
import signal
import socket
import time
from typing import Any

import pytest
import ranks
import torch

from lmi_dist.errors import CheckpointError, RankError
from lmi_dist.local_link import FollowerLink, LeaderLink, send
from lmi_dist.meeting import Meeting, join
from lmi_dist.parallel import Ranks
from lmi_dist.plan import Chunk, Encode, Image, Plan, Span

DECODE = Chunk(7, (5,), 3, (0, 1 << 20), 3, 1, 2, (4,), 9)
CHUNK = Chunk(7, (5, 6), 3, (0, 1 << 20), 5, 1, 2, (4,), 9, (Span(3, b"name", 0, 1),))
PLAN = Plan(3, (DECODE,), (CHUNK, CHUNK), (Encode(8, (1, 2), (3,)), Encode(9, image=Image(b"name", 4, (1,), (2, 3), b"\x00\xff"))))
NUMBERS = (1, 33, 4096, 40_000, 70_001, 400_000)  # both ways of summing, odd sizes, several chunks
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATIENCE_S = 5.0


def begin(link: Any, plan: Plan = PLAN) -> None:
    """A step, on either side."""
    if isinstance(link, LeaderLink):
        link.publish(plan)
    else:
        assert link.next_plan() == plan


def raised(kind: type[Exception], act: Any, *args: Any) -> str:
    """The sentence with which act(*args) fails, and it must fail soon."""
    started = time.monotonic()
    with pytest.raises(kind) as told:
        act(*args)
    assert time.monotonic() - started < PATIENCE_S
    return str(told.value)


def term(rank: int, number: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(97 * number + rank)).to(dtype)


# ---- sums and gathers ----


@pytest.mark.parametrize("size", [2, 3])
def test_sum_is_in_rank_order_and_rounded_once(size: int) -> None:
    cases = [(number, dtype) for number in NUMBERS for dtype in DTYPES]

    def sums(link: Any) -> list[torch.Tensor]:
        begin(link)
        return [link.all_reduce(term(link.ranks.rank, *case)) for case in cases]

    results = ranks.run(size, sums)

    for index, (number, dtype) in enumerate(cases):
        expected = term(0, number, dtype).float()
        for rank in range(1, size):
            expected += term(rank, number, dtype).float()
        for result in results:
            assert torch.equal(result[index], expected.to(dtype)), (number, dtype)


def test_sum_is_in_place_of_any_shape() -> None:
    def total(link: Any) -> bool:
        begin(link)
        x = torch.ones(3, 5, 7)
        return link.all_reduce(x) is x and bool((x == 2).all())

    assert ranks.run(2, total) == [True, True]


def test_rank_0_gathers_all_columns() -> None:
    shapes = [(1, 7), (0, 7), (3, 1001), (40, 12_345)]  # rows, columns; the last in several chunks
    wholes = [torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) for rows, columns in shapes]

    def gather(link: Any) -> list[torch.Tensor]:
        begin(link)
        parts = [whole[:, link.ranks.slice(whole.shape[1], "columns")].contiguous() for whole in wholes]
        return [link.gather(part, whole.shape[1]) for part, whole in zip(parts, wholes, strict=True)]

    gathered, *_ = ranks.run(3, gather)

    assert all(torch.equal(ours, whole) for ours, whole in zip(gathered, wholes, strict=True))


# ---- plans, replies, setup ----


def test_plans_arrive_as_published_until_the_end() -> None:
    long = Plan(4, (), (Chunk(1, tuple(range(40_000)), 0, tuple(range(2_500)), 40_000, 1),))

    def talk(link: Any) -> list[Plan | None]:
        if isinstance(link, FollowerLink):
            return [link.next_plan() for _ in range(3)]
        for plan in (PLAN, long):
            link.publish(plan)
        link.close()
        return []

    assert ranks.run(3, talk)[1:] == [[PLAN, long, None]] * 2


def test_replies_are_the_same_bytes_on_every_rank_in_order() -> None:
    replies = [b"", b"a" * 300_000, b"\x00last"]

    def answer(link: Any) -> list[bytes]:
        if isinstance(link, FollowerLink):
            return [link.await_reply() for _ in replies]
        for reply in replies:
            link.publish_reply(reply)
        begin(link)
        return replies

    assert ranks.run(3, answer) == [replies] * 3


def test_host_that_asks_only_rank_0_does_not_stop_it() -> None:
    def answer(link: Any) -> str:
        if isinstance(link, LeaderLink):
            for _ in range(1100):
                link.publish_reply(b"x" * 1000)
            link.close()
            return ""
        assert link.next_plan() is None
        time.sleep(0.3)
        return raised(RankError, link.await_reply)

    assert "1024 replies of rank 0 were not asked for" in ranks.run(2, answer)[1]


@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_error_of_one_is_raised_on_each(culprit: int, when: str) -> None:
    def load(link: Any) -> str:
        def work() -> None:
            with link.together():
                if culprit == link.ranks.rank and when == "before":
                    raise CheckpointError("model=x is not a folder")
                if isinstance(link, LeaderLink):
                    link.share_setup({"model": "x"})
                else:
                    assert link.await_setup() == {"model": "x"}
                if culprit == link.ranks.rank and when == "after":
                    raise CheckpointError("model=x is not a folder")

        return raised(CheckpointError, work)

    assert ranks.run(3, load) == ["model=x is not a folder"] * 3


def test_error_that_is_not_ours_names_rank_and_kind() -> None:
    def load(link: Any) -> str:
        def work() -> None:
            with link.together():
                if link.ranks.rank == 1:
                    raise ZeroDivisionError("by zero")

        return raised(ZeroDivisionError if link.ranks.rank == 1 else RankError, work)

    assert ranks.run(2, load) == ["rank 1 has failed: ZeroDivisionError: by zero", "by zero"]


# ---- when something goes wrong ----


@pytest.mark.parametrize("culprit", [0, 1])
def test_step_is_dropped_by_all_and_the_next_one_works(culprit: int) -> None:
    def work(link: Any) -> tuple[str, float]:
        for _ in range(3):
            begin(link)
            link.all_reduce(torch.ones(100_000))
            if link.ranks.rank == culprit:
                link.drop(ValueError("a bad batch"))
                message = ""
            else:
                message = raised(RankError, link.all_reduce, torch.ones(100_000))
        begin(link)
        return message, float(link.all_reduce(torch.ones(5))[0])

    results = ranks.run(3, work)

    assert [total for _, total in results] == [3.0] * 3
    for rank, (message, _) in enumerate(results):
        assert rank == culprit or f"rank {culprit} has dropped the step: ValueError: a bad batch" in message


@pytest.mark.parametrize(("victim", "place"), [(0, "sum"), (2, "sum"), (0, "plan"), (0, "reply")])
def test_killed_rank_is_noticed_wherever_one_waits(victim: int, place: str) -> None:
    def work(link: Any) -> str:
        begin(link)
        if link.ranks.rank == victim:
            time.sleep(60)
        act = {"sum": lambda: link.all_reduce(torch.ones(9))} | (
            {"plan": link.next_plan, "reply": link.await_reply} if isinstance(link, FollowerLink) else {}
        )
        return raised(RankError, act[place])

    with ranks.Group(3, work) as group:
        time.sleep(1.0)
        os.kill(group.pids[victim], signal.SIGKILL)
        messages = group.results()

    assert all("has ended" in message for rank, message in enumerate(messages) if rank != victim)


def test_idle_ranks_cost_nothing() -> None:
    def idle(link: Any) -> float:
        begin(link)
        before = resource.getrusage(resource.RUSAGE_SELF)
        if isinstance(link, LeaderLink):
            time.sleep(1.0)
            link.close()
        else:
            assert link.next_plan() is None
        after = resource.getrusage(resource.RUSAGE_SELF)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert sum(ranks.run(2, idle)) < 0.01


# ---- meeting ----


def test_stranger_is_sent_away(caplog: pytest.LogCaptureFixture) -> None:
    with Meeting() as meeting:
        pid = os.fork()
        if not pid:
            name, _ = json.loads(meeting.invitation)
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(name)
            send(stranger, b'["password", 1, "plans"]')
            link = join(Ranks(1, 2), meeting.invitation)
            os._exit(0 if link.next_plan() is None else 1)
        meeting.lead(Ranks(0, 2)).close()
        assert os.waitpid(pid, 0)[1] == 0
    assert "stranger" in caplog.text
