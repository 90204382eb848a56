"""What every decoder does around its layers: embed the tokens, run the layers, normalise, and score the vocabulary."""

from collections.abc import Callable, Sequence

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ModelConfig
from lmi_dist.layers.embedding import Embedding, Head, output_rows
from lmi_dist.layers.rotary import Rotary
from lmi_dist.weights import Weights


class Decoder:
    """The frame that an architecture fills in its constructor. `rotary`: None where positions come in another way."""

    ignored: tuple[str, ...] = ()
    rotary: Rotary | None = None
    tokens: Embedding
    layers: Sequence[Callable[[torch.Tensor, ForwardBatch], torch.Tensor]]  # x: [T,E] to [T,E]
    norm: Callable[[torch.Tensor], torch.Tensor]
    head: Head

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """fp32 logits [R,V] of the batch's output rows."""
        batch = batch if self.rotary is None else self.rotary(batch)
        x = self.embed(batch)
        for layer in self.layers:
            x = layer(x, batch)
        return self.score(output_rows(x, batch), batch)

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """[T,E]"""
        return self.tokens(batch)

    def score(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """x: [R,E] behind the last layer; gives logits, fp32 [R,V]."""
        return self.head(self.norm(x), batch)

    def cache_regime(self, prompt_length: int) -> str:
        return "" if self.rotary is None else self.rotary.regime(prompt_length)

    def load_ends(
        self, config: ModelConfig, weights: Weights, tokens: str, head: str, *, scale: float = 1.0, bias: bool = False
    ) -> None:
        """The embedding `tokens` and the head `head`, which is the embedding's own table where the two are tied; a checkpoint may
        then hold the head for nothing."""
        vocab, hidden = config.vocab_size, config.hidden_size
        self.tokens = Embedding.load(weights, tokens, vocab, hidden, scale=scale)
        tied = self.tokens if config.tied_embeddings else None
        self.head = Head.load(weights, tokens if tied else head, vocab, hidden, bias=bias, tied=tied)
        if tied:
            self.ignored = (*self.ignored, rf"{head}\.weight")
