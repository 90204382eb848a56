"""What the ranks of a model do together: load, sum, gather, follow rank 0's plans, answer alike. Layers and engine see only this.

`Link` is one rank alone; local_link.py joins those of one machine, meeting.py makes the link that the launcher asks for.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lmi_dist.parallel import Ranks
from lmi_dist.plan import Plan


class Link:
    """One rank's end of what joins them; this one is alone, and everything is already where it should be.

    Whatever has to wait for another rank raises RankError when that has ended, or has dropped the step. All calls are one thread's,
    but those about replies, which may be another's.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()

    # ---- inside a step, on all ranks alike ----

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x, in place, with equal bits on all: added in fp32 in rank order, rounded once. x has no gaps."""
        return x

    def gather(self, x: torch.Tensor, num_columns: int) -> torch.Tensor:
        """x: fp32 [R, this rank's share of the columns by Ranks.slice]. Gives [R,num_columns] on rank 0, x on the others."""
        return x

    def drop(self, error: Exception) -> None:
        """This rank cannot finish the step: the others leave it too and wait for the next plan. On GPUs they cannot leave it, and
        DeviceError is raised: all ranks must end."""

    def join_gpus(self, store: Path, place: torch.device, backend: str = "nccl") -> None:
        """From now on tensors lie on GPUs, this rank's on `place`. store: see DeviceGroup. Raises RankError."""

    # ---- around steps, on rank 0 ----

    @property
    def has_lost_a_rank(self) -> bool:
        """Another rank has ended; to be asked when a step has failed."""
        return False

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks get through this, or none: an error in it on one of them is raised on each."""
        yield

    def share_setup(self, setup: Mapping[str, Any]) -> None:
        """Tell the others, inside `together`, what they need to load the model. setup: what JSON can hold."""

    def publish(self, plan: Plan) -> None:
        """Begin a step, in which every rank runs this plan."""

    def publish_reply(self, reply: bytes) -> None:
        """What rank 0 has answered its host; the others' `await_reply` gives it, in order."""

    def close(self) -> None:
        """Let the others end: their `next_plan` gives None. Nothing may be called after it."""
