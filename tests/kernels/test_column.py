"""Which column is taken, and what stays of it."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import rand

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops import column
from lmi_dist.ops.abi import Library


@pytest.mark.cpu_column
def test_selection_is_told_and_logged(library: Library, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ops.using("cpu", 2, path=library.path):
        told = ops.describe()

    assert told.startswith("cpu ")
    assert told.endswith("), 2 threads")
    assert [record.getMessage() for record in caplog.records] == [f"kernels: {told}"]


def test_torch_is_taken_where_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "__path__", [])

    with ops.using("auto", 2) as library:
        assert library is None
        assert ops.describe() == "torch (library not built), 2 threads"
    with pytest.raises(KernelError, match=r"kernels=cpu needs liblmi_cpu\.so, which is not built"):
        ops.select("cpu")


def test_unknown_column_is_refused() -> None:
    with pytest.raises(KernelError, match="column='rocm' must be auto, torch, cpu, cuda, sim"):
        ops.select("rocm")


def test_leaving_a_column_restores_the_last_one(library: Library) -> None:
    before, torch_threads = column.chosen(), torch.get_num_threads()

    with ops.using("torch", torch_threads + 1):
        assert column.library() is None

    assert column.chosen() is before
    assert torch.get_num_threads() == torch_threads


@pytest.mark.cpu_column
def test_level_that_is_not_known_is_refused(library: Library) -> None:
    with pytest.raises(KernelError, match="level avx1024 is not in this library or not in this machine"):
        library.set_level("avx1024")


def test_weight_stays_with_its_column(library: Library) -> None:
    weight, x = ops.pack_linear(8, 16, torch.float32), rand(3, 16)
    weight.put(rand(8, 16))
    expected = ops.linear(x, weight)

    with ops.using("torch", 1):
        out = ops.linear(x, weight)

    assert torch.equal(out, expected)


def test_library_is_found_from_any_folder(tmp_path: Path) -> None:
    program = "from lmi_dist import ops; print(ops.select('cpu', 1))"

    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout.startswith("cpu ")
