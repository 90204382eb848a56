"""A GPU hour in one script: golden tests of the PTX wrappers, the kernel tests on the GPU, then kernels and whole steps against
what the same run measures of the machine. Under ten minutes in all; each part in a process of its own.

    python tests/benchmarks/gpu.py --out RESULTS [--only golden,suite,kernels,steps,peers] [--library build/cuda/liblmi_cuda.so]

The library is built for the GPU at hand, unless one is given. golden and kernels need torch and numpy, suite also pytest and
pytest-timeout, steps what the engine needs, peers transformers. Where pydantic is missing and nothing can be downloaded, carry
wheels: on a machine that has pip,

    pip download --only-binary=:all: --no-deps --python-version 3.12 --implementation cp --platform manylinux_2_17_x86_64 \\
        -d .whl pydantic pydantic-core annotated-types typing-extensions typing-inspection

and there: pip install --no-index --no-deps --target /tmp/site .whl/*.whl; export PYTHONPATH=/tmp/site.
Without a GPU, --column sim --tiny runs the same on the stand-in, for tests: its times say nothing.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# where the package is not installed
sys.path.extend(str(Path(__file__).parents[2] / each) for each in (".", "handlers", "tests/support"))
import gpu_golden
import gpu_kernels
import torch
from gpu_limits import TINY, Row, Sizes, measure_limits
from nvcc import NVCC

from lmi_dist import ops
from lmi_dist.ops.abi import find_library

ROOT = Path(__file__).parents[2]
PARTS = ("golden", "suite", "kernels", "steps", "peers")
NEEDS = {"suite": ("pytest", "pytest_timeout"), "steps": ("pydantic", "transformers", "safetensors", "tokenizers")}
NEEDS["peers"] = NEEDS["steps"]  # which make its model and prompts


# ---- what is there ----


def capability() -> int:
    """Of the GPU, as 90; of the stand-in, which knows all instructions, the one it is most like."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


def architecture() -> str:
    """As nvcc names the GPU at hand, with what only it has."""
    return f"{capability()}a" if capability() == 90 else str(capability())


def build_library() -> Path:
    """The CUDA column for the GPU at hand. Raises CalledProcessError with the compiler's words on the terminal."""
    folder = ROOT / "build" / "gpu"
    cmake = shutil.which("cmake") or "cmake"
    options = [f"-DLMI_CUDA_ARCHITECTURES={architecture()}-real", f"-DCMAKE_CUDA_COMPILER={NVCC or 'nvcc'}"]
    subprocess.run([cmake, "-S", ROOT / "kernels", "-B", folder, *options], check=True, stdout=sys.stderr)
    subprocess.run([cmake, "--build", folder, "--target", "lmi_cuda", "--parallel"], check=True, stdout=sys.stderr)
    shutil.copy(ROOT / "kernels" / "include" / "lmi_kernels.h", folder)
    return folder / "liblmi_cuda.so"


def library_of(options: argparse.Namespace) -> Path:
    if options.library:
        return Path(options.library).resolve()
    if options.column == "cuda":
        return build_library()
    path = find_library(list(ops.__path__), "liblmi_sim.so")
    if path is None:
        sys.exit("liblmi_sim.so is not built; install the package first, or give --library")
    return path


# ---- parts: each gives rows ----


def golden(options: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        twin = gpu_golden.Twin(gpu_golden.build_twin(Path(name)), "forward")
        if options.column == "cuda":
            device = gpu_golden.Side(gpu_golden.build_for_gpu(Path(name), architecture(), nvcc=NVCC or "nvcc"))
        else:
            device = gpu_golden.Twin(twin.path, "random")
        rows = []
        for each in device.goldens():
            difference = gpu_golden.compare(each, device, twin) if each.runs_on(capability()) else f"needs sm_{each.capability}"
            rows.append(Row(f"{each.name} ({', '.join(each.wrappers)})", note=difference or "equal"))
        return rows


def suite(options: argparse.Namespace) -> list[Row]:
    """The kernel tests, one row; the log lies beside the results."""
    tests = ["tests/kernels/test_activation.py", "--levels=forward", "--mirrored"] if options.tiny else ["tests/kernels"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        f"--column={options.column}",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command += [f"--library={options.library}", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (options.out / "suite.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    return [
        Row(f"{' '.join(tests)}", note=", ".join(counts) or f"pytest ended with {done.returncode}: {done.stderr[-500:]}"),
        *(Row(name, note="failed") for name in failed[:30]),
    ]


def device_of(options: argparse.Namespace) -> str:
    return "cuda" if options.column == "cuda" else "cpu"


def kernels(options: argparse.Namespace) -> list[Row]:
    sizes = TINY if options.tiny else Sizes()
    with ops.using(options.column, 1, path=options.library):
        return list(gpu_kernels.rows(sizes, device_of(options), capability()))


def steps(options: argparse.Namespace) -> list[Row]:
    import gpu_steps

    with ops.using(options.column, 1, path=options.library):
        limits = measure_limits(TINY if options.tiny else Sizes(), device_of(options))
    work = gpu_steps.TINY if options.tiny else gpu_steps.FULL
    ops.__path__.append(str(options.library.parent))  # where the engine finds it
    work.engine.update({"device": "cuda"} if options.column == "cuda" else {"kernels": "sim"})
    return list(gpu_steps.rows(limits, work, device_of(options)))


def peers(options: argparse.Namespace) -> list[Row]:
    import gpu_steps

    return list(gpu_steps.peer_rows(gpu_steps.TINY if options.tiny else gpu_steps.FULL, device_of(options)))


def run_part(name: str, options: argparse.Namespace) -> list[Row]:
    missing = [need for need in NEEDS.get(name, ()) if importlib.util.find_spec(need) is None]
    if missing:
        return [Row(name, note=f"left out, for {', '.join(missing)} is not installed (see --help for wheels)")]
    part = {"golden": golden, "suite": suite, "kernels": kernels, "steps": steps, "peers": peers}[name]
    return part(options)


# ---- results ----


def sources_digest(root: Path) -> str:
    """What is measured, whatever git says on a machine that got a copy: at a commit, the beginning of
    `git ls-files kernels lmi_dist | xargs sha256sum | sha256sum`."""
    files = [path for folder in ("kernels", "lmi_dist") for path in (root / folder).rglob("*") if path.is_file()]
    sources = sorted(path.relative_to(root).as_posix() for path in files if path.suffix not in (".so", ".pyc"))
    lines = [f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}\n" for name in sources]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def machine(options: argparse.Namespace) -> dict[str, str]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%d %B %Y"),
        "commit": commit.stdout.strip() or "unknown",
        "sources": sources_digest(ROOT),
        "column": options.column,
        "device": torch.cuda.get_device_name() if options.column == "cuda" else "stand-in on a CPU",
        "torch": torch.__version__,
    }


def share_text(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def ms_text(value: float | None) -> str:
    return "" if value is None else f"{1e3 * value:.3f}"


def line(row: Row) -> str:
    ratio = f"{row.peer_seconds / row.seconds:.2f}" if row.seconds and row.peer_seconds else ""
    cells = [
        row.name,
        ms_text(row.seconds),
        share_text(row.share),
        row.of,
        share_text(row.goal),
        row.peer if row.peer_seconds else "",
    ]
    return f"| {' | '.join([*cells, ms_text(row.peer_seconds), ratio, row.note.replace(chr(10), ' ')[:300]])} |"


HEAD = "| what | ms | share | of | goal | peer | peer ms | times | note |\n|---|---|---|---|---|---|---|---|---|"


def markdown(about: dict[str, str], results: dict[str, list[Row]], seconds: dict[str, float]) -> str:
    parts = [f"### {name} ({seconds[name]:.0f} s)\n\n{HEAD}\n" + "\n".join(map(line, rows)) for name, rows in results.items()]
    return "\n\n".join([", ".join(f"{key} {value}" for key, value in about.items()), *parts]) + "\n"


def in_a_process(name: str, options: argparse.Namespace) -> list[Row]:
    """A part alone, so that an error which the GPU does not get over ends nothing else."""
    command = [sys.executable, __file__, f"--only={name}", f"--column={options.column}", f"--library={options.library}"]
    command += [f"--out={options.out / name}", *(["--tiny"] if options.tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = options.out / name / "results.json"
    if not path.exists():
        return [Row(name, note=f"ended with {done.returncode}: {done.stderr.strip()[-1000:]}")]
    (found,) = json.loads(path.read_text(encoding="utf-8"))["results"].values()
    return [Row(**row) for row in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, by commas: {', '.join(PARTS)}")
    parser.add_argument("--column", choices=("cuda", "sim"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that the stand-in runs in seconds")
    parser.add_argument(
        "--library", type=Path, help="the column's library, with its header beside it; default: built, or installed"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results.md and results.json")
    options = parser.parse_args()
    if options.column == "cuda" and not torch.cuda.is_available():
        print("there is no GPU that torch can use; run on a machine that has one, or give --column sim --tiny to try the script")
        return 1
    names = options.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only={','.join(sorted(unknown))} must be of {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    options.library = library_of(options)
    results: dict[str, list[Row]] = {}
    seconds: dict[str, float] = {}
    for name in names:
        start = time.monotonic()
        results[name] = run_part(name, options) if len(names) == 1 else in_a_process(name, options)
        seconds[name] = time.monotonic() - start
    about: dict[str, Any] = machine(options)
    text = markdown(about, results, seconds)
    (options.out / "results.md").write_text(text, encoding="utf-8")
    rows = {name: [asdict(row) for row in own] for name, own in results.items()}
    (options.out / "results.json").write_text(json.dumps({"about": about, "seconds": seconds, "results": rows}, indent=2))
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
