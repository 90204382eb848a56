"""Low-rank adapters: twin against double, kernel against twin."""

import pytest
import torch
from kernel_cases import DTYPES, assert_close, rand, same_bits, strided
from torch import Tensor

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library
from lmi_dist.ops.lora import lora_torch

SIZES = [(1, 1, 1, 1), (7, 33, 8, 40), (67, 130, 16, 65)]  # tokens, inputs, rank, outputs


def case(size: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, x, a, b, scales, adapters: three adapters, of which some tokens have none."""
    num_tokens, num_inputs, rank, num_outputs = size
    a = rand(3, rank, num_inputs, dtype=dtype, seed=2) / num_inputs**0.5
    b = rand(3, num_outputs, rank, dtype=dtype, seed=3) / rank**0.5
    adapters = torch.arange(num_tokens, dtype=torch.int32) % 4 - 1
    adapters[0] = 2
    return (
        strided(rand(num_tokens, num_outputs, dtype=dtype)),
        strided(rand(num_tokens, num_inputs, dtype=dtype, seed=1)),
        a,
        b,
        torch.tensor([0.5, 1.0, 2.0]),
        adapters,
    )


def test_lora_twin_is_its_formula() -> None:
    out, x, a, b, scales, adapters = case((7, 33, 8, 40), torch.float32)
    expected = out.double().clone()
    for token, adapter in enumerate(adapters.tolist()):
        if adapter >= 0:
            expected[token] += scales[adapter] * (b[adapter].double() @ (a[adapter].double() @ x[token].double()))

    lora_torch(out, x, a, b, scales, adapters)

    assert_close(out, expected.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wide_out", [False, True])
def test_lora_matches_twin(library: Library, dtype: torch.dtype, size: tuple[int, int, int, int], wide_out: bool) -> None:
    out, *rest = case(size, dtype)
    out = out.float() if wide_out else out
    twins = out.clone()

    ops.lora(out, *rest)
    lora_torch(twins, *rest)

    if wide_out:  # what differs is the rounding of the inner sum to the dtype
        torch.testing.assert_close(out, twins, rtol=0.0, atol=2e-5 if dtype == torch.float32 else 2e-2)
    else:
        assert_close(out, twins, factor=4)


def test_lora_bits_do_not_depend_on_other_tokens(library: Library) -> None:
    out, x, a, b, scales, adapters = case((67, 130, 16, 65), torch.bfloat16)
    alone = out.clone()

    ops.lora(out, x, a, b, scales, adapters)
    for token in range(67):
        ops.lora(alone[token : token + 1], x[token : token + 1], a, b, scales, adapters[token : token + 1])

    assert same_bits(out, alone)


def test_lora_names_what_is_wrong(column: str) -> None:
    out, x, a, b, scales, adapters = case((7, 33, 8, 40), torch.float32)

    with pytest.raises(
        KernelError, match=r"lora: b has shape \[3, 39, 8\]|lora: out has shape \[7, 40\]; it must be \[T=7, F=39\]"
    ):
        ops.lora(out, x, a, b[:, :39], scales, adapters)
    with pytest.raises(KernelError, match=r"lora: an entry of adapters"):
        ops.lora(out, x, a, b, scales, adapters + 3)
