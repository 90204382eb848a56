"""Sums and gathers between ranks whose tensors lie on GPUs: small sums by a kernel of ours in memory that the GPUs have mapped from
each other, all else by torch.distributed: NCCL there, gloo for tests on CPUs.

NCCL only carries: what is added is added here, in rank order, so that the bits are those of our kernel and of every other link, and
equal on all ranks.
"""

import logging
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from lmi_dist.errors import KernelError, RankError
from lmi_dist.ops import Peers
from lmi_dist.parallel import Ranks

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0  # for all ranks to come
# What a GPU reads for one sum by our kernel at most: a message a rank. By NVLink (some 400 GB/s) 2 MiB take 5 us, about what NCCL
# takes to begin; of more, reading all on each rank costs more than that. Not measured yet on several GPUs.
PEER_BYTES = 2 << 20
ONE_SHOT_BYTES = 256 << 10  # of NCCL: all that a rank gets at once; above it each rank sums a part, and twice as little is carried
# by the name that it has since torch 2.13, or the one it had before
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class DeviceGroup:
    """This rank among all. Every rank makes the same calls in the same order; on a GPU they return before they have run. There is
    one group in a process' life."""

    def __init__(self, ranks: Ranks, store: Path, place: torch.device, backend: str = "nccl") -> None:
        """store: a file that all ranks can write, and that is not there yet. Raises RankError if one does not come."""
        self.ranks, self._place = ranks, place
        meeting = dist.FileStore(str(store), ranks.size)  # type: ignore[attr-defined]  # it is documented there
        try:
            dist.init_process_group(
                backend,
                store=meeting,
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=timedelta(seconds=TIMEOUT_S),
                device_id=place if backend == "nccl" else None,
            )
        except RuntimeError as error:  # torch's own kinds are among these
            raise RankError(f"the ranks could not be joined by {backend}: {str(error).splitlines()[0]}") from error
        self._peers = self._join_peers(meeting, backend)

    def _join_peers(self, meeting: Any, backend: str) -> Peers | None:
        """What small sums go through; None on all ranks where one of them cannot reach another's GPU."""
        ranks = self.ranks
        peers, obstacle = None, "another rank says why"
        try:
            peers = Peers(ranks.rank, ranks.size, PEER_BYTES // ranks.size)
        except KernelError as error:
            obstacle = str(error)
        meeting.set(f"peers/{ranks.rank}", b"" if peers is None else peers.handle)
        handles = [meeting.get(f"peers/{rank}") for rank in range(ranks.size)]
        try:
            if peers is not None and all(handles):
                peers.map(handles)
        except KernelError as error:
            peers, obstacle = None, str(error)
        if not all(handles) or not self._do_all(peers is not None):
            logger.info("sums over ranks go through %s alone: %s", backend, obstacle)
            return None
        logger.info("sums over ranks of up to %d KiB go through the GPUs' own memory", PEER_BYTES // ranks.size >> 10)
        return peers

    def _do_all(self, claim: bool) -> bool:
        """Whether all ranks claim it."""
        claims = torch.empty(self.ranks.size, dtype=torch.int32, device=self._place)
        all_gather_single(claims, torch.full((1,), int(claim), dtype=torch.int32, device=self._place))
        return all(claims.tolist())

    def all_reduce(self, x: Tensor) -> Tensor:
        """x := sum of all ranks' x, in fp32 in rank order, rounded once; of one shape and dtype on all, without gaps. Returns x."""
        if self._peers is not None and self._peers.takes(x):
            return self._peers.all_reduce(x)
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
