"""RMS norm and layer norm: twins against torch.nn.functional, kernels against twins."""

import pytest
import torch
from kernel_cases import DTYPES, assert_close, rand, same_bits, strided
from torch.nn import functional

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library
from lmi_dist.ops.norm import layer_norm_torch, rms_norm_torch

SIZES = [(1, 1), (7, 33), (113, 100), (40, 2048)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_twin_is_torchs(dtype: torch.dtype) -> None:
    x, weight = rand(9, 40, dtype=dtype), rand(40, dtype=dtype, seed=1)

    expected = functional.rms_norm(x.double(), (40,), weight.double() + 1, 1e-5)

    assert_close(rms_norm_torch(x, weight, 1e-5, weight_offset=1.0), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_twin_is_torchs(dtype: torch.dtype) -> None:
    x, weight, bias = rand(9, 40, dtype=dtype), rand(40, dtype=dtype, seed=1), rand(40, dtype=dtype, seed=2)

    expected = functional.layer_norm(x.double(), (40,), weight.double(), bias.double(), 1e-5)

    assert_close(layer_norm_torch(x, weight, bias, 1e-5), expected.to(dtype))


def test_twins_add_the_residual_first() -> None:
    x, residual = rand(9, 40, dtype=torch.bfloat16), rand(9, 40, dtype=torch.bfloat16, seed=1)
    total = x + residual

    out = rms_norm_torch(x, None, 1e-5, residual=residual)

    assert same_bits(residual, total)
    assert same_bits(out, rms_norm_torch(total, None, 1e-5))


def test_twin_adds_the_addend_last() -> None:
    x, addend = rand(9, 40), rand(9, 40, seed=1)

    assert same_bits(rms_norm_torch(x, None, 1e-5, addend=addend), rms_norm_torch(x, None, 1e-5) + addend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("given", [(), ("residual",), ("addend",), ("residual", "addend")], ids="-".join)
def test_rms_norm_matches_twin(library: Library, dtype: torch.dtype, size: tuple[int, int], given: tuple[str, ...]) -> None:
    x, weight = strided(rand(*size, dtype=dtype)), rand(size[1], dtype=dtype, seed=1)
    residual, addend = (strided(rand(*size, dtype=dtype, seed=2)) if name in given else None for name in ("residual", "addend"))
    twins_residual = None if residual is None else residual.clone()

    out = ops.rms_norm(x, weight, 1e-5, residual=residual, weight_offset=0.5, addend=addend)

    assert_close(out, rms_norm_torch(x, weight, 1e-5, residual=twins_residual, weight_offset=0.5, addend=addend))
    assert residual is None or same_bits(residual, twins_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("complete", [False, True])
def test_layer_norm_matches_twin(library: Library, dtype: torch.dtype, size: tuple[int, int], complete: bool) -> None:
    x = strided(rand(*size, dtype=dtype) + 3)
    weight, bias = (rand(size[1], dtype=dtype, seed=seed) if complete else None for seed in (1, 2))
    residual = strided(rand(*size, dtype=dtype, seed=3)) if complete else None
    twins_residual = None if residual is None else residual.clone()

    out = ops.layer_norm(x, weight, bias, 1e-5, residual=residual)

    assert_close(out, layer_norm_torch(x, weight, bias, 1e-5, residual=twins_residual), factor=2)
    assert residual is None or same_bits(residual, twins_residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_bits_do_not_depend_on_other_rows(library: Library, dtype: torch.dtype) -> None:
    x, weight = rand(67, 200, dtype=dtype), rand(200, dtype=dtype, seed=1)

    for norm in (lambda rows: ops.rms_norm(rows, weight, 1e-5), lambda rows: ops.layer_norm(rows, weight, None, 1e-5)):
        together = norm(x)
        alone = torch.cat([norm(x[row : row + 1]) for row in range(67)])
        assert same_bits(together, alone)


def test_norm_of_no_rows_is_empty(library: Library) -> None:
    assert ops.rms_norm(rand(0, 8), rand(8), 1e-5, residual=rand(0, 8)).shape == (0, 8)


def test_norm_names_the_wrong_shape(column: str) -> None:
    x = rand(3, 8)

    with pytest.raises(KernelError, match=r"rms_norm: weight has shape \[7\]; it must be \[E=8\]"):
        ops.rms_norm(x, rand(7), 1e-5)
    with pytest.raises(KernelError, match=r"rms_norm: residual has shape \[2, 8\]; it must be \[T=3, E=8\]"):
        ops.rms_norm(x, rand(8), 1e-5, residual=rand(2, 8))
    with pytest.raises(KernelError, match=r"rms_norm: addend has shape \[3, 7\]; it must be \[T=3, E=8\]"):
        ops.rms_norm(x, rand(8), 1e-5, addend=rand(3, 7))
    with pytest.raises(KernelError, match=r"layer_norm: bias is .*(F16|float16); it must be .*(F32|float32)"):
        ops.layer_norm(x, None, rand(8, dtype=torch.float16), 1e-5)
