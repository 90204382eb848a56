"""Linear on packed weights: twins against double, kernels against twins, bits over rows and threads."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, HALVES, assert_close, on_sm90a, rand, same_bits, strided
from mirrored import Mirrored
from torch import Tensor
from torch.nn import functional

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops import column as columns
from lmi_dist.ops.abi import Library
from lmi_dist.ops.activation import ACTIVATIONS, Activation
from lmi_dist.ops.linear import Format, PackedWeight, linear_torch

SIZES = [(1, 1, 1), (2, 32, 64), (5, 33, 7), (13, 100, 129), (300, 70, 96)]  # T, F, E
FORMATS: list[tuple[Format, int]] = [("dense", 0), ("int8", 1), ("int4", 1)]  # with how many groups


def weights(shape: tuple[int, int], dtype: torch.dtype, format: Format, num_groups: int, seed: int) -> dict[str, Any]:
    """What `put` takes for a weight of this shape and format, its numbers about 1/sqrt(E)."""
    num_outputs, num_inputs = shape
    if format == "dense":
        return {"w": (rand(*shape, seed=seed) / num_inputs**0.5).to(dtype)}
    generator, top = torch.Generator().manual_seed(seed), 16 if format == "int4" else 256
    draw = {"generator": generator, "dtype": torch.uint8}
    return {
        "w": torch.randint(0, top, shape, **draw),
        "zeros": torch.randint(0, top + (top == 16), (num_outputs, num_groups), **draw),
        "scales": (rand(num_outputs, num_groups, seed=seed).abs() * 3 / top / num_inputs**0.5).to(dtype),
    }


def packed(shape: tuple[int, int], values: dict[str, Any], dtype: torch.dtype, gated: bool = False) -> PackedWeight:
    """The weight packed for the chosen column, in two pieces."""
    format: Format = "dense" if "zeros" not in values else "int4" if values["w"].max() < 16 else "int8"
    group = shape[1] // values["zeros"].shape[1] if "zeros" in values else 0
    weight = ops.pack_linear(*shape, dtype, gated=gated, format=format, group=group)
    for rows in (slice(0, shape[0] // 3), slice(shape[0] // 3, shape[0])):
        if rows.start < rows.stop:
            weight.put(row_offset=rows.start, **{name: value[rows] for name, value in values.items()})
    return weight


def on_torch(*arguments: Any, **options: Any) -> PackedWeight:
    with ops.using("torch", 1):
        return packed(*arguments, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_twin_is_torchs(dtype: torch.dtype) -> None:
    x, values, bias = rand(9, 40, dtype=dtype), weights((24, 40), dtype, "dense", 0, 1), rand(24, dtype=dtype, seed=2)

    out = linear_torch(x, on_torch((24, 40), values, dtype), bias=bias)

    assert_close(out, functional.linear(x.double(), values["w"].double(), bias.double()).to(dtype))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_linear_twin_dequantises_by_group(format: Format) -> None:
    x, values = rand(9, 40), weights((24, 40), torch.float32, format, 5, 1)
    dense = torch.stack(
        [(values["w"][:, e] - values["zeros"][:, e // 8].double()) * values["scales"][:, e // 8] for e in range(40)], 1
    )

    out = linear_torch(x, on_torch((24, 40), values, torch.float32))

    assert_close(out, (x.double() @ dense.T).float())


def test_linear_twin_adds_in_the_stated_order() -> None:
    x, values = rand(9, 40), weights((24, 40), torch.float32, "dense", 0, 1)
    bias, addend, residual = rand(24, seed=2), rand(9, 24, seed=3), rand(9, 12, seed=4)
    weight = on_torch((24, 40), values, torch.float32, gated=True)

    out = linear_torch(x, weight, bias=bias, addend=addend, residual=residual, activation="silu")

    y = x.double() @ values["w"].double().T + bias + addend
    assert_close(out, (functional.silu(y[:, :12]) * y[:, 12:] + residual).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_dense_linear_matches_twin(library: Library, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    num_rows, *shape = size
    values = weights((shape[0], shape[1]), dtype, "dense", 0, 1)
    x = strided(rand(num_rows, shape[1], dtype=dtype))

    out = ops.linear(x, packed((shape[0], shape[1]), values, dtype))

    assert_close(out, linear_torch(x, on_torch((shape[0], shape[1]), values, dtype)))


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(("num_inputs", "num_groups"), [(1, 1), (64, 2), (21, 3), (130, 1), (30, 30)])
@pytest.mark.parametrize("num_rows", [1, 6, 29])
def test_quantised_linear_matches_twin(library: Library, format: Format, num_inputs: int, num_groups: int, num_rows: int) -> None:
    values = weights((50, num_inputs), torch.bfloat16, format, num_groups, 1)
    values["w"][0, 0] = 255 if format == "int8" else 15
    x = rand(num_rows, num_inputs, dtype=torch.bfloat16)

    out = ops.linear(x, packed((50, num_inputs), values, torch.bfloat16), out_dtype=torch.float32)

    twin = linear_torch(x, on_torch((50, num_inputs), values, torch.bfloat16), out_dtype=torch.float32)
    assert_close(out, twin)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_linear_finishes_as_its_twin(library: Library, dtype: torch.dtype, gated: bool, activation: Activation, wide: bool) -> None:
    values, x = weights((70, 40), dtype, "dense", 0, 1), rand(19, 40, dtype=dtype)
    terms_dtype = torch.float32 if wide else dtype
    terms = {
        "bias": rand(70, dtype=dtype, seed=2),
        "addend": strided(rand(19, 70, dtype=terms_dtype, seed=3)),
        "residual": strided(rand(19, 35 if gated else 70, dtype=terms_dtype, seed=4)),
    }

    out = ops.linear(x, packed((70, 40), values, dtype, gated), **terms, activation=activation, out_dtype=terms_dtype)

    twin = on_torch((70, 40), values, dtype, gated)
    assert_close(out, linear_torch(x, twin, **terms, activation=activation, out_dtype=terms_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_rows", [1, 30, 75])
def test_wide_rows_are_finished_in_groups_of_panels(library: Library, dtype: torch.dtype, gated: bool, num_rows: int) -> None:
    """22 panels, the last one in part, which on the CPU are up to three groups a thread; inputs in one part and in several."""
    values, x = weights((700, 1100), dtype, "dense", 0, 1), rand(num_rows, 1100, dtype=dtype)
    terms = {"bias": rand(700, dtype=dtype, seed=2), "residual": rand(num_rows, 350 if gated else 700, dtype=dtype, seed=4)}

    out = ops.linear(x, packed((700, 1100), values, dtype, gated), **terms, activation="silu")

    assert_close(out, linear_torch(x, on_torch((700, 1100), values, dtype, gated), **terms, activation="silu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "num_groups"), FORMATS)
def test_linear_bits_do_not_depend_on_number_of_rows(library: Library, dtype: torch.dtype, format: Format, num_groups: int) -> None:
    weight = packed((80, 150), weights((80, 150), dtype, format, num_groups, 1), dtype)
    x = rand(530, 150, dtype=dtype)

    everything = ops.linear(x, weight)

    for num_rows in (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 25, 255, 256, 257):
        start = 530 - num_rows
        assert same_bits(ops.linear(x[:num_rows], weight), everything[:num_rows])
        assert same_bits(ops.linear(x[start:], weight), everything[start:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.cpu_column
def test_long_rows_are_taken_in_blocks_of_fewer(library: Library, dtype: torch.dtype) -> None:
    """A block's x is 6 MiB at most: 79 rows in bf16, 40 in fp32."""
    weight, x = packed((32, 40_000), weights((32, 40_000), dtype, "dense", 0, 1), dtype), rand(100, 40_000, dtype=dtype)

    everything = ops.linear(x, weight)

    for row in (0, 39, 40, 49, 50, 99):
        assert same_bits(ops.linear(x[row : row + 1], weight), everything[row : row + 1])


@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
@pytest.mark.cpu_column
def test_linear_bits_do_not_depend_on_threads(library: Library, format: Format) -> None:
    weight = packed((200, 600), weights((200, 600), torch.bfloat16, format, 4, 1), torch.bfloat16)
    x = rand(40, 600, dtype=torch.bfloat16)

    results = []
    for num_threads in (1, 2, 3, 7):
        library.set_threads(num_threads)
        results.append(ops.linear(x, weight, residual=rand(40, 200), activation="silu", out_dtype=torch.float32))

    assert all(same_bits(result, results[0]) for result in results)


def test_linear_sums_inputs_in_ascending_order(library: Library) -> None:
    """1 + 2^-24 + 2^-24 is 1 in this order and 1 + 2^-23 in the other: shows one accumulator from the first input on."""
    small = 2.0**-24
    weight = packed((32, 3), {"w": torch.tensor([[1.0, small, small]]).repeat(32, 1)}, torch.float32)

    for num_rows in (1, 5, 40):
        assert (ops.linear(torch.ones(num_rows, 3), weight) == 1.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_round_to_nearest_even(library: Library, dtype: torch.dtype) -> None:
    """Every finite number of the dtype, those halfway to the next one and their neighbours; infinity, NaN and overflow."""
    exact = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    bits = exact.view(torch.int32)
    halfway = bits + (1 << (15 if dtype == torch.bfloat16 else 12))
    every = torch.cat([bits, halfway, halfway + 1, halfway - 1]).view(torch.float32)
    values = torch.cat([every, -every]).view(-1, 32) + 0.0  # the sum before it turns -0 into 0
    weight = packed((32, 1), {"w": torch.zeros(32, 1, dtype=dtype)}, dtype)

    out = ops.linear(torch.zeros(len(values), 1, dtype=dtype), weight, addend=values)

    expected = values.to(dtype)
    is_nan = expected.isnan()
    assert torch.equal(out.isnan(), is_nan)
    assert torch.equal(out[~is_nan], expected[~is_nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_grouped_linear_is_one_linear_an_expert(library: Library, dtype: torch.dtype, gated: bool) -> None:
    experts = ops.pack_experts(4, 70, 40, dtype, gated=gated)
    for index, expert in enumerate(experts):
        expert.put(**weights((70, 40), dtype, "dense", 0, index))
    x, bias, starts = rand(60, 40, dtype=dtype), rand(4, 70, dtype=dtype, seed=9), torch.tensor([0, 13, 13, 59, 60]).int()
    residual = rand(60, 35 if gated else 70, dtype=dtype, seed=10)

    out = ops.grouped_linear(x, experts, starts, bias=bias, residual=residual, activation="silu")

    for index, expert in enumerate(experts):
        rows = slice(int(starts[index]), int(starts[index + 1]))
        alone = ops.linear(x[rows], expert, bias=bias[index], residual=residual[rows], activation="silu")
        assert same_bits(out[rows], alone)


def test_grouped_linear_matches_twin(library: Library) -> None:
    x, starts = rand(60, 40), torch.tensor([0, 13, 13, 60]).int()
    results = []
    for column in (library.path.stem.removeprefix("liblmi_"), "torch"):
        with ops.using(column, 1, path=library.path):
            experts = ops.pack_experts(3, 70, 40, torch.float32)
            for index, expert in enumerate(experts):
                expert.put(**weights((70, 40), torch.float32, "dense", 0, index))
            results.append(ops.grouped_linear(x, experts, starts))

    assert_close(results[0], results[1])


@pytest.mark.sim_column
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_rows", [1, 33, 200])
def test_linear_on_sm90a_has_the_same_bits(library: Library, dtype: torch.dtype, gated: bool, num_rows: int) -> None:
    """Several blocks of outputs and of tokens, each with an end that only fills tiles, and more steps than a ring has slots."""
    weight, x = packed((150, 648), weights((150, 648), dtype, "dense", 0, 1), dtype, gated), rand(num_rows, 648, dtype=dtype)
    terms = {"bias": rand(150, dtype=dtype, seed=2), "residual": rand(num_rows, 75 if gated else 150, seed=3)}
    expected = ops.linear(x, weight, **terms, activation="silu", out_dtype=torch.float32)

    with on_sm90a(library) as launched:
        out = ops.linear(x, weight, **terms, activation="silu", out_dtype=torch.float32)
        kernels = launched()

    assert kernels == {"linear by groups"}
    assert same_bits(out, expected)


@pytest.mark.sim_column
@pytest.mark.parametrize("num_rows", [40, 150])
def test_grouped_linear_on_sm90a_has_the_same_bits(library: Library, num_rows: int) -> None:
    experts = ops.pack_experts(3, 70, 72, torch.bfloat16)
    for index, expert in enumerate(experts):
        expert.put(**weights((70, 72), torch.bfloat16, "dense", 0, index))
    x, starts = rand(num_rows, 72, dtype=torch.bfloat16), torch.tensor([0, 13, 13, num_rows]).int()
    expected = ops.grouped_linear(x, experts, starts)

    with on_sm90a(library) as launched:
        out = ops.grouped_linear(x, experts, starts)
        kernels = launched()

    assert kernels == {"linear by groups"}
    assert same_bits(out, expected)


@pytest.mark.sim_column
def test_linear_off_16_bytes_goes_the_way_of_sm80(library: Library) -> None:
    weight = packed((32, 40), weights((32, 40), torch.bfloat16, "dense", 0, 1), torch.bfloat16)

    with on_sm90a(library) as launched:
        ops.linear(rand(5, 41, dtype=torch.bfloat16)[:, :40], weight)
        kernels = launched()

    assert kernels == {"linear"}


# ---- torch's product ----


@pytest.fixture
def device(library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the column's tensors lie, with torch's product for dense linears: a GPU, or on the stand-in the CPU."""
    monkeypatch.setitem(columns._libraries, library.path, library.far if isinstance(library, Mirrored) else library)
    with ops.using(library.path.stem.removeprefix("liblmi_"), 1, path=library.path, batch_invariant=False) as opened:
        assert opened is not None
        yield opened.device


TERMS: dict[str, tuple[str, ...]] = {
    "none": (), "bias": ("bias",), "residual": ("residual",), "both": ("bias", "residual"), "all": ("bias", "addend", "residual"),
}  # fmt: skip


@pytest.mark.device_column
@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize(("gated", "activation"), [(False, "identity"), (False, "gelu"), (True, "silu")])
@pytest.mark.parametrize("terms", TERMS)
def test_torchs_product_finishes_as_the_twin(
    device: str, dtype: torch.dtype, wide: bool, gated: bool, activation: Activation, terms: str
) -> None:
    """Rounded once more on the way: each of the terms, which are of about 1, may be off by one unit in its last place."""
    values, x = weights((70, 40), dtype, "dense", 0, 1), strided(rand(19, 40, dtype=dtype))
    terms_dtype = torch.float32 if wide else dtype
    drawn = {
        "bias": rand(70, dtype=dtype, seed=2),
        "addend": rand(19, 70, dtype=terms_dtype, seed=3),
        "residual": strided(rand(19, 35 if gated else 70, dtype=terms_dtype, seed=4)),
    }
    given: dict[str, Any] = {name: drawn[name] for name in TERMS[terms]}
    options: dict[str, Any] = {"activation": activation, "out_dtype": torch.float32 if wide else None}
    weight = packed((70, 40), {"w": values["w"].to(device)}, dtype, gated)
    there = {name: term.to(device) for name, term in given.items()}

    out = ops.linear(x.to(device), weight, **there, **options)

    assert weight.data.shape == (70, 40)
    # a residual's place may be the result's
    assert all(torch.equal(there[name].cpu(), term) for name, term in given.items() if name != "residual")
    expected = linear_torch(x, on_torch((70, 40), values, dtype, gated), **given, **options)
    slack = None if dtype == torch.float32 else torch.full_like(expected, 3 * 2**-7, dtype=torch.float32)
    assert_close(out.cpu(), expected, slack=slack)


@pytest.mark.device_column
def test_torchs_product_takes_its_residuals_place(device: str) -> None:
    """So that nothing is copied; not where its rows lie apart, nor an addend's."""
    weight = packed((24, 40), {"w": rand(24, 40, seed=1).to(device)}, torch.float32)
    x, residual = rand(5, 40).to(device), rand(5, 24, seed=2).to(device)
    before = residual.clone()

    kept = [
        ops.linear(x, weight, **{name: given})
        for name, given in (("addend", residual), ("residual", residual.t().contiguous().t()))
    ]
    assert torch.equal(residual, before)
    out = ops.linear(x, weight, residual=residual)

    assert out.data_ptr() == residual.data_ptr()
    for each in kept:
        assert_close(each, out)


@pytest.mark.device_column
@pytest.mark.parametrize("num_rows", [0, 1, 33])
def test_torchs_product_sums_in_fp32_for_logits(device: str, num_rows: int) -> None:
    """What bf16 would round to ties."""
    values, x = weights((64, 512), torch.bfloat16, "dense", 0, 1), rand(num_rows, 512, dtype=torch.bfloat16)
    weight = packed((64, 512), {"w": values["w"].to(device)}, torch.bfloat16)

    out = ops.linear(x.to(device), weight, out_dtype=torch.float32)

    assert_close(out.cpu(), linear_torch(x, on_torch((64, 512), values, torch.bfloat16), out_dtype=torch.float32))


@pytest.mark.device_column
def test_torchs_product_is_for_single_dense_weights(device: str) -> None:
    dense, quantised = ops.pack_linear(8, 16, torch.float32), ops.pack_linear(8, 16, torch.float32, format="int8", group=16)
    experts = ops.pack_experts(2, 8, 16, torch.float32)

    assert dense.library is None
    assert quantised.library is not None
    assert all(expert.library is not None for expert in experts)
    for index, (sentence, call) in enumerate(bad_calls(dense)):
        if index != 7:  # of experts
            with pytest.raises(KernelError, match="^" + sentence):
                call()


def test_linear_may_write_over_its_residual(library: Library) -> None:
    values, x, residual = weights((70, 40), torch.float32, "dense", 0, 1), rand(19, 40), rand(19, 70, seed=2)
    weight = packed((70, 40), values, torch.float32)
    expected = ops.linear(x, weight, residual=residual)

    library.call("linear", **weight.fields, out=residual, x=x, residual=residual)

    assert same_bits(residual, expected)


def bad_calls(weight: PackedWeight) -> list[tuple[str, Any]]:
    """A sentence, and the call that must give it."""
    x = rand(3, 16)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    return [
        (r"linear: x has shape \[3, 15\]; it must be \[T=3, E=16\]", lambda: ops.linear(x[:, :15], weight)),
        (r"linear: x is .*; it must be .*32", lambda: ops.linear(x.bfloat16(), weight)),
        (r"linear: bias has shape \[7\]; it must be \[F=8\]", lambda: ops.linear(x, weight, bias=rand(7))),
        (r"linear: addend has shape \[2, 8\]; it must be \[T=3, F=8\]", lambda: ops.linear(x, weight, addend=rand(2, 8))),
        (r"linear: residual has shape \[3, 4\]; it must be \[T=3, F=8\]", lambda: ops.linear(x, weight, residual=rand(3, 4))),
        (r"linear_pack: w has shape \[2, 15\]; it must be \[rows=2, E=16\]", lambda: weight.put(rand(2, 15))),
        (r"linear_pack: .*row", lambda: weight.put(rand(2, 16), 7)),
        (r"grouped_linear: .*starts|linear: starts", lambda: ops.grouped_linear(x, [weight], starts - 1)),
        (r"pack_linear: group=5 must divide in_features=16", lambda: ops.pack_linear(8, 16, torch.float32, format="int4", group=5)),
        (r"pack_linear: out_features=7 must be even", lambda: ops.pack_linear(7, 16, torch.float32, gated=True)),
        (r"pack_linear: a weight \[0, 16\] is empty", lambda: ops.pack_linear(0, 16, torch.float32)),
    ]


@pytest.mark.parametrize("index", range(11))
def test_linear_names_what_is_wrong(column: str, index: int) -> None:
    weight = ops.pack_linear(8, 16, torch.float32)
    sentence, call = bad_calls(weight)[index]

    with pytest.raises(KernelError, match="^" + sentence):
        call()


def test_zeros_of_int4_are_at_most_16(column: str) -> None:
    weight = ops.pack_linear(8, 16, torch.float32, format="int4", group=16)
    values = {"w": torch.zeros(8, 16, dtype=torch.uint8), "scales": torch.ones(8, 1)}
    weight.put(**values, zeros=torch.full((8, 1), 16, dtype=torch.uint8))

    with pytest.raises(KernelError, match=r"^linear_pack: zeros has 17; of int4 it must be 0 to 16"):
        weight.put(**values, zeros=torch.full((8, 1), 17, dtype=torch.uint8))


def test_experts_must_lie_together(library: Library) -> None:
    apart: list[PackedWeight] = [ops.pack_linear(8, 16, torch.float32) for _ in range(2)]

    with pytest.raises(KernelError, match="one pack_experts"):
        ops.grouped_linear(rand(3, 16), apart, torch.tensor([0, 1, 3], dtype=torch.int32))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_inputs", [32, 96, 100])  # the last one not by tiles
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_lie_alike_however_many_come_at_once(library: Library, dtype: torch.dtype, num_inputs: int, gated: bool) -> None:
    """Where 16 rows of a panel come at once they are packed by tiles, a row that comes alone is not."""
    w, x = strided(rand(150, num_inputs, dtype=dtype, seed=1)), rand(3, num_inputs, dtype=dtype)
    whole, apart = (ops.pack_linear(150, num_inputs, dtype, gated=gated) for _ in range(2))

    whole.put(w)
    for row in range(150):
        apart.put(w[row : row + 1], row)

    assert torch.equal(ops.linear(x, whole), ops.linear(x, apart))


def test_padding_of_a_panel_stays_out(library: Library) -> None:
    """Outputs beyond F are in the panel and nowhere else: what stands after out is left alone."""
    wide: Tensor = torch.full((5, 40), 7.0)
    weight = packed((33, 20), weights((33, 20), torch.float32, "dense", 0, 1), torch.float32)

    library.call("linear", **weight.fields, out=wide[:, :33], x=rand(5, 20))

    assert (wide[:, 33:] == 7.0).all()
