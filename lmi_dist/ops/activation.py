"""Activations, alone or as the gate of the other half."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lmi_dist.errors import KernelError
from lmi_dist.ops import column
from lmi_dist.ops.shapes import FLOATS, Shapes

Activation = Literal["identity", "silu", "gelu", "gelu_tanh", "relu", "quick_gelu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
CODES = {kind: code for code, kind in enumerate(ACTIVATIONS)}  # lmi_activation_kind, in its order


def activation_code(kind: str) -> int:
    """Its number in the C header. Raises KernelError on a name that is not known."""
    if kind not in CODES:
        raise KernelError(f"activation={kind!r} is not known; known are {', '.join(CODES)}")
    return CODES[kind]


def activation(x: Tensor, kind: Activation, *, gated: bool) -> Tensor:
    """act(x), x: [T,F]; or gated: act(x[:, :F]) * x[:, F:], x: [T,2F]. Returns [T,F].
    Raises KernelError on shapes or an unknown kind."""
    code = activation_code(kind)
    library = column.library()
    if library is None:
        return activation_torch(x, kind, gated=gated)
    out = torch.empty((x.shape[0], x.shape[-1] // 2 if gated else x.shape[-1]), dtype=x.dtype, device=x.device)
    library.call("activation", out=out, x=x, activation=code, gated=gated)
    return out


def activation_torch(x: Tensor, kind: Activation, *, gated: bool) -> Tensor:
    shapes = Shapes("activation")
    shapes.check("x", x, "T F", *FLOATS)
    shapes.require(not gated or x.shape[1] % 2 == 0, f"x has {x.shape[1]} columns; gate and up need an even number")
    act = ACTIVATIONS[kind]
    if not gated:
        return act(x.float()).to(x.dtype)
    gate, up = x.float().chunk(2, dim=-1)
    return (act(gate) * up).to(x.dtype)
