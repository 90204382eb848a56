"""What only a column on a device promises: entries out of range are passed over, since nobody has seen them before the call
returns. On the stand-in."""

import pytest
import torch
from kernel_cases import rand, same_bits
from torch import Tensor

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library

pytestmark = pytest.mark.device_column


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_slots_and_rows_out_of_range_write_nothing(library: Library) -> None:
    k, v, caches = rand(4, 2, 8), rand(4, 2, 8, seed=1), [torch.zeros(2, 2, 16, 8) for _ in range(2)]
    before = k.clone()

    ops.rotary(None, k, v, torch.zeros(3, 4), torch.ones(3, 4), ints(3, -1, 2, 0), *caches, ints(-1, 32, 31, 5))

    assert same_bits(k[:2], before[:2])
    assert not same_bits(k[2], before[2])
    assert [int((cache != 0).any(-1).sum()) for cache in caches] == [4, 4]  # two tokens of two heads
    assert same_bits(caches[1][1, :, 15], v[2])


def test_pairs_out_of_range_are_not_gathered(library: Library) -> None:
    out, x = torch.full((4, 8), 7.0), rand(2, 8)

    library.call("moe_gather", out=out, x=x, order=ints(3, -1, 4, 0))

    assert same_bits(out, torch.stack([x[1], torch.full((8,), 7.0), torch.full((8,), 7.0), x[0]]))


def test_adapters_out_of_range_add_nothing(library: Library) -> None:
    out = torch.zeros(3, 4)

    ops.lora(out, rand(3, 8), rand(2, 1, 8, seed=1), rand(2, 4, 1, seed=2), torch.ones(2), ints(2, 1, -1))

    assert (out != 0).any(-1).tolist() == [False, True, False]


def test_penalized_ids_out_of_range_are_passed_over(library: Library) -> None:
    logits, one = torch.zeros(1, 4), torch.ones(1)

    ops.penalize(
        logits,
        ints(0, 3),
        ints(-1, 3, 4),
        ints(1, 1, 1),
        one,
        one,
        0 * one,
        ints(0, 3),
        ints(-1, 0, 4),
        torch.tensor([1.0, 2.0, 3.0]),
    )

    assert logits.tolist() == [[2.0, 0.0, 0.0, -1.0]]


@pytest.mark.sim_column
def test_level_is_an_architecture_and_an_order(library: Library) -> None:
    library.set_level("sm_90a random:3")
    assert library.describe().startswith("sim sm_90a random ")

    library.set_level("reverse")
    assert library.describe().startswith("sim sm_80 reverse ")

    library.set_level("best")
    assert library.describe().startswith("sim sm_90a forward ")

    for level in ("sm_70 forward", "sm_90a", "sm_90a sideways", ""):
        with pytest.raises(KernelError, match=f"level {level} is not an order of threads"):
            library.set_level(level)
