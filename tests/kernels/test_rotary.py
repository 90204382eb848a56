"""Rotary embedding and cache write: twin against complex numbers, kernel against twin."""

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


def case(num_tokens: int, heads: int, kv_heads: int, size: int, half: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `rotary` with q, k and v as views of one fused qkv, slots in no order, the second of them negative."""
    qkv = rand(num_tokens, (heads + 2 * kv_heads) * size, dtype=dtype).view(num_tokens, heads + 2 * kv_heads, size)
    angles = rand(50, half, seed=1)
    num_blocks = num_tokens // BLOCK + 2
    slots = torch.randperm(num_blocks * BLOCK, generator=torch.Generator().manual_seed(2))[:num_tokens].int()
    slots[1:2] = -1
    caches = {name: rand(num_blocks, kv_heads, BLOCK, size, dtype=dtype, seed=3) for name in ("k_cache", "v_cache")}
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
        ("slots", None, r"slots"),
        ("k", None, r"k"),
        ("rows", None, r"rows"),
    ],
)
def test_rotary_names_what_is_wrong(column: str, name: str, value: Tensor | None, sentence: str) -> None:
    arguments = case(5, 4, 2, 8, 4, torch.float32)

    with pytest.raises(KernelError, match="^rotary: .*" + sentence):
        ops.rotary(**{**arguments, name: value})
