"""Rotary embedding and cache write: twin against complex numbers, kernel against twin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, assert_close, rand, same_bits
from torch import Tensor

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library
from lmi_dist.ops.rotary import rotary_torch

BLOCK = 16
FP8 = torch.float8_e4m3fn


def case(
    num_tokens: int, heads: int, kv_heads: int, size: int, half: int, dtype: torch.dtype, cache: torch.dtype | None = None
) -> dict[str, Any]:
    """Arguments of `rotary` with q, k and v as views of one fused qkv, slots in no order, the second of them negative."""
    qkv = rand(num_tokens, (heads + 2 * kv_heads) * size, dtype=dtype).view(num_tokens, heads + 2 * kv_heads, size)
    angles = rand(50, half, seed=1)
    num_blocks = num_tokens // BLOCK + 2
    slots = torch.randperm(num_blocks * BLOCK, generator=torch.Generator().manual_seed(2))[:num_tokens].int()
    slots[1:2] = -1
    caches = {name: rand(num_blocks, kv_heads, BLOCK, size, dtype=cache or dtype, seed=3) for name in ("k_cache", "v_cache")}
    rows = (torch.arange(num_tokens) * 7 % 50).int()
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    return {"q": q, "k": k, "v": v, "cos": angles.cos(), "sin": angles.sin(), "rows": rows, "slots": slots, **caches}


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_twin_multiplies_complex_numbers(interleaved: bool) -> None:
    arguments = case(9, 4, 2, 16, 8, torch.float32)
    q = arguments["q"].double()
    pairs = q.unflatten(-1, (8, 2)) if interleaved else torch.stack(q.chunk(2, dim=-1), dim=-1)
    turn = torch.complex(arguments["cos"], arguments["sin"]).to(torch.complex128)[arguments["rows"].long()][:, None]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    expected = turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), dim=-1)

    rotary_torch(**arguments, interleaved=interleaved)

    assert_close(arguments["q"], expected.float())


def test_rotary_twin_writes_each_slot() -> None:
    arguments = case(40, 2, 2, 8, 4, torch.float32)
    before = copied(arguments)

    rotary_torch(**arguments)

    for token, slot in enumerate(arguments["slots"].tolist()):
        if slot >= 0:
            assert same_bits(arguments["k_cache"][slot // BLOCK, :, slot % BLOCK], arguments["k"][token])
            assert same_bits(arguments["v_cache"][slot // BLOCK, :, slot % BLOCK], before["v"][token])
    untouched = torch.ones(arguments["k_cache"].shape[0] * BLOCK, dtype=torch.bool)
    untouched[arguments["slots"][arguments["slots"] >= 0].long()] = False
    for name in ("k_cache", "v_cache"):
        after, was = (each[name].transpose(1, 2).flatten(0, 1)[untouched] for each in (arguments, before))
        assert same_bits(after, was)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 8, 4), (5, 4, 2, 24, 8), (113, 8, 1, 64, 32), (33, 6, 6, 80, 20)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_matches_twin(library: Library, dtype: torch.dtype, sizes: tuple[int, ...], interleaved: bool) -> None:
    arguments = case(*sizes, dtype)
    twins = copied(arguments)

    ops.rotary(**arguments, interleaved=interleaved)
    rotary_torch(**twins, interleaved=interleaved)

    for name in ("q", "k", "v", "k_cache", "v_cache"):
        assert_close(arguments[name], twins[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(5, 4, 2, 24, 8), (113, 8, 1, 64, 32)])
def test_fp8_cache_is_written_as_the_twin_does(library: Library, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Bit for bit, but where the rotation itself differs in its last bit and stands at a border: k is not turned here."""
    arguments = case(*sizes, dtype, FP8) | {"q": None, "cos": None, "sin": None, "rows": None, "k_scale": 0.3, "v_scale": 7.0}
    twins = copied(arguments)

    ops.rotary(**arguments)
    rotary_torch(**twins)

    assert all(same_bits(arguments[name], twins[name]) for name in ("k", "v", "k_cache", "v_cache"))


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, FP8])
def test_prompts_are_written_as_single_tokens_are(library: Library, cache: torch.dtype) -> None:
    """Slots that follow one another are written together: from an odd and an even place, up to a block's end and beyond."""
    slots = torch.tensor([*range(3, 40), *range(64, 66), *range(83, 84), *range(100, 150), -1, *range(6 * BLOCK, 6 * BLOCK + 2)])
    dtype = torch.float32 if cache == torch.float32 else torch.bfloat16
    together = case(len(slots), 3, 2, 24, 12, dtype, cache) | {"slots": slots.int()}
    together |= {name: rand(10, 2, BLOCK, 24, dtype=cache, seed=3) for name in ("k_cache", "v_cache")}
    alone = copied(together)

    ops.rotary(**together)
    for token in range(len(slots)):
        ops.rotary(**alone | {name: alone[name][token : token + 1] for name in ("q", "k", "v", "rows", "slots")})

    assert all(same_bits(together[name], alone[name]) for name in ("q", "k", "k_cache", "v_cache"))


def test_turned_keys_go_to_fp8(library: Library) -> None:
    turned, plain = case(33, 6, 6, 80, 20, torch.bfloat16, FP8), case(33, 6, 6, 80, 20, torch.bfloat16)

    ops.rotary(**turned)
    ops.rotary(**plain)

    taken = turned["slots"][turned["slots"] >= 0].long()
    for name in ("k_cache", "v_cache"):
        held, wanted = (each[name].transpose(1, 2).flatten(0, 1)[taken] for each in (turned, plain))
        assert same_bits(held, wanted.to(FP8))


def numbers_and_borders() -> Tensor:
    """fp32: all that fp8 can hold, what lies half-way between two neighbours, both one bit on, and what it cannot hold."""
    held = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    marks = torch.cat([held, (held[1:] + held[:-1]) / 2, torch.tensor([464.0, 480.0, 1e9, 1e-9])])
    near = torch.cat([marks, marks.nextafter(torch.tensor(1e30)), marks.nextafter(torch.tensor(-1.0))]).abs()
    return torch.cat([near, -near, torch.tensor([float("inf"), -float("inf"), float("nan")])])


def nearest(x: float) -> int:
    """The header's rule, looked up among all that a byte can be."""
    if x != x:
        return 0x7F
    held = torch.arange(127, dtype=torch.uint8).view(FP8).double()
    distance = (held - min(abs(x), 448.0)).abs()
    ties = (distance == distance.min()).nonzero()[:, 0].tolist()
    sign = 0x80 if torch.tensor(x).signbit() else 0
    return sign | min(ties, key=lambda code: code % 2)


def test_twin_takes_the_nearest_number_of_fp8() -> None:
    x = numbers_and_borders()
    cache = write(rotary_torch, x)

    assert cache.tolist() == [nearest(each) for each in x.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_takes_the_nearest_number_of_fp8(library: Library, dtype: torch.dtype) -> None:
    """Every 16-bit number there is; in fp32 those on either side of a border."""
    x = numbers_and_borders() if dtype == torch.float32 else torch.arange(1 << 16).to(torch.uint16).view(dtype)
    held, twin = write(ops.rotary, x).view(FP8).float(), write(rotary_torch, x).view(FP8).float()

    assert torch.equal(held.nan_to_num(500.0), twin.nan_to_num(500.0))
    assert torch.equal(held.signbit() | held.isnan(), twin.signbit() | held.isnan())


def write(rotary: Callable[..., None], x: Tensor) -> Tensor:
    """uint8: what an fp8 cache holds of the numbers in x."""
    num_blocks = -(-len(x) // (BLOCK * 256))
    num_tokens = num_blocks * BLOCK
    k = torch.nn.functional.pad(x, (0, num_tokens * 256 - len(x))).view(num_tokens, 1, 256)
    caches = [torch.zeros(num_blocks, 1, BLOCK, 256, dtype=FP8) for _ in range(2)]
    rotary(None, k, k, None, None, None, *caches, torch.arange(num_tokens, dtype=torch.int32))
    assert same_bits(*caches)
    return caches[0].view(torch.uint8).flatten()[: len(x)]


@pytest.mark.parametrize("absent", [("q",), ("k", "v", "k_cache", "v_cache", "slots"), ("cos", "sin", "rows")])
def test_rotary_does_without_what_is_absent(library: Library, absent: tuple[str, ...]) -> None:
    arguments = case(20, 4, 2, 16, 8, torch.float32) | dict.fromkeys(absent)
    twins = copied(arguments)

    ops.rotary(**arguments)
    rotary_torch(**twins)

    for name in ("q", "k", "k_cache", "v_cache"):
        assert arguments[name] is None or torch.allclose(arguments[name], twins[name], atol=1e-6)


def test_rotary_bits_do_not_depend_on_other_tokens(library: Library) -> None:
    together, alone = (case(67, 4, 2, 40, 20, torch.bfloat16) for _ in range(2))

    ops.rotary(**together)
    for token in range(67):
        one = {name: alone[name][token : token + 1] for name in ("q", "k", "v", "rows", "slots")}
        ops.rotary(**{**alone, **one})

    assert all(same_bits(together[name], alone[name]) for name in ("q", "k", "k_cache", "v_cache"))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("v", rand(5, 3, 8), r"v has shape \[5, 3, 8\]; it must be \[T=5, K=2, D=8\]"),
        ("k_cache", rand(2, 2, 16, 4), r"k_cache has shape \[2, 2, 16, 4\]; it must be \[N=2, K=2, P=16, D=8\]"),
        ("slots", torch.full((5,), 99, dtype=torch.int32), r"an entry of slots"),
        ("rows", torch.full((5,), 50, dtype=torch.int32), r"an entry of rows"),
        ("rows", torch.full((5,), -1, dtype=torch.int32), r"an entry of rows"),
        ("sin", rand(50, 3), r"sin has shape \[50, 3\]; it must be"),
        ("v_cache", rand(2, 2, 16, 8, dtype=torch.float16), r"v_cache is .*(F16|float16); it must be .*(F32|float32)"),
        ("v_cache", rand(2, 2, 16, 8, dtype=FP8), r"v_cache is .*(F8E4M3|float8_e4m3fn); it must be .*(F32|float32)"),
        ("slots", None, r"slots"),
        ("k", None, r"k"),
        ("rows", None, r"rows"),
    ],
)
def test_rotary_names_what_is_wrong(column: str, name: str, value: Tensor | None, sentence: str) -> None:
    arguments = case(5, 4, 2, 8, 4, torch.float32)

    with pytest.raises(KernelError, match="^rotary: .*" + sentence):
        ops.rotary(**{**arguments, name: value})
