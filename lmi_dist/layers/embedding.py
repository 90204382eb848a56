"""The two ends of a model: token ids to hidden states, hidden states to logits."""

import torch

from lmi_dist import ops
from lmi_dist.batch import ForwardBatch
from lmi_dist.layers.linear import Linear
from lmi_dist.link import Link
from lmi_dist.quant.unquantized import share
from lmi_dist.weights import Weights


class Embedding:
    """Rows of a table [V,E], times `scale`; each rank holds some of the vocabulary."""

    def __init__(self, table: torch.Tensor, first_id: int, link: Link, scale: float = 1.0) -> None:
        self.table, self.first_id, self.link, self.scale = table, first_id, link, scale

    @classmethod
    def load(cls, weights: Weights, prefix: str, vocab_size: int, hidden_size: int, *, scale: float = 1.0) -> "Embedding":
        mine = weights.ranks.slice(vocab_size, "vocab_size")
        return cls(weights.tensor(f"{prefix}.weight", (vocab_size, hidden_size), mine), mine.start, weights.link, scale)

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """[T,E]; what a batch brings as embeddings is taken as it is."""
        if batch.embeddings is not None:
            return batch.embeddings
        return self.link.all_reduce(ops.embedding(batch.ids, self.table, first_id=self.first_id, scale=self.scale))


class Positions:
    """Learned positions (Gehring et al. 2017): position p is row p + offset of a table [positions + offset,E]."""

    def __init__(self, table: torch.Tensor, offset: int) -> None:
        self.table, self.offset = table, offset

    @classmethod
    def load(cls, weights: Weights, prefix: str, num_positions: int, hidden_size: int, *, offset: int = 0) -> "Positions":
        return cls(weights.tensor(f"{prefix}.weight", (num_positions + offset, hidden_size)), offset)

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """x: [T,E]; gives it with its positions added."""
        return ops.embedding(batch.positions, self.table, first_id=-self.offset, residual=x)


def output_rows(x: torch.Tensor, batch: ForwardBatch, *, scale: float = 1.0) -> torch.Tensor:
    """The rows of x [T,E] whose logits are wanted, times `scale`: [R,E]."""
    return ops.embedding(batch.output_rows, x, scale=scale)


class Head:
    """Logits of the wanted rows only, in fp32: the sampler compares them, and bf16 would make ties. Each rank works out its part
    of the vocabulary, rank 0 gets all."""

    def __init__(self, linear: Linear, vocab_size: int, link: Link) -> None:
        self.linear, self.vocab_size, self.link = linear, vocab_size, link

    @classmethod
    def load(
        cls,
        weights: Weights,
        prefix: str,
        vocab_size: int,
        hidden_size: int,
        *,
        bias: bool = False,
        tied: Embedding | None = None,
    ) -> "Head":
        """`tied`: the embedding, if `prefix` is its. Where weights are packed the head has a copy of its own, else the table."""
        weight = None if tied is None else share(tied.table)
        linear = Linear.load(weights, [prefix], "outputs", inputs=hidden_size, outputs=[vocab_size], bias=bias, weight=weight)
        return cls(linear, vocab_size, weights.link)

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """x: [R,E]; gives fp32 [R,V] on rank 0, on the others their part of it."""
        return self.link.gather(self.linear(x, batch, out_dtype=torch.float32), self.vocab_size)
