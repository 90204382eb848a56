"""Ranks without a launcher: processes forked from the test, quick to start, that find each other at a meeting made before."""

import hashlib
import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import driving
import torch
from driving import Course

from lmi_dist.link import Link
from lmi_dist.local_link import FollowerLink
from lmi_dist.meeting import Meeting, join
from lmi_dist.parallel import Ranks
from lmi_dist.plan import Plan


class Group:
    """So many ranks, each running body(link), or with `rounds` body(link, number) for one after the other, each with a new link."""

    def __init__(self, size: int, body: Callable[..., Any], rounds: int | None = None) -> None:
        self._meetings = [Meeting() for _ in range(rounds or 1)]
        self._has_rounds = rounds is not None
        self._ends: list[int] = []
        self.pids = [self._start(Ranks(rank, size), body) for rank in range(size)]

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)  # one that has ended is not reaped yet, so the number is still its own
            os.waitpid(pid, 0)
        for meeting in self._meetings:
            meeting.__exit__()

    def results(self) -> list[Any]:
        """What each rank's body gave, or a list of it with `rounds`; None of a rank that was killed. Raises AssertionError with the
        traceback if one raised."""
        results = []
        for rank, end in enumerate(self._ends):
            with os.fdopen(end, "rb") as stream:
                data = stream.read()
            failure, value = pickle.loads(data) if data else ("", None)
            assert not failure, f"rank {rank}: {failure}"
            results.append(value)
        return results

    def _start(self, ranks: Ranks, body: Callable[..., Any]) -> int:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: those of the kernels know
            pid = os.fork()
        if pid:
            os.close(writing)
            self._ends.append(reading)
            return pid
        try:
            outcome = ("", self._run(ranks, body))
        except BaseException:
            outcome = (traceback.format_exc(), None)
        with os.fdopen(writing, "wb") as stream:
            stream.write(pickle.dumps(outcome))
        os._exit(0)

    def _run(self, ranks: Ranks, body: Callable[..., Any]) -> Any:
        if not self._has_rounds:
            return body(self._link(ranks, self._meetings[0]))
        return [body(self._link(ranks, meeting), number) for number, meeting in enumerate(self._meetings)]

    @staticmethod
    def _link(ranks: Ranks, meeting: Meeting) -> Link:
        if ranks.size == 1:
            return Link(ranks)
        return meeting.lead(ranks) if ranks.rank == 0 else join(ranks, meeting.invitation)


def run(size: int, body: Callable[..., Any], rounds: int | None = None) -> list[Any]:
    """The results of all ranks."""
    with Group(size, body, rounds) as group:
        return group.results()


def continue_prompts(
    link: Any,
    folder: Path,
    prompts: list[Any],
    dtype: str = "fp32",
    drive: Callable[..., dict[int, Course]] = driving.run,
    **values: Any,
) -> tuple[str, list[Course]]:
    """On every rank a digest of all sums over ranks; on rank 0 also what became of the prompts, which run together in batches.
    `drive`: as driving.run, for prompts that are more than token ids; `values`: settings."""
    digest = note_sums(link)
    values |= {"tensor_parallel_degree": link.ranks.size, "enforce_eager": True}  # so that all sums are seen
    runner = driving.make_runner(folder, link=link, dtype=dtype, **values)
    if isinstance(link, FollowerLink):
        while (plan := link.next_plan()) is not None:
            runner.forward(plan)
        return digest.hexdigest(), []
    scheduler = driving.make_scheduler(runner, prefill_chunk_tokens=20)
    courses = drive(publishing(runner, link), scheduler, dict(enumerate(prompts)))
    link.close()
    return digest.hexdigest(), list(courses.values())


def publishing(runner: Any, link: Link) -> Any:
    """The runner, which from now on publishes what it runs, as an engine does."""
    plain = runner.forward

    def forward(plan: Plan) -> torch.Tensor:
        link.publish(plan)
        logits: torch.Tensor = plain(plan)
        return logits

    runner.forward = forward
    return runner


def note_sums(link: Any) -> "hashlib._Hash":
    """A digest of all that the link sums up from now on."""
    digest, plain = hashlib.sha256(), link.all_reduce

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = plain(x)
        digest.update(total.contiguous().view(torch.uint8).numpy().tobytes())
        return total

    link.all_reduce = all_reduce
    return digest
