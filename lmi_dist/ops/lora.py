"""Low-rank adapters: each token may have its own."""

import torch
from torch import Tensor

from lmi_dist.ops import column
from lmi_dist.ops.shapes import FLOATS, Shapes


def lora(out: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, adapters: Tensor) -> None:
    """out += scales[i] * b[i] (a[i] x) in place, with i = adapters[t]; a negative i adds nothing (Hu et al. 2021).

    out: [T,F] in x's dtype or fp32; x: [T,E]; a: [A,rank,E]; b: [A,F,rank], of x's dtype; scales: fp32 [A]; adapters: int32 [T].
    a x is rounded to x's dtype, as two linears would. Raises KernelError on shapes and on adapters out of range."""
    library = column.library()
    if library is None:
        lora_torch(out, x, a, b, scales, adapters)
    else:
        library.call("lora", out=out, x=x, a=a, b=b, scales=scales, adapters=adapters)


def lora_torch(out: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, adapters: Tensor) -> None:
    shapes = Shapes("lora")
    shapes.check("x", x, "T E", *FLOATS)
    shapes.check("a", a, "A rank E", x.dtype)
    shapes.check("b", b, "A F rank", x.dtype)
    shapes.check("scales", scales, "A", torch.float32)
    shapes.check("adapters", adapters, "T", torch.int32)
    shapes.check("out", out, "T F", x.dtype, torch.float32)
    shapes.require(bool((adapters < len(a)).all()), f"an entry of adapters is beyond the {len(a)} that there are")
    for index in range(len(a)):
        rows = (adapters == index).nonzero()[:, 0]
        inner = (x[rows].float() @ a[index].float().T).to(x.dtype)
        out[rows] = (out[rows].float() + scales[index] * (inner.float() @ b[index].float().T)).to(out.dtype)
