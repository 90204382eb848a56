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

from lmi_dist import ops
from lmi_dist.batch import ForwardBatch, build
from lmi_dist.layers.embedding import Embedding, Head
from lmi_dist.layers.linear import Linear
from lmi_dist.layers.mlp import ACTIVATIONS, GatedMLP
from lmi_dist.layers.norm import LayerNorm, RMSNorm
from lmi_dist.link import Link
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

    def test_linear_split_by_inputs_adds_its_bias_once(
        self, weights: Weights, tensors: dict[str, torch.Tensor], batch: ForwardBatch, dtype: torch.dtype
    ) -> None:
        x = x_of(dtype, F)

        y = Linear.load(weights, ["down"], "inputs", inputs=F, outputs=[E], bias=True)(x, batch)

        close(y, functional.linear(x.float(), tensors["down.weight"], tensors["down.bias"]), dtype)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_gated_block_equals_transformers(
        self, weights: Weights, tensors: dict[str, torch.Tensor], batch: ForwardBatch, dtype: torch.dtype, activation: str
    ) -> None:
        x = x_of(dtype)

        made = GatedMLP.load(weights, "gate", "up", "down", hidden=E, feed_forward=F, activation=activation, bias=True)

        gate, up = (functional.linear(x.float(), tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in ("gate", "up"))
        inner = ACT2FN[activation](gate) * up
        close(made(x, batch), functional.linear(inner, tensors["down.weight"], tensors["down.bias"]), dtype)

    def test_norms_equal_torch(self, weights: Weights, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        x, w, b = x_of(dtype), tensors["norm.weight"], tensors["norm.bias"]

        close(RMSNorm.load(weights, "norm", E, 1e-5)(x), functional.rms_norm(x.float(), (E,), w, 1e-5), dtype)
        close(LayerNorm.load(weights, "norm", E, 1e-5)(x), functional.layer_norm(x.float(), (E,), w, b, 1e-5), dtype)
        no_bias = LayerNorm.load(weights, "norm", E, 1e-5, bias=False)
        close(no_bias(x), functional.layer_norm(x.float(), (E,), w, None, 1e-5), dtype)

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
