"""The feed-forward block, with a gate or without."""

from functools import partial

import torch

from lmi_dist import ops
from lmi_dist.batch import ForwardBatch
from lmi_dist.layers.linear import Linear
from lmi_dist.weights import Weights

# config.json's hidden_act to the kernels' name
ACTIVATIONS: dict[str, ops.Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}


class MLP:
    """down(act(up(x))) (Vaswani et al. 2017). x: [T,E]"""

    def __init__(self, up: Linear, down: Linear, activation: ops.Activation) -> None:
        self.up, self.down, self.activation = up, down, activation

    @classmethod
    def load(
        cls,
        weights: Weights,
        up: str,
        down: str,
        *,
        hidden: int,
        feed_forward: int,
        activation: str,
        bias: bool = True,
        transposed: bool = False,
    ) -> "MLP":
        """`activation`: a key of ACTIVATIONS; `transposed`: both linears are in the file."""
        load = partial(Linear.load, weights, bias=bias, transposed=transposed)
        return cls(
            load([up], "outputs", inputs=hidden, outputs=[feed_forward]),
            load([down], "inputs", inputs=feed_forward, outputs=[hidden]),
            ACTIVATIONS[activation],
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.down(self.up(x, batch, activation=self.activation), batch, residual=residual)


class GatedMLP:
    """down(act(gate(x)) * up(x)) (Shazeer 2020, GLU variants). x: [T,E]"""

    def __init__(self, gate_up: Linear, down: Linear, activation: ops.Activation) -> None:
        self.gate_up, self.down, self.activation = gate_up, down, activation

    @classmethod
    def load(
        cls,
        weights: Weights,
        gate: str,
        up: str,
        down: str,
        *,
        hidden: int,
        feed_forward: int,
        activation: str,
        bias: bool = False,
    ) -> "GatedMLP":
        """`activation`: a key of ACTIVATIONS. Where `gate` and `up` are the same name, that linear holds one above the other."""
        mine, size = weights.ranks.slice(feed_forward, gate), feed_forward
        parts = [mine, mine]
        if gate == up:
            size, parts = 2 * feed_forward, [mine, slice(mine.start + feed_forward, mine.stop + feed_forward)]
        gate_up = Linear.load(
            weights, [gate, up], "outputs", inputs=hidden, outputs=[size, size], parts=parts, bias=bias, gated=True
        )
        return cls(
            gate_up,
            Linear.load(weights, [down], "inputs", inputs=feed_forward, outputs=[hidden], bias=bias),
            ACTIVATIONS[activation],
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.down(self.gate_up(x, batch, activation=self.activation), batch, residual=residual)
