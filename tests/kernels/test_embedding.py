"""Embedding: twin against torch.nn.functional, kernel against twin."""

import pytest
import torch
from kernel_cases import DTYPES, assert_close, rand, same_bits, strided
from torch.nn import functional

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library
from lmi_dist.ops.embedding import embedding_torch


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_twin_is_torchs(dtype: torch.dtype) -> None:
    table, ids = rand(50, 9, dtype=dtype), torch.tensor([3, 49, 0, 3], dtype=torch.int32)

    assert same_bits(embedding_torch(ids, table), functional.embedding(ids, table))


def test_embedding_twin_gives_zero_outside_of_its_part() -> None:
    table, ids = rand(10, 9), torch.tensor([19, 20, 29, 30], dtype=torch.int32)

    out = embedding_torch(ids, table, first_id=20, scale=2.0)

    assert same_bits(out, torch.stack([torch.zeros(9), table[0] * 2, table[9] * 2, torch.zeros(9)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (300, 130)])
@pytest.mark.parametrize(("first_id", "scale"), [(0, 1.0), (100, 1.0), (0, 11.3)])
def test_embedding_matches_twin(library: Library, dtype: torch.dtype, size: tuple[int, int], first_id: int, scale: float) -> None:
    table = strided(rand(97, size[1], dtype=dtype))
    ids = (torch.arange(size[0]) * 31 % 200).int()
    ids[0] = -1

    out = ops.embedding(ids, table, first_id=first_id, scale=scale)

    assert_close(out, embedding_torch(ids, table, first_id=first_id, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "scale"), [((1, 1), 1.0), ((7, 33), 1.0), ((50, 136), 0.3)])
def test_embedding_adds_what_is_given(library: Library, dtype: torch.dtype, size: tuple[int, int], scale: float) -> None:
    table, residual = strided(rand(20, size[1], dtype=dtype)), strided(rand(*size, dtype=dtype, seed=1))
    ids = (torch.arange(size[0]) * 31 % 40).int()

    out = ops.embedding(ids, table, scale=scale, residual=residual)

    exact = embedding_torch(ids, table.float(), scale=scale) + residual.float()  # rounded once
    assert_close(out, exact.to(dtype))
    assert same_bits(embedding_torch(ids, table, scale=scale, residual=residual), exact.to(dtype))


def test_embedding_names_what_is_wrong(column: str) -> None:
    ids = torch.zeros(3, dtype=torch.int32)

    with pytest.raises(KernelError, match=r"embedding: ids is .*64; it must be .*32"):
        ops.embedding(ids.long(), rand(4, 5))
    with pytest.raises(KernelError, match=r"embedding: table .*shape \[4\]"):
        ops.embedding(ids, rand(4))
