"""A feed-forward block of several experts, of which each token takes the best few."""

from collections.abc import Sequence

import torch

from lmi_dist import ops, quant
from lmi_dist.batch import ForwardBatch
from lmi_dist.layers.linear import Linear
from lmi_dist.layers.mlp import ACTIVATIONS
from lmi_dist.link import Link
from lmi_dist.quant import ExpertsWeight, Piece
from lmi_dist.weights import Weights


class SparseMoE:
    """sum over the top_k experts x of p_x down_x(act(gate_x(h)) * up_x(h)), p the router's softmax over all, scaled to sum to 1
    over those taken (Shazeer et al. 2017; Jiang et al. 2024). Each rank has a part of every expert. h: [T,E]"""

    def __init__(
        self, router: Linear, gate_up: ExpertsWeight, down: ExpertsWeight, activation: ops.Activation, top_k: int, link: Link
    ) -> None:
        self.router, self.gate_up, self.down = router, gate_up, down
        self.activation, self.top_k, self.link = activation, top_k, link

    @classmethod
    def load(
        cls,
        weights: Weights,
        router: str,
        gates: Sequence[str],
        ups: Sequence[str],
        downs: Sequence[str],
        *,
        hidden: int,
        feed_forward: int,
        activation: str,
        top_k: int,
    ) -> "SparseMoE":
        """A prefix an expert in `gates`, `ups` and `downs`; `activation`: a key of ACTIVATIONS."""
        mine = weights.ranks.slice(feed_forward, gates[0])
        num_mine = mine.stop - mine.start
        gate_up = [
            [Piece(gate, feed_forward, hidden, mine, 0), Piece(up, feed_forward, hidden, mine, num_mine)]
            for gate, up in zip(gates, ups, strict=True)
        ]
        down = [[Piece(prefix, hidden, feed_forward, slice(0, hidden), 0)] for prefix in downs]
        whole = [slice(0, len(gates))]
        return cls(
            Linear.load(weights, [router], "outputs", inputs=hidden, outputs=[len(gates)], parts=whole),
            quant.load_experts(weights, gate_up, slice(0, hidden), gated=True),
            quant.load_experts(weights, down, mine, gated=False),
            ACTIVATIONS[activation],
            top_k,
            weights.link,
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch, residual: torch.Tensor | None = None) -> torch.Tensor:
        scores = self.router(x, batch, out_dtype=torch.float32)  # bf16 would make ties
        routing = ops.moe_route(scores, self.top_k, renormalize=True)
        rows = self.gate_up(ops.moe_gather(x, routing.order), routing.starts, activation=self.activation)
        residual = residual if self.link.ranks.rank == 0 else None  # the sum over ranks holds it once
        y = ops.moe_combine(self.down(rows, routing.starts), routing.weights, routing.order, residual=residual)
        return self.link.all_reduce(y)
