"""The script for a GPU hour (tests/benchmarks/gpu.py), as far as a machine without a GPU can try it: on the stand-in, tiny."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nvcc import NVCC

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_golden

ROOT = Path(__file__).parents[2]
# Of each part, what must have a row, whatever else has one
ROWS = {
    "golden": ["copies", "ldmatrix", "mma bf16", "mma f16", "mma e4m3", "mma int8", "named barriers", "exp2", "boxes", "wgmma"],
    "suite": ["tests/kernels"],
    "kernels": [
        "limits", "paged decode attention, 3 x 40", "paged decode attention, 1 x 600", "prefill attention", "rms norm",
        "add + rms norm", "layer norm", "rotary + cache write", "silu, gated", "gelu", "embedding", "experts: gather",
        "experts: combine", "sample", "logprobs", "linear",
    ],
    "steps": [
        "limits", "decode step, batch 1, 16 prompt tokens, recorded", "decode step, batch 2, 20 prompt tokens, from Python",
        "GPU busy, batch 1", "GPU busy, batch 2", "same ids with and without overlap, batch 2",
    ],
    "peers": ["decode step of transformers"],
}  # fmt: skip


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> gpu_golden.Twin:
    return gpu_golden.Twin(gpu_golden.build_twin(tmp_path_factory.mktemp("golden")), "forward")


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Where it sees no GPU."""
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "gpu.py", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.timeout(600)  # five processes and a build, on a machine that may have other work
def test_script_fills_every_row_on_the_stand_in(tmp_path: Path) -> None:
    done = run_script("--column=sim", "--tiny", f"--out={tmp_path}")

    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(parts) == list(ROWS)
    for part, rows in parts.items():
        for name in ROWS[part]:
            assert any(row["name"].startswith(name) for row in rows), f"{part}: {name}\n{done.stdout}"
    assert {row["note"] for row in parts["golden"]} == {"equal"}
    assert re.fullmatch(r"\d+ passed", parts["suite"][0]["note"])
    assert [row for row in parts["kernels"][1:] if not row["seconds"] or row["note"]] == []
    assert all(row["seconds"] for row in parts["steps"] if row["name"].startswith("decode step"))
    assert done.stdout.rstrip() == (tmp_path / "results.md").read_text().rstrip()


def test_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run_script(f"--out={tmp_path}")

    assert done.returncode == 1
    assert done.stdout.startswith("there is no GPU that torch can use; run on a machine that has one, or give --column sim")
    assert done.stdout.count("\n") == 1


def test_digest_of_the_sources_is_what_the_shell_says(tmp_path: Path) -> None:
    for name in ("kernels/a.cc", "kernels/a/b.h", "lmi_dist/c.py", "lmi_dist/__pycache__/c.pyc", "lmi_dist/ops/d.so", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)

    command = "sha256sum kernels/a.cc kernels/a/b.h lmi_dist/c.py | sha256sum"
    expected = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert gpu.sources_digest(tmp_path) == expected[:12]


def test_every_wrapper_has_a_golden_test(twin: gpu_golden.Twin) -> None:
    tested = {wrapper for golden in twin.goldens() for wrapper in golden.wrappers}

    assert len(gpu_golden.wrappers_in_sources()) > 20
    assert gpu_golden.wrappers_in_sources() == tested


def test_golden_test_sees_a_wrong_word(twin: gpu_golden.Twin) -> None:
    class Wrong(gpu_golden.Side):
        def run(self, golden: gpu_golden.Golden, given: gpu_golden.Words) -> gpu_golden.Words:
            words = twin.run(golden, given)
            words[3] ^= 1 << 20
            return words

    for golden in twin.goldens():
        assert gpu_golden.compare(golden, Wrong(twin.path), twin).startswith("1 of "), golden.name


@pytest.mark.timeout(600)
@pytest.mark.nvcc
@pytest.mark.parametrize("architecture", ["90a", pytest.param("80", marks=pytest.mark.soak)])
def test_golden_tests_compile_for_a_gpu(twin: gpu_golden.Twin, architecture: str, tmp_path: Path) -> None:
    device = gpu_golden.Side(gpu_golden.build_for_gpu(tmp_path, architecture, nvcc=NVCC))

    assert device.goldens() == twin.goldens()
