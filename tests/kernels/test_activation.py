"""Activations: twins against their formulas in double, kernels against twins, over all sizes of numbers."""

import math

import pytest
import torch
from kernel_cases import DTYPES, assert_close, rand, same_bits, strided

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library
from lmi_dist.ops.activation import ACTIVATIONS, ELEMENTWISE, Activation, Elementwise, activation_torch, elementwise_torch

KINDS = list(ACTIVATIONS)
FORMULAS = {
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_activation_twin_is_its_formula(kind: Activation) -> None:
    x = rand(50, 3) * 3

    expected = torch.tensor([FORMULAS[kind](value) for value in x.double().flatten().tolist()]).view(50, 3)

    assert_close(activation_torch(x, kind, gated=False), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 33), (113, 130)])
@pytest.mark.parametrize("gated", [False, True])
def test_activation_matches_twin(
    library: Library, dtype: torch.dtype, kind: Activation, size: tuple[int, int], gated: bool
) -> None:
    x = strided(rand(size[0], size[1] * (2 if gated else 1), dtype=dtype) * 3)

    assert_close(ops.activation(x, kind, gated=gated), activation_torch(x, kind, gated=gated))


@pytest.mark.parametrize("kind", KINDS)
def test_activation_is_right_far_from_zero(library: Library, kind: Activation) -> None:
    """Where exponentials overflow, underflow or meet infinity and NaN."""
    sizes = torch.tensor([0.0, 1e-38, 1e-6, 0.1, 5.0, 12.0, 40.0, 87.0, 89.0, 104.0, 1e4, 1e38])
    x = torch.cat([sizes, -sizes, torch.tensor([float("nan")])])[None]

    out, expected = ops.activation(x, kind, gated=False), activation_torch(x, kind, gated=False)

    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_silu_is_exact_to_some_units(library: Library) -> None:
    """The exponential behind it, over its whole range: 2 units, and some for the division and the product."""
    x = torch.linspace(-80, 88, 100_001)[None]

    out = ops.activation(x, "silu", gated=False).double()

    expected = x.double() * torch.sigmoid(x.double())
    assert ((out - expected).abs() / expected.abs().clamp(min=1e-30)).max() < 6 * 2**-23


def test_activation_bits_do_not_depend_on_other_rows(library: Library) -> None:
    x = rand(67, 200, dtype=torch.bfloat16)

    for kind in ("silu", "gelu", "gelu_tanh"):
        alone = torch.cat([ops.activation(x[row : row + 1], kind, gated=True) for row in range(67)])
        assert same_bits(ops.activation(x, kind, gated=True), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_matches_twin_in_place(library: Library, dtype: torch.dtype, kind: Elementwise) -> None:
    x = strided(rand(113, 130, dtype=dtype) * 3)
    x[0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    expected = elementwise_torch(x.clone(), kind, 2.5)

    out = ops.elementwise(x, kind, 2.5)

    assert out is x
    assert x[0, 2].isnan()
    x[0, 2] = expected[0, 2] = 0.0
    assert_close(x, expected)


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_twin_is_its_formula(kind: Elementwise) -> None:
    x = rand(50, 3) * 9
    formula = {"soft_cap": lambda v: 4 * math.tanh(v / 4), "clamp": lambda v: min(max(v, -4.0), 4.0), "scale": lambda v: 4 * v}[
        kind
    ]

    expected = torch.tensor([formula(value) for value in x.double().flatten().tolist()]).view(50, 3)

    assert_close(elementwise_torch(x, kind, 4.0), expected)


def test_elementwise_refuses_a_bound_of_nothing(column: str) -> None:
    for kind in ("soft_cap", "clamp"):
        with pytest.raises(KernelError, match="activation: parameter must be above 0 for a soft cap and a clamp"):
            ops.elementwise(rand(3, 7), kind, 0.0)


def test_activation_names_what_is_wrong(column: str) -> None:
    with pytest.raises(KernelError, match=r"activation: x .*even number"):
        ops.activation(rand(3, 7), "silu", gated=True)
    with pytest.raises(KernelError, match=r"activation='swish' is not known; known are identity, silu"):
        ops.activation(rand(3, 7), "swish", gated=False)  # type: ignore[arg-type]
