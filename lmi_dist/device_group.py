"""Sums and gathers between ranks whose tensors lie on GPUs, by torch.distributed: NCCL there, gloo for tests on CPUs.

NCCL only carries: what is added is added here, in rank order, so that the bits are those of every other link and equal on
all ranks.
"""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from lmi_dist.errors import RankError
from lmi_dist.parallel import Ranks

TIMEOUT_S = 60.0  # for all ranks to come
ONE_SHOT_BYTES = 256 << 10  # all that a rank gets at once; above it each rank sums a part, and twice as little is carried
# by the name that it has since torch 2.13, or the one it had before
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class DeviceGroup:
    """This rank among all. Every rank makes the same calls in the same order; on a GPU they return before they have run. There is
    one group in a process' life."""

    def __init__(self, ranks: Ranks, store: Path, place: torch.device, backend: str = "nccl") -> None:
        """store: a file that all ranks can write, and that is not there yet. Raises RankError if one does not come."""
        self.ranks = ranks
        try:
            dist.init_process_group(
                backend,
                store=dist.FileStore(str(store), ranks.size),  # type: ignore[attr-defined]  # it is documented there
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=timedelta(seconds=TIMEOUT_S),
                device_id=place if backend == "nccl" else None,
            )
        except RuntimeError as error:  # torch's own kinds are among these
            raise RankError(f"the ranks could not be joined by {backend}: {str(error).splitlines()[0]}") from error

    def all_reduce(self, x: Tensor) -> Tensor:
        """x := sum of all ranks' x, in fp32 in rank order, rounded once; of one shape and dtype on all, without gaps. Returns x."""
        size, flat = self.ranks.size, x.view(-1)
        if flat.nbytes * size <= ONE_SHOT_BYTES:
            every = flat.new_empty((size, flat.numel()))
            all_gather_single(every.view(-1), flat)
            flat.copy_(_sum(every))
            return x
        part = -(-flat.numel() // size)
        padded = functional.pad(flat, (0, part * size - flat.numel()))
        mine = torch.empty_like(padded)
        dist.all_to_all_single(mine, padded)  # part r of every rank's x to rank r
        all_gather_single(padded, _sum(mine.view(size, part)).to(x.dtype))
        flat.copy_(padded[: flat.numel()])
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """x: fp32 [R,widths[rank]]. Gives [R,sum(widths)] on rank 0, x on the others."""
        most = max(widths)
        padded = functional.pad(x, (0, most - x.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in widths] if self.ranks.rank == 0 else None
        dist.gather(padded, parts, dst=0)
        return x if parts is None else torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)


def _sum(terms: Tensor) -> Tensor:
    """terms: [ranks,n]; fp32 [n], added one after the other."""
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total
