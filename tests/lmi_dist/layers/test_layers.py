"""Linear, norms, embedding, head and the gated block against plain torch, on both columns and in every dtype."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import driving
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.bloom import modeling_bloom
from transformers.models.mpt import modeling_mpt

from lmi_dist import ops
from lmi_dist.batch import ForwardBatch, build
from lmi_dist.layers.attention import alibi_slopes
from lmi_dist.layers.elementwise import clamped, scaled, soft_capped
from lmi_dist.layers.embedding import Embedding, Head, Positions
from lmi_dist.layers.linear import Linear
from lmi_dist.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from lmi_dist.layers.norm import AcrossHeads, LayerNorm, PerHead, RMSNorm
from lmi_dist.link import Link
from lmi_dist.parallel import Ranks
from lmi_dist.plan import Chunk, Plan
from lmi_dist.weights import Checkpoint, Weights

E, F, V = 40, 56, 100
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of values around 1: a few roundings of the dtype


@pytest.fixture(params=["cpu", "torch"])
def column(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.using(request.param, 2):
        yield request.param


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    made: torch.dtype = request.param
    return made


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"gate": (F, E), "up": (F, E), "down": (E, F), "q": (24, E), "k": (8, E), "embed": (V, E), "norm": (E,)}
    weights = {f"{name}.weight": torch.randn(shape) / 6 for name, shape in shapes.items()}
    return weights | {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}


@pytest.fixture
def weights(tmp_path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Weights:
    save_file(tensors, tmp_path / "model.safetensors")
    return Weights(Checkpoint(tmp_path), dtype, Link())


@pytest.fixture
def batch() -> ForwardBatch:
    return build(Plan(step=0, chunks=(Chunk(0, (3, 99, 0, 3), 0, (0,), 4, 1),)), driving.make_cache())


def close(ours: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.float(), reference, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def x_of(dtype: torch.dtype, width: int = E) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(7, width).to(dtype)


@pytest.mark.usefixtures("column")
class TestLayers:
    def test_fused_linear_is_its_parts_side_by_side(
        self, weights: Weights, tensors: dict[str, torch.Tensor], batch: ForwardBatch, dtype: torch.dtype
    ) -> None:
        x = x_of(dtype)

        y = Linear.load(weights, ["q", "k"], "outputs", inputs=E, outputs=[24, 8], bias=True)(x, batch)

        parts = [functional.linear(x.float(), tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in ("q", "k")]
        close(y, torch.cat(parts, 1), dtype)

    @pytest.mark.parametrize("num_ranks", [1, 2])
    def test_linear_split_by_inputs_adds_bias_and_residual_once(
        self, weights: Weights, tensors: dict[str, torch.Tensor], batch: ForwardBatch, dtype: torch.dtype, num_ranks: int
    ) -> None:
        x, residual, before = x_of(dtype, F), x_of(dtype), x_of(dtype)
        y = torch.zeros(7, E)

        for rank in range(num_ranks):  # a link that sums nothing: what each would bring to the sum
            own = Weights(weights.checkpoint, dtype, Link(Ranks(rank, num_ranks)))
            linear = Linear.load(own, ["down"], "inputs", inputs=F, outputs=[E], bias=True)
            y += linear(x.chunk(num_ranks, 1)[rank], batch, residual=residual)

        close(y, functional.linear(x.float(), tensors["down.weight"], tensors["down.bias"]) + residual.float(), dtype)
        assert torch.equal(residual, before)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_gated_block_equals_transformers(
        self, weights: Weights, tensors: dict[str, torch.Tensor], batch: ForwardBatch, dtype: torch.dtype, activation: str
    ) -> None:
        x = x_of(dtype)

        made = GatedMLP.load(weights, "gate", "up", "down", hidden=E, feed_forward=F, activation=activation, bias=True)

        gate, up = (functional.linear(x.float(), tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in ("gate", "up"))
        inner = ACT2FN[activation](gate) * up
        close(made(x, batch), functional.linear(inner, tensors["down.weight"], tensors["down.bias"]), dtype)

    def test_plain_block_equals_torch(
        self, weights: Weights, tensors: dict[str, torch.Tensor], batch: ForwardBatch, dtype: torch.dtype
    ) -> None:
        x = x_of(dtype)

        made = MLP.load(weights, "up", "down", hidden=E, feed_forward=F, activation="relu")

        inner = functional.linear(x.float(), tensors["up.weight"], tensors["up.bias"]).relu()
        close(made(x, batch), functional.linear(inner, tensors["down.weight"], tensors["down.bias"]), dtype)

    def test_gate_and_up_may_be_one_linear(
        self, weights: Weights, tensors: dict[str, torch.Tensor], batch: ForwardBatch, dtype: torch.dtype
    ) -> None:
        x, half = x_of(dtype), F // 2

        save_file(
            {"both.weight": tensors["up.weight"], "down.weight": tensors["down.weight"][:, :half].contiguous()},
            weights.checkpoint.folder / "model.safetensors",
        )
        fused = Weights(Checkpoint(weights.checkpoint.folder), dtype, Link())
        made = GatedMLP.load(fused, "both", "both", "down", hidden=E, feed_forward=half, activation="silu")

        gate, up = functional.linear(x.float(), tensors["up.weight"]).chunk(2, 1)
        close(made(x, batch), functional.linear(functional.silu(gate) * up, tensors["down.weight"][:, :half]), dtype)

    def test_learned_positions_begin_at_their_offset(
        self, weights: Weights, tensors: dict[str, torch.Tensor], batch: ForwardBatch, dtype: torch.dtype
    ) -> None:
        before = x_of(dtype)[:4]
        x = Positions.load(weights, "embed", V - 2, E, offset=2)(before, batch)

        assert torch.equal(x, before + tensors["embed.weight"][2:6].to(dtype))

    def test_norms_of_heads_equal_torch(self, weights: Weights, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        wide, w, b = x_of(dtype, 2 * E), tensors["norm.weight"], tensors["norm.bias"]
        heads = wide.view(7, 2, E)[:, 1:].view(7, 1, E)  # strided, as a part of qkv is

        close(PerHead(RMSNorm.load(weights, "norm", E, 1e-5))(heads), functional.rms_norm(heads.float(), (E,), w, 1e-5), dtype)
        across = AcrossHeads(LayerNorm.load(weights, "norm", E, 1e-5), Link())(wide[:, :E].view(7, 5, 8))
        close(across, functional.layer_norm(wide[:, :E].float(), (E,), w, b, 1e-5).view(7, 5, 8), dtype)

    def test_norms_equal_torch(self, weights: Weights, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        x, w, b = x_of(dtype), tensors["norm.weight"], tensors["norm.bias"]

        close(RMSNorm.load(weights, "norm", E, 1e-5)(x), functional.rms_norm(x.float(), (E,), w, 1e-5), dtype)
        close(LayerNorm.load(weights, "norm", E, 1e-5)(x), functional.layer_norm(x.float(), (E,), w, b, 1e-5), dtype)
        one_more = RMSNorm.load(weights, "norm", E, 1e-5, offset=1.0)
        close(one_more(x), functional.rms_norm(x.float(), (E,), w + 1, 1e-5), dtype)
        no_bias = LayerNorm.load(weights, "norm", E, 1e-5, bias=False)
        close(no_bias(x), functional.layer_norm(x.float(), (E,), w, None, 1e-5), dtype)

        with_x = RMSNorm.load(weights, "norm", E, 1e-5)(x, addend=x)
        close(with_x, functional.rms_norm(x.float(), (E,), w, 1e-5) + x.float(), dtype)

    def test_functions_of_each_number_change_what_they_are_given(self, dtype: torch.dtype) -> None:
        before = x_of(dtype)
        cases = (
            (soft_capped, lambda x: 0.5 * torch.tanh(2 * x)),
            (clamped, lambda x: x.clamp(-0.5, 0.5)),
            (scaled, lambda x: 0.5 * x),
        )

        for function, formula in cases:
            x = before.clone()
            assert function(x, 0.5) is x
            close(x, formula(before.float()), dtype)

    def test_embedding_gives_rows_of_its_table(
        self, weights: Weights, tensors: dict[str, torch.Tensor], batch: ForwardBatch, dtype: torch.dtype
    ) -> None:
        x = Embedding.load(weights, "embed", V, E)(batch)

        assert torch.equal(x, tensors["embed.weight"][[3, 99, 0, 3]].to(dtype))

    def test_head_gives_fp32_logits(
        self, weights: Weights, tensors: dict[str, torch.Tensor], batch: ForwardBatch, dtype: torch.dtype
    ) -> None:
        x = x_of(dtype)

        logits = Head.load(weights, "embed", V, E)(x, batch)

        assert logits.dtype == torch.float32
        close(logits, functional.linear(x.float(), tensors["embed.weight"]), dtype)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_batch_with_embeddings_brings_its_own(weights: Weights, batch: ForwardBatch) -> None:
    own = torch.randn(4, E)

    assert Embedding.load(weights, "embed", V, E)(replace(batch, embeddings=own)) is own


# ---- what needs no weights ----


class Sum(Link):
    """A link to a rank that has `others` to add, in turn."""

    def __init__(self, others: list[torch.Tensor]) -> None:
        super().__init__(Ranks(0, 2))
        self.others = others

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(self.others.pop(0))


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norm_across_heads_counts_those_of_all_ranks(kind: type[LayerNorm] | type[RMSNorm]) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(5, 6, 8), torch.randn(48), torch.randn(48)
    mine, theirs = x[:, :3].flatten(1), x[:, 3:].flatten(1)
    mean = x.flatten(1).mean(1, keepdim=True) if kind is LayerNorm else 0
    means = [theirs.mean(1, keepdim=True)] if kind is LayerNorm else []
    link = Sum([*means, (theirs - mean).square().mean(1, keepdim=True)])
    norm = LayerNorm(w[:24], b[:24], 1e-5) if kind is LayerNorm else RMSNorm(w[:24], 1e-5)

    normed = AcrossHeads(norm, link)(mine.view(5, 3, 8))

    flat = x.flatten(1)
    whole = functional.layer_norm(flat, (48,), w, b, 1e-5) if kind is LayerNorm else functional.rms_norm(flat, (48,), w, 1e-5)
    torch.testing.assert_close(normed.flatten(1), whole[:, :24])


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 16, 71, 112])
def test_alibi_slopes_equal_transformers(num_heads: int) -> None:
    bloom = modeling_bloom.build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    mpt = modeling_mpt.build_mpt_alibi_tensor(num_heads, 2, alibi_bias_max=4)[:, 0, 0]

    torch.testing.assert_close(alibi_slopes(num_heads), bloom)
    torch.testing.assert_close(alibi_slopes(num_heads, 4.0), -mpt)
