"""Activations, alone or as the gate of the other half, and other functions of each number."""

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
Elementwise = Literal["soft_cap", "clamp", "scale"]

ELEMENTWISE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "soft_cap": lambda x, c: c * torch.tanh(x / c),
    "clamp": lambda x, c: x.clamp(-c, c),
    "scale": lambda x, c: c * x,
}
CODES = {kind: code for code, kind in enumerate([*ACTIVATIONS, *ELEMENTWISE])}  # lmi_activation_kind, in its order


def activation_code(kind: str) -> int:
    """Its number in the C header. Raises KernelError on a name that is not known."""
    if kind not in ACTIVATIONS:
        raise KernelError(f"activation={kind!r} is not known; known are {', '.join(ACTIVATIONS)}")
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


def elementwise(x: Tensor, kind: Elementwise, c: float) -> Tensor:
    """x := its soft cap c tanh(x / c), min(max(x, -c), c) or c x, in place; returns it. x: [T,F]. Raises KernelError on shapes, and
    on a c that is not above 0 but for "scale"."""
    library = column.library()
    if library is None:
        return elementwise_torch(x, kind, c)
    library.call("activation", out=x, x=x, activation=CODES[kind], gated=False, parameter=c)
    return x


def elementwise_torch(x: Tensor, kind: Elementwise, c: float) -> Tensor:
    shapes = Shapes("activation")
    shapes.check("x", x, "T F", *FLOATS)
    shapes.require(kind == "scale" or c > 0, "parameter must be above 0 for a soft cap and a clamp")
    return x.copy_(ELEMENTWISE[kind](x.float(), c))
