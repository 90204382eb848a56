"""Registers, stack, spills and static shared memory of each CUDA kernel on each GPU that we build for, as ptxas tells them.
No GPU is needed.

    python tests/benchmarks/kernel_resources.py [--gpus sm_90a ...] [part of a file's name]
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))
from nvcc import NVCC

GPUS = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
KERNELS = Path(__file__).parents[2] / "kernels"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<gpu>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill"
    r" stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    flags=re.DOTALL,
)


def compile_for(source: Path, gpus: list[str]) -> str:
    """What ptxas says."""
    codes = [f"-gencode=arch={gpu.replace('sm_', 'compute_')},code={gpu}" for gpu in gpus]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            NVCC or "nvcc",
            "-std=c++17",
            "-O3",
            "-Xptxas=-v",
            '-DLMI_ARCHITECTURES=""',
            *codes,
            f"-I{KERNELS}",
            f"-I{KERNELS}/include",
        ]
        done = subprocess.run([*command, "-c", source, "-o", f"{folder}/out.o"], capture_output=True, text=True, check=True)
    return done.stderr


def readable(names: list[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\(anonymous namespace\)::|lmi::cuda::|^void |\(.*", "", line) for line in text.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", default=list(GPUS))
    parser.add_argument("only", nargs="?", default="", help="sources with this in their name")
    options = parser.parse_args()
    print(f"{'kernel':70} {'gpu':7} registers  stack  spills  shared")
    most: dict[str, tuple[int, ...]] = {}  # by gpu: registers, stack, spills
    for source in sorted(path for path in (KERNELS / "cuda").glob("*.cu") if options.only in path.name):
        found = list(ENTRY.finditer(compile_for(source, options.gpus)))
        for name, entry in sorted(zip(readable([each["name"] for each in found]), found, strict=True), key=lambda pair: pair[0]):
            shared = re.search(r"(\d+) bytes smem", entry["rest"])
            own = int(entry["registers"]), int(entry["stack"]), int(entry["stores"]) + int(entry["loads"])
            print(f"{name:70} {entry['gpu']:7} {own[0]:>9} {own[1]:>6} {own[2]:>7} {shared[1] if shared else 0:>7}", flush=True)
            most[entry["gpu"]] = tuple(map(max, own, most.get(entry["gpu"], own)))
    for gpu, (registers, stack, spills) in most.items():
        print(f"{gpu}: at most {registers} registers, {stack} bytes of stack, {spills} of spills")


if __name__ == "__main__":
    main()
