"""Each layout gives every rank the rows of its own heads."""

from pathlib import Path

import driving
import pytest
import torch
from safetensors.torch import save_file

from lmi_dist import ops
from lmi_dist.batch import ForwardBatch, build
from lmi_dist.layers.qkv import Layout, grouped, joined, load_qkv, separate
from lmi_dist.link import Link
from lmi_dist.parallel import Heads, Ranks
from lmi_dist.plan import Chunk, Plan
from lmi_dist.weights import Checkpoint, Weights

HIDDEN, SIZE = 40, 8
SHAPES = [(4, 4, 2), (4, 1, 4), (8, 2, 4), (6, 3, 3), (6, 3, 1)]  # query heads, key heads, ranks


@pytest.fixture
def batch() -> ForwardBatch:
    return build(Plan(step=0, chunks=(Chunk(0, (3, 9), 0, (0,), 2, 1),)), driving.make_cache())


def write(folder: Path, layout: str, parts: tuple[torch.Tensor, ...], num_key: int, *, transposed: bool) -> Layout:
    """q, k and v ([heads,D,inputs], or [heads,D] for the bias) as the layout has them in the file."""
    if layout == "separate":
        tensors = {name: part.flatten(0, 1) for name, part in zip("qkv", parts, strict=True)}
    elif layout == "joined":
        tensors = {"all": torch.cat([part.flatten(0, 1) for part in parts])}
    else:
        by_key = [part.unflatten(0, (num_key, -1)) for part in parts]
        tensors = {"all": torch.cat(by_key, 1).flatten(0, 2)}
    laid = {f"{name}.weight": (x[:, :-1].T if transposed else x[:, :-1]).contiguous() for name, x in tensors.items()}
    save_file(laid | {f"{name}.bias": x[:, -1].contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    layouts = {"separate": separate("q", "k", "v"), "joined": joined("all"), "grouped": grouped("all")}
    return layouts[layout]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("num_query", "num_key", "num_ranks"), SHAPES)
@pytest.mark.parametrize("layout", ["separate", "joined", "grouped"])
def test_rank_projects_to_its_heads(
    tmp_path: Path, batch: ForwardBatch, layout: str, num_query: int, num_key: int, num_ranks: int, transposed: bool
) -> None:
    torch.manual_seed(num_query)
    parts = tuple(torch.randn(heads, SIZE, HIDDEN + 1) for heads in (num_query, num_key, num_key))  # the last column is the bias
    made = write(tmp_path, layout, parts, num_key, transposed=transposed)
    x = torch.randn(2, HIDDEN)
    whole = [torch.einsum("hde,te->thd", part[..., :-1], x) + part[..., -1] for part in parts]

    for rank in range(num_ranks):
        ranks = Ranks(rank, num_ranks)
        heads = Heads.share(ranks, num_query, num_key, SIZE)
        with ops.using("cpu", 1):
            weights = Weights(Checkpoint(tmp_path), torch.float32, Link(ranks))
            qkv = load_qkv(weights, heads, made, hidden=HIDDEN, bias=True, transposed=transposed)(x, batch)
        mine = [y[:, part.start : part.stop].flatten(1) for y, part in zip(whole, (heads.query, heads.key, heads.key), strict=True)]
        torch.testing.assert_close(qkv, torch.cat(mine, 1), atol=1e-4, rtol=1e-4)
