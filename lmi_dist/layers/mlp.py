"""The feed-forward block with a gate."""

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


class GatedMLP:
    """down(act(gate(x)) * up(x)) (Shazeer 2020, GLU variants). x: [T,E]"""

    def __init__(self, gate_up: Linear, down: Linear, activation: ops.Activation) -> None:
        self.gate_up, self.down, self.activation = gate_up, down, activation

    @classmethod
    def load(
        cls, weights: Weights, gate: str, up: str, down: str, *, hidden: int, feed_forward: int, activation: str, bias: bool
    ) -> "GatedMLP":
        """`activation`: a key of ACTIVATIONS."""
        sizes = [feed_forward, feed_forward]
        gate_up = Linear.load(weights, [gate, up], "outputs", inputs=hidden, outputs=sizes, bias=bias, gated=True)
        return cls(
            gate_up,
            Linear.load(weights, [down], "inputs", inputs=feed_forward, outputs=[hidden], bias=bias),
            ACTIVATIONS[activation],
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        return self.down(self.gate_up(x, batch, activation=self.activation), batch)
