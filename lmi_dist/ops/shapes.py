"""Checks of shapes and dtypes by name for the torch twins; the libraries make the same checks themselves."""

import math

import torch

from lmi_dist.errors import KernelError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn  # of a KV cache alone


class Shapes:
    """Sizes of one call by their letter: the first tensor that has a letter settles it, later ones must agree."""

    def __init__(self, operation: str, **sizes: int) -> None:
        self.operation = operation
        self.sizes = sizes

    def check(self, name: str, tensor: torch.Tensor | None, letters: str, *dtypes: torch.dtype) -> None:
        """tensor, if given, must have the shape `letters` (such as "T E") and one of the dtypes. Raises KernelError."""
        if tensor is None:
            return
        wanted = letters.split()
        for letter, size in zip(wanted, tensor.shape, strict=False):
            self.sizes.setdefault(letter, size)
        if tuple(self.sizes.get(letter) for letter in wanted) != tuple(tensor.shape):
            rule = ", ".join(f"{letter}={self.sizes.get(letter, 'any')}" for letter in wanted)
            raise KernelError(f"{self.operation}: {name} has shape {list(tensor.shape)}; it must be [{rule}]")
        if dtypes and tensor.dtype not in dtypes:
            rule = " or ".join(str(dtype) for dtype in dtypes)
            raise KernelError(f"{self.operation}: {name} is {tensor.dtype}; it must be {rule}")

    def check_caches(self, k: torch.Tensor | None, v: torch.Tensor | None, dtype: torch.dtype, scales: tuple[float, float]) -> None:
        """Both, if given, must be [N,K,P,D], of `dtype` or fp8, and fp8 with a scale each. Raises KernelError."""
        for name, cache, scale in zip("kv", (k, v), scales, strict=True):
            self.check(f"{name}_cache", cache, "N K P D", dtype, FP8)
            fits = cache is None or cache.dtype != FP8 or 0.0 < scale < math.inf
            self.require(fits, f"{name}_scale={scale} must be finite and above 0 where {name}_cache is {FP8}")
        if k is not None and v is not None:
            self.check("v_cache", v, "N K P D", k.dtype)

    def require(self, holds: bool, rule: str) -> None:
        """Raises KernelError with the rule unless it holds."""
        if not holds:
            raise KernelError(f"{self.operation}: {rule}")
