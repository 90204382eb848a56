"""Linear layers on weights that are packed once at load: dense, int8 or int4, one weight or one for each expert.

A PackedWeight belongs to the column that was in use when it was made; on torch it holds a plain [F,E] tensor. On a GPU a dense one
is a RowMajorWeight, for cuBLAS, unless a row's bits must not depend on the batch: see `select`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lmi_dist.errors import KernelError
from lmi_dist.ops import column
from lmi_dist.ops.abi import DTYPES, Library
from lmi_dist.ops.activation import ACTIVATIONS, Activation, activation_code
from lmi_dist.ops.activation import activation as activate
from lmi_dist.ops.shapes import FLOATS, Shapes

Format = Literal["dense", "int8", "int4"]
FORMATS: dict[str, int] = {"dense": 0, "int8": 1, "int4": 2}  # lmi_weight_format
MOST_ZERO = 16  # of int4: GPTQ counts zeros from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightShape:
    """A weight [F,E]: dtype is that of dense weights and of scales; group: inputs that share a scale (int8, int4), 0 for dense;
    gated: the first F/2 rows are the gate, the others up."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    gated: bool = False
    format: Format = "dense"
    group: int = 0

    def check(self) -> None:
        """Raises KernelError when there can be no such weight."""
        shapes = Shapes("pack_linear")
        shapes.require(self.format in FORMATS, f"format={self.format!r} must be one of {', '.join(FORMATS)}")
        shapes.require(self.dtype in FLOATS, f"dtype={self.dtype} must be float32, bfloat16 or float16")
        shapes.require(min(self.out_features, self.in_features) > 0, f"a weight [{self.out_features}, {self.in_features}] is empty")
        shapes.require(not self.gated or self.out_features % 2 == 0, f"out_features={self.out_features} must be even when gated")
        if self.format == "dense":
            shapes.require(self.group == 0, f"group={self.group} must be 0 for dense weights")
        else:
            divides = self.group > 0 and self.in_features % self.group == 0
            shapes.require(divides, f"group={self.group} must divide in_features={self.in_features}")

    def fields(self, library: Library) -> dict[str, Any]:
        """As the C header names them."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "dtype": library.constant(DTYPES[self.dtype]),
            "format": FORMATS[self.format],
            "group": self.group,
            "gated": self.gated,
        }

    def packed_bytes(self, library: Library) -> int:
        fields = self.fields(library)
        order = ("out_features", "in_features", "dtype", "format", "group", "gated")
        return int(library.function("linear_packed_bytes")(*(fields[name] for name in order)))


class PackedWeight:
    """A weight in its column's layout, to be filled with `put` before it is used. library None: torch, data is [F,E]."""

    def __init__(self, shape: WeightShape, library: Library | None, data: Tensor) -> None:
        self.shape = shape
        self.library = library
        self.data = data
        self.fields = {} if library is None else shape.fields(library) | {"packed": data}

    @property
    def size_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def put(self, w: Tensor, row_offset: int = 0, *, scales: Tensor | None = None, zeros: Tensor | None = None) -> None:
        """Fill rows row_offset .. row_offset + rows - 1, once for each tensor of the checkpoint.

        dense: w [rows,E] in the weight's dtype. int8, int4: w uint8 [rows,E], one value a byte; scales [rows,E/group] in the dtype;
        zeros uint8 of the same shape, in int4 at most 16: the weight is (w - zero) * scale. Raises KernelError on shapes, dtypes
        and zeros."""
        if zeros is not None and self.shape.format == "int4" and (zeros > MOST_ZERO).any():
            raise KernelError(f"linear_pack: zeros has {int(zeros.max())}; of int4 it must be 0 to {MOST_ZERO}")
        if self.library is None:
            self._put_torch(w, row_offset, scales, zeros)
        else:
            self.library.call("linear_pack", **self.fields, w=w, scales=scales, zeros=zeros, row_offset=row_offset)

    def _put_torch(self, w: Tensor, row_offset: int, scales: Tensor | None, zeros: Tensor | None) -> None:
        shapes = Shapes("linear_pack", E=self.shape.in_features)
        end = row_offset + w.shape[0]
        dense = self.shape.format == "dense"
        shapes.check("w", w, "rows E", self.shape.dtype if dense else torch.uint8)
        shapes.require(0 <= row_offset <= end <= self.shape.out_features, f"rows {row_offset} to {end} are not in the weight")
        if dense:
            self.data[row_offset:end] = w
            return
        shapes.require(scales is not None and zeros is not None, f"scales and zeros must be given for {self.shape.format}")
        assert scales is not None  # required above
        assert zeros is not None
        shapes.sizes["E/group"] = self.shape.in_features // self.shape.group
        shapes.check("scales", scales, "rows E/group", self.shape.dtype)
        shapes.check("zeros", zeros, "rows E/group", torch.uint8)
        wide = [each.float().repeat_interleave(self.shape.group, dim=1) for each in (scales, zeros)]
        self.data[row_offset:end] = (w.float() - wide[1]) * wide[0]


class RowMajorWeight(PackedWeight):
    """A dense weight [F,E] as the checkpoint has it, for torch's product on a GPU; gate and up one above the other."""

    def __init__(self, shape: WeightShape, data: Tensor) -> None:
        super().__init__(shape, None, data)


def row_major(w: Tensor) -> RowMajorWeight | None:
    """w [F,E] as a weight, without a copy, if the column in use takes such; else None."""
    if not column.chosen().takes_torchs_product:
        return None
    return RowMajorWeight(WeightShape(out_features=w.shape[0], in_features=w.shape[1], dtype=w.dtype), w)


def pack_linear(
    out_features: int, in_features: int, dtype: torch.dtype, *, gated: bool = False, format: Format = "dense", group: int = 0
) -> PackedWeight:
    """Room for a weight [F,E] in the layout of the column in use. Raises KernelError when the combination cannot be."""
    chosen = column.chosen()
    if chosen.takes_torchs_product and chosen.library is not None and format == "dense":
        shape = WeightShape(out_features=out_features, in_features=in_features, dtype=dtype, gated=gated, group=group)
        shape.check()
        return RowMajorWeight(shape, torch.empty((out_features, in_features), dtype=dtype, device=chosen.library.device))
    return pack_experts(1, out_features, in_features, dtype, gated=gated, format=format, group=group)[0]


def pack_experts(
    num_experts: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    *,
    gated: bool = False,
    format: Format = "dense",
    group: int = 0,
) -> list[PackedWeight]:
    """Room for one weight [F,E] an expert, one behind the other in memory, for `grouped_linear`.
    Raises KernelError when the combination cannot be."""
    shape = WeightShape(out_features=out_features, in_features=in_features, dtype=dtype, gated=gated, format=format, group=group)
    shape.check()
    library = column.library()
    if library is None:
        held = dtype if format == "dense" else torch.float32
        memory = torch.empty((num_experts, out_features, in_features), dtype=held)
    else:
        memory = torch.empty((num_experts, shape.packed_bytes(library)), dtype=torch.uint8, device=library.device)
    return [PackedWeight(shape, library, data) for data in memory]


def linear(
    x: Tensor,
    packed: PackedWeight,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "identity",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """With y = x w^T + bias + addend: act(y) + residual; or, for a gated weight: act(y[:, :F/2]) * y[:, F/2:] + residual.

    x: [T,E] in the weight's dtype; bias: [F]; addend: [T,F]; residual: [T,F] or [T,F/2], not to be used any more, since the result
    may take its place; these two in x's dtype or fp32. Sums are in float. Returns [T,F] or [T,F/2] in out_dtype (x's dtype or fp32;
    default x's).
    Raises KernelError on shapes and dtypes."""
    code = activation_code(activation)
    library = packed.library
    if library is None:
        by_torch = linear_row_major if isinstance(packed, RowMajorWeight) else linear_torch
        return by_torch(x, packed, bias=bias, addend=addend, residual=residual, activation=activation, out_dtype=out_dtype)
    out = _new_out(x, packed.shape, out_dtype)
    library.call("linear", **packed.fields, out=out, x=x, bias=bias, addend=addend, residual=residual, activation=code)
    return out


def linear_torch(
    x: Tensor,
    packed: PackedWeight,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "identity",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    shape = packed.shape
    _check(x, shape, addend, residual, out_dtype).check("bias", bias, "F", shape.dtype)
    y = functional.linear(x.float(), packed.data.float())
    y = y if bias is None else y + bias.float()
    y = y if addend is None else y + addend.float()
    gate, up = y.chunk(2, dim=-1) if shape.gated else (y, None)
    out = ACTIVATIONS[activation](gate)
    out = out if up is None else out * up
    out = out if residual is None else out + residual.float()
    return out.to(out_dtype or x.dtype)


def linear_row_major(
    x: Tensor,
    packed: PackedWeight,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "identity",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` by torch's product in x's dtype, which a CUDA graph captures as it does our kernels. What is before the activation
    is rounded to x's dtype, unless something is fp32; a residual without bias is where the product's sums begin, in its place."""
    shape = packed.shape
    _check(x, shape, addend, residual, out_dtype).check("bias", bias, "F", shape.dtype)
    is_plain = activation == "identity" and not shape.gated
    terms = [term for term in (addend, residual) if term is not None]
    dtype = torch.float32 if torch.float32 in (out_dtype, *(term.dtype for term in terms)) else x.dtype
    before = terms if is_plain else terms[: addend is not None]
    if before and bias is None and dtype == x.dtype:
        is_given_away = before[-1] is residual and residual.is_contiguous()
        y = before[-1].addmm_(x, packed.data.t()) if is_given_away else torch.addmm(before[-1], x, packed.data.t())
        before = before[:-1]
    else:
        y = _product(x, packed.data, bias, dtype)
    for term in before:
        y.add_(term)
    if not is_plain:
        y = activate(y, activation, gated=shape.gated)
        y = y if residual is None else y.add_(residual)
    return y.to(out_dtype or x.dtype)


def _product(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x w^T + bias in dtype: x's, or fp32. Only on a GPU does torch multiply bf16 to fp32 without a copy."""
    if dtype == x.dtype:
        return functional.linear(x, w, bias)
    y = torch.mm(x, w.t(), out_dtype=dtype) if x.is_cuda else functional.linear(x.to(dtype), w.to(dtype))
    return y if bias is None else y.add_(bias)


def grouped_linear(
    x: Tensor,
    experts: Sequence[PackedWeight],
    starts: Tensor,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "identity",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `linear`, with rows starts[i] .. starts[i+1]-1 of x, addend, residual and the result for experts[i], all of them from one
    `pack_experts`. starts: int32 [X+1]; bias: [X,F]. Raises KernelError on shapes and dtypes."""
    code = activation_code(activation)
    first, library = experts[0], experts[0].library
    if library is None:
        return grouped_linear_torch(
            x, experts, starts, bias=bias, addend=addend, residual=residual, activation=activation, out_dtype=out_dtype
        )
    memory = _memory_of(experts)
    out = _new_out(x, first.shape, out_dtype)
    fields = first.fields | {"packed": memory, "expert_bytes": memory.shape[0] // len(experts), "starts": starts}
    library.call("grouped_linear", **fields, out=out, x=x, bias=bias, addend=addend, residual=residual, activation=code)
    return out


def grouped_linear_torch(
    x: Tensor,
    experts: Sequence[PackedWeight],
    starts: Tensor,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "identity",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    shapes = _check(x, experts[0].shape, addend, residual, out_dtype)
    shapes.sizes |= {"X": len(experts), "X+1": len(experts) + 1}
    shapes.check("starts", starts, "X+1", torch.int32)
    shapes.check("bias", bias, "X F", x.dtype)
    ends = [int(start) for start in starts]
    shapes.require(ends == sorted(ends) and (ends[0], ends[-1]) == (0, len(x)), f"starts must ascend from 0 to {len(x)}")
    out = _new_out(x, experts[0].shape, out_dtype)
    for index, (packed, begin, end) in enumerate(zip(experts, ends, ends[1:], strict=False)):
        rows = slice(begin, end)
        parts = {name: None if term is None else term[rows] for name, term in (("addend", addend), ("residual", residual))}
        own_bias = None if bias is None else bias[index]
        out[rows] = linear_torch(x[rows], packed, bias=own_bias, **parts, activation=activation, out_dtype=out_dtype)
    return out


def _new_out(x: Tensor, shape: WeightShape, out_dtype: torch.dtype | None) -> Tensor:
    width = shape.out_features // 2 if shape.gated else shape.out_features
    return torch.empty((x.shape[0], width), dtype=out_dtype or x.dtype, device=x.device)


def _memory_of(experts: Sequence[PackedWeight]) -> Tensor:
    """The bytes of all experts as one vector. Raises KernelError if they do not lie one behind the other."""
    data, step = experts[0].data, experts[0].size_bytes
    first = data.data_ptr()
    if any(packed.data.data_ptr() != first + i * step for i, packed in enumerate(experts)):
        raise KernelError("grouped_linear: experts must be all weights of one pack_experts, in order")
    return torch.as_strided(data, (step * len(experts),), (1,))


def _check(x: Tensor, shape: WeightShape, addend: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype | None) -> Shapes:
    shapes = Shapes("linear", E=shape.in_features, F=shape.out_features)
    shapes.sizes["F/2"] = shape.out_features // 2
    shapes.check("x", x, "T E", shape.dtype)
    shapes.check("addend", addend, "T F", x.dtype, torch.float32)
    shapes.check("residual", residual, "T F/2" if shape.gated else "T F", x.dtype, torch.float32)
    shapes.require(out_dtype in (None, x.dtype, torch.float32), f"out_dtype={out_dtype} must be {x.dtype} or torch.float32")
    return shapes
