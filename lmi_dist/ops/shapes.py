"""Checks of shapes and dtypes by name for the torch twins; the libraries make the same checks themselves."""

import torch

from lmi_dist.errors import KernelError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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

    def require(self, holds: bool, rule: str) -> None:
        """Raises KernelError with the rule unless it holds."""
        if not holds:
            raise KernelError(f"{self.operation}: {rule}")
