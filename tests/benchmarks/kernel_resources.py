"""Registers, stack, spills and static shared memory of each CUDA kernel, as ptxas tells them: no GPU needed.

python tests/benchmarks/kernel_resources.py [sm_90a ...]
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<gpu>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill"
    r" stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    flags=re.DOTALL,
)


def compile_for(source: Path, gpu: str) -> str:
    """What ptxas says."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    with tempfile.TemporaryDirectory() as folder:
        code = f"-gencode=arch={gpu.replace('sm_', 'compute_')},code={gpu}"
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", '-DLMI_ARCHITECTURES=""', code, f"-I{KERNELS}", f"-I{KERNELS}/include"]
        done = subprocess.run([*command, "-c", source, "-o", f"{folder}/out.o"], capture_output=True, text=True, check=True)
    return done.stderr


def readable(names: list[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\(anonymous namespace\)::|lmi::cuda::|^void |\(.*", "", line) for line in text.splitlines()]


def main() -> None:
    print(f"{'kernel':60} {'gpu':8} registers  stack  spills  shared")
    for source in sorted((KERNELS / "cuda").glob("*.cu")):
        for gpu in sys.argv[1:] or ["sm_90a"]:
            found = list(ENTRY.finditer(compile_for(source, gpu)))
            for name, entry in zip(readable([each["name"] for each in found]), found, strict=True):
                shared = re.search(r"(\d+) bytes smem", entry["rest"])
                spills = int(entry["stores"]) + int(entry["loads"])
                print(f"{name:60} {gpu:8} {entry['registers']:>9} {entry['stack']:>6} {spills:>7} {shared[1] if shared else 0:>7}")


if __name__ == "__main__":
    main()
