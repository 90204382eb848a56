"""What the ranks of a model do together: sum, gather, follow rank 0's plans. Layers and engine see only this."""

import torch

from lmi_dist.parallel import Ranks


class Link:
    """One rank's end of what joins them; this one is alone, and everything is already where it should be."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x, in place, with equal bits on all: summed in fp32 in rank order, rounded once."""
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x: fp32 [R,V/ranks], as Ranks.slice cuts V. Gives [R,V] on rank 0; on the others x itself."""
        return x
