"""Inputs and tolerances that the kernel tests share."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lmi_dist.ops.abi import Library

# Kernel and twin both sum in float, in different order, and round once: fp32 differs by some rounding errors of the sum, and the
# halves by one unit in the last place (2^-7 and 2^-10 of the value) where the two sums stand on either side of a border.
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2**-7, 1e-3), torch.float16: (2**-10, 1e-3)}
HALVES = [torch.bfloat16, torch.float16]
DTYPES = list(TOLERANCES)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: Tensor, extra: int = 5) -> Tensor:
    """The same numbers as a view whose rows lie further apart than they are long; what lies between is NaN."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + extra), float("nan")).to(x.dtype)
    wide[..., 2 : 2 + x.shape[-1]] = x
    return wide[..., 2 : 2 + x.shape[-1]]


def assert_close(actual: Tensor, expected: Tensor, *, factor: float = 1.0, slack: Tensor | None = None) -> None:
    """Same dtype and shape, equal within `factor` times the dtype's tolerance; with slack, which is for finite numbers, each may be
    off by so much more."""
    rtol, atol = TOLERANCES[actual.dtype]
    if slack is not None:
        assert actual.dtype == expected.dtype
        actual, expected = actual.float(), expected.float()
        actual = actual - (actual - expected).clamp(-slack, slack)
    torch.testing.assert_close(actual, expected, rtol=rtol * factor, atol=atol * factor)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN and signs of zeros included."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@contextmanager
def on_sm90a(library: Library) -> Iterator[Callable[[], set[str]]]:
    """The stand-in as a GPU of compute capability 9.0, in its order of threads. Gives what was launched since last asked."""
    order, exported = library.describe().split()[2], ctypes.CDLL(str(library.path))
    exported.lmi_sim_launched.restype = ctypes.c_char_p
    library.set_level(f"sm_90a {order}")
    exported.lmi_sim_count(1)
    try:
        yield lambda: set(exported.lmi_sim_launched().decode().split(","))
    finally:
        exported.lmi_sim_count(0)
        library.set_level(order)
