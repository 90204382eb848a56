"""What every decoder does around its layers: embed the tokens, run the layers, normalise, and score the vocabulary."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ModelConfig
from lmi_dist.layers.attention import SelfAttention
from lmi_dist.layers.embedding import Embedding, Head, output_rows
from lmi_dist.layers.rotary import Rotary
from lmi_dist.weights import Weights


class DecoderLayer(Protocol):
    """Hidden states to hidden states, [T,E]; attn reads what attn_norm makes of them."""

    attn_norm: Callable[[torch.Tensor], torch.Tensor]
    attn: SelfAttention

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor: ...

    def write_keys(self, x: torch.Tensor, batch: ForwardBatch) -> None:
        """No more than the keys and values of x [T,E]."""
        self.attn.write_keys(self.attn_norm(x), batch)


class Decoder:
    """The frame that an architecture fills in its constructor. `rotary`: None where positions come in another way."""

    ignored: tuple[str, ...] = ()
    rotary: Rotary | None = None
    tokens: Embedding
    layers: Sequence[DecoderLayer]
    norm: Callable[[torch.Tensor], torch.Tensor]
    head: Head

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """fp32 logits [R,V] of the batch's output rows."""
        batch = batch if self.rotary is None else self.rotary(batch)
        x = self.embed(batch)
        *inner, last = self.layers
        for layer in inner:
            x = layer(x, batch)
        return self.score(self._outputs(last, x, batch), batch)

    def _outputs(self, layer: DecoderLayer, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """The wanted rows behind the last layer, [R,E]: of all others nobody needs more than their keys."""
        if batch.output_starts is None:
            return output_rows(layer(x, batch), batch)
        layer.write_keys(x, batch)
        x = output_rows(x, batch)
        return layer(x, batch.outputs()) if len(x) else x

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
