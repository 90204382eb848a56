"""Proof that the CUDA column's tests bite: makes faults in the kernels by rule, one at a time, builds the stand-in's library with
each and runs the tests of the file. Fails when fewer than nine in ten are caught.

    python tests/mutate_cuda.py [part of a file's name]        about ten seconds a fault
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEAST_SHARE, TIMEOUT_S = 0.9, 300

# What a fault looks like: a name, what is found, what stands there instead.
RULES = [
    ("drop a barrier", r"__sync(threads|warp)\(\);", ""),
    ("drop a wait", r"ptx::wait_copies<[^;]*>\(\);", ""),
    ("drop a commit", r"ptx::commit_copies\(\);", ""),
    ("loosen a wait", r"ptx::wait_copies<([^;]*)>\(\)", r"ptx::wait_copies<\1 + 1>()"),
    ("copy fewer bytes", r"(exists \? )16( : 0\))", r"\g<1>8\2"),
    ("copy fewer bytes", r"num \* static_cast<int>\(sizeof\(T\)\)", "num * static_cast<int>(sizeof(T)) / 2"),
    ("shift an index", r"\b(lane_?) / (\d+)", r"(\1 / \2 ^ 1)"),
    ("shift an index", r"\b(lane_?) % (\d+)", r"(\1 % \2 ^ 1)"),
    ("shift an index", r"threadIdx\.x / 32\]", "threadIdx.x / 32 ^ 1]"),
    ("move a border", r"(seen\w*(?:\[r\])?\.|needed_?\.|rows\.)last\b(?! -)", r"(\1last - 1)"),
    ("move a border", r"(key|column|token|pair|f) < ", r"\1 + 1 < "),
    ("forget a lane", r"lanes = 16;", "lanes = 8;"),
]

# Faults that change nothing, and why: (file, rule, part of the line).
HARMLESS = [
    # these order memory for the GPU; on the stand-in, lanes meet in the shuffles or products beside them anyway
    ("attention_plain.cuh", "drop a barrier", "__syncwarp"),
    ("attention_tiles.cuh", "drop a barrier", "__syncwarp"),
    # every warp has a place of its own, only another one
    ("attention_plain.cuh", "shift an index", "of_warps[threadIdx.x / 32]"),
    ("logits.cuh", "shift an index", "of_warp[threadIdx.x / 32]"),
    ("sampling.cu", "shift an index", "of_warp[threadIdx.x / 32]"),
]

# Files and the tests that know them; others are looked at by all.
TESTS = {
    "attention": ["test_attention.py"],
    "linear": ["test_linear.py"],
    "lora": ["test_lora.py", "test_device_column.py"],
    "moe": ["test_moe.py", "test_device_column.py"],
    "norm": ["test_norm.py"],
    "rotary": ["test_rotary.py", "test_device_column.py"],
    "penalize": ["test_sampling.py", "test_device_column.py"],
    "sampling": ["test_sampling.py"],
    "logprobs": ["test_sampling.py"],
    "logits": ["test_sampling.py"],
    "reduce": ["test_norm.py", "test_moe.py", "test_sampling.py"],
}


@dataclass(frozen=True)
class Fault:
    rule: str
    file: Path
    line: int
    text: str  # the whole file with the fault
    was: str

    @property
    def is_harmless(self) -> bool:
        return any(self.file.name == file and self.rule == rule and part in self.was for file, rule, part in HARMLESS)

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}: {self.rule}: {self.was}"


def faults(source: Path) -> Iterator[Fault]:
    """Every place that a rule finds, comments left out."""
    text = source.read_text(encoding="utf-8")
    comments = [match.span() for match in re.finditer(r"/\*.*?\*/", text, flags=re.DOTALL)]
    for rule, pattern, instead in RULES:
        for match in re.finditer(pattern, text):
            if any(first <= match.start() < last for first, last in comments):
                continue
            line = text.count("\n", 0, match.start()) + 1
            changed = text[: match.start()] + match.expand(instead) + text[match.end() :]
            yield Fault(rule, source, line, changed, text.splitlines()[line - 1].strip())


def tests_of(source: Path) -> list[str]:
    names = next((tests for part, tests in TESTS.items() if source.name.startswith(part)), ["."])
    return [str(ROOT / "tests" / "kernels" / name) for name in names]


class Workplace:
    """A copy of the kernels and a build of its stand-in."""

    def __init__(self, folder: Path) -> None:
        self.kernels, self.build = folder / "kernels", folder / "build"
        shutil.copytree(ROOT / "kernels", self.kernels)
        ninja = Path(sys.executable).with_name("ninja")
        options = [
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}" if ninja.exists() else "-DCMAKE_MAKE_PROGRAM=ninja",
            "-DLMI_CUDA=OFF",
        ]
        cmake = [sys.executable, "-m", "cmake"]
        subprocess.run([*cmake, "-S", self.kernels, "-B", self.build, *options], check=True, capture_output=True)
        self.compile = [*cmake, "--build", self.build, "--target", "lmi_sim"]
        subprocess.run(self.compile, check=True, capture_output=True)
        shutil.copy(self.kernels / "include" / "lmi_kernels.h", self.build)

    def catches(self, fault: Fault) -> bool:
        place = self.kernels / fault.file.relative_to(ROOT / "kernels")
        place.write_text(fault.text, encoding="utf-8")
        try:
            if subprocess.run(self.compile, capture_output=True, check=False).returncode:
                return True
            return not self.passes(fault.file)
        finally:
            shutil.copy(fault.file, place)

    def passes(self, source: Path) -> bool:
        tests = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--column=sim"]
        command = [*tests, f"--library={self.build / 'liblmi_sim.so'}", *tests_of(source)]
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=TIMEOUT_S).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    sources = [path for path in sorted((ROOT / "kernels" / "cuda").glob("*.cu*")) if wanted in path.name and path.name != "ptx.cuh"]
    every = [fault for source in sources for fault in faults(source)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        workplace = Workplace(Path(folder))
        for fault in every:
            caught = workplace.catches(fault)
            print("caught  " if caught else "harmless" if fault.is_harmless else "SURVIVES", fault, flush=True)
            if not caught:
                survivors.append(fault)
    num_caught = len(every) - len(survivors)
    print(f"{num_caught} of {len(every)} faults caught")
    if not every or num_caught / len(every) < LEAST_SHARE:
        sys.exit(1)


if __name__ == "__main__":
    main()
