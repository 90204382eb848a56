"""Tests on a GPU run on copies of their tensors (support/mirrored.py): nothing but what the column writes may differ."""

import pytest
import torch
from kernel_cases import rand, same_bits, strided
from mirrored import Mirrored

from lmi_dist import ops
from lmi_dist.ops.abi import Library, find_library


@pytest.fixture
def mirrored() -> Mirrored:
    path = find_library(list(ops.__path__), "liblmi_sim.so")
    assert path is not None
    return Mirrored(path, "cpu")


def test_column_sees_copies_and_its_results_come_back(mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    """An out between other columns, a residual that is changed in place, and two views of one memory."""
    addresses, call = [], mirrored.far.call
    monkeypatch.setattr(
        mirrored.far, "call", lambda name, **fields: addresses.append(fields["x"].data_ptr()) or call(name, **fields)
    )
    results = []
    for library in (Library(mirrored.path), mirrored):
        both, residual = strided(rand(6, 16)), rand(3, 16, seed=1)
        library.call("rms_norm", out=both[3:], x=both[:3], residual=residual, eps=1e-5)
        results.append((both._base, residual))

    (expected, expected_residual), (actual, actual_residual) = results

    assert same_bits(actual, expected)
    assert same_bits(actual_residual, expected_residual)
    assert not same_bits(actual_residual, rand(3, 16, seed=1))
    assert addresses != [actual.data_ptr() + 2 * actual.element_size()]


def test_views_of_one_memory_stay_that(mirrored: Mirrored) -> None:
    x = rand(2, 8)
    before = x.clone()

    mirrored.call("activation", out=x, x=x, activation=4)

    assert torch.equal(x, before.clamp(min=0))
