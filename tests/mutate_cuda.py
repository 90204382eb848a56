"""Proof that the CUDA column's tests bite: makes faults in the kernels by rule, one at a time, builds the stand-in's library with
each and runs the tests of the file. Fails when fewer than nine in ten are caught, or when one survives that nobody has explained.

    python tests/mutate_cuda.py [parts of files' names]        a process a CPU, each with a build of its own
"""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, here once for all runs of the tests
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).parent.parent
LEAST_SHARE, CPU_SECONDS = 0.9, 240  # of the tests of one fault: a loop without end is stopped, and the fault caught

# What a fault looks like: a name, what is found, what stands there instead.
RULES = [
    ("drop a barrier", r"__sync(threads|warp)\(\);", ""),
    ("drop a wait", r"ptx::wait_copies<[^;]*>\(\);", ""),
    ("drop a commit", r"ptx::commit_(copies|products)\(\);", ""),
    ("drop a wait", r"(ptx::wait_(products<[^;]*>|mbarrier)|(ring|keys|values)_?\.await_(full|empty))\([^;]*\);", ""),
    ("loosen a wait", r"ptx::wait_products<([^;]*)>\(\)", r"ptx::wait_products<\1 + 1>()"),
    ("drop a barrier", r"\b(sync_group|meet)\(\);", ""),
    ("drop a fence", r"ptx::fence_(async|products|mbarriers)\(\);", ""),
    ("drop a wait", r"ptx::await_system\([^;]*\);", ""),
    ("drop an arrival", r"ptx::release_system\([^;]*\);", ""),
    ("one half for all calls", r"call % 2", "0"),
    ("drop an arrival", r"\b(ring|keys|values)_?\.release\([^;]*\);", ""),
    ("expect fewer bytes", r"(arrive_expecting\([^,]*, )(\w+::)", r"\1-16 + \2"),
    ("loosen a wait", r"ptx::wait_copies<([^;]*)>\(\)", r"ptx::wait_copies<\1 + 1>()"),
    ("copy fewer bytes", r"(exists \? )16( : 0\))", r"\g<1>8\2"),
    ("copy fewer bytes", r"num \* static_cast<int>\(sizeof\(T\)\)", "num * static_cast<int>(sizeof(T)) / 2"),
    ("shift an index", r"\b(lane_?) / (\d+)", r"(\1 / \2 ^ 1)"),
    ("shift an index", r"\b(lane_?) % (\d+)", r"(\1 % \2 ^ 1)"),
    ("shift an index", r"threadIdx\.x / 32\]", "threadIdx.x / 32 ^ 1]"),
    ("shift an index", r"\.(row|at)\((row|t|token|from|bucket|i)\b(?=[,)])", r".\1(\2 + 1"),
    ("shift an index", r"\b(cos|sin)\[i \+ j\]", r"\1[i + j + 1]"),
    ("shift an index", r"\b(w|scales|zeros)\[(i|group|2 \* i(?: \+ 1)?)\]", r"\1[(\2) ^ 1]"),
    ("move a border", r"(seen\w*(?:\[r\])?\.|needed_?\.|rows\.)last\b(?! -)", r"(\1last - 1)"),
    ("move a border", r"(key|column|token|pair|f) < ", r"\1 + 1 < "),
    ("forget a lane", r"lanes = 16;", "lanes = 8;"),
]

# Faults that change nothing: file, rule, part of the line, why.
HARMLESS = [
    ("attention_plain.cuh", "drop a barrier", "__syncwarp", "orders memory on a GPU; here lanes meet in the shuffles beside it"),
    ("attention_tiles.cuh", "drop a barrier", "__syncwarp", "orders memory on a GPU; here lanes meet in the products beside it"),
    ("attention_sm90.cuh", "move a border", "seen_by_all_.last", "looks for unseen keys where there are none"),
    ("attention_sm90.cuh", "drop a barrier", "nobody reads the queries", "a warp writes where, here, only its own products read"),
    (
        "attention_sm90.cuh",
        "drop a barrier",
        "a warp copies its own",
        "orders memory on a GPU; here lanes meet in the stores before it",
    ),
    (
        "attention_splits_sm90.cuh",
        "drop a barrier",
        "all lanes have read",
        "orders memory on a GPU; here lanes meet in the loads and products before it",
    ),
    ("attention_splits_sm90.cuh", "shift an index", "lane_ % 4 == 0", "another of the four lanes that have the same value"),
    ("attention_state.cuh", "move a border", "seen_by_all.last", "looks for unseen keys where there are none"),
    ("attention_tiles.cuh", "move a border", "column < attention_.size", "columns come by 8 or 16, sizes are multiples of 8"),
    ("attention_plain.cuh", "shift an index", "of_warps[threadIdx.x / 32]", "each warp still has a place of its own"),
    ("logits.cuh", "shift an index", "of_warp[threadIdx.x / 32]", "each warp still has a place of its own"),
    ("sampling.cu", "shift an index", "of_warp[threadIdx.x / 32]", "each warp still has a place of its own"),
]

# Files and the tests that know them; others are looked at by all of these.
TESTS = {
    "activation": ["test_activation.py"],
    "all_reduce": ["test_peers.py"],
    "attention": ["test_attention.py"],
    "embedding": ["test_embedding.py"],
    "fp8": ["test_attention.py", "test_rotary.py"],
    "linear": ["test_linear.py"],
    "lora": ["test_lora.py", "test_device_column.py"],
    "moe": ["test_moe.py", "test_device_column.py"],
    "norm": ["test_norm.py"],
    "rotary": ["test_rotary.py", "test_device_column.py"],
    "peers": ["test_peers.py"],
    "penalize": ["test_sampling.py", "test_device_column.py"],
    "sampling": ["test_sampling.py"],
    "logprobs": ["test_sampling.py"],
    "logits": ["test_sampling.py"],
    "ring": ["test_attention.py", "test_linear.py"],
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
    def excuse(self) -> str:
        """Why it changes nothing; "" if it should be caught."""
        return next(
            (why for file, rule, part, why in HARMLESS if self.file.name == file and self.rule == rule and part in self.was), ""
        )

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
    every = sorted({name for names in TESTS.values() for name in names})
    names = next((names for part, names in TESTS.items() if source.name.startswith(part)), every)
    return [str(ROOT / "tests" / "kernels" / name) for name in names]


class Workplace:
    """A copy of the kernels and a build of its stand-in; a fault costs the files that include it."""

    def __init__(self, folder: Path) -> None:
        self.kernels, self.build = folder / "kernels", folder / "build"
        shutil.copytree(ROOT / "kernels", self.kernels)
        ninja = Path(sys.executable).with_name("ninja")
        options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja if ninja.exists() else 'ninja'}", "-DLMI_CUDA=OFF"]
        cmake = [sys.executable, "-m", "cmake"]
        subprocess.run([*cmake, "-S", self.kernels, "-B", self.build, *options], check=True, capture_output=True)
        self.compile = [*cmake, "--build", self.build, "--target", "lmi_sim", "--parallel", "1"]
        subprocess.run(self.compile, check=True, capture_output=True)
        shutil.copy(self.kernels / "include" / "lmi_kernels.h", self.build)

    def catch(self, fault: Fault) -> str:
        """What catches it; "" if nothing does."""
        place = self.kernels / fault.file.relative_to(ROOT / "kernels")
        place.write_text(fault.text, encoding="utf-8")
        try:
            if subprocess.run(self.compile, capture_output=True, check=False).returncode:
                return "the compiler"
            return self.failing(tests_of(fault.file))
        finally:
            shutil.copy(fault.file, place)

    def failing(self, tests: list[str]) -> str:
        """The first test that fails, if any does; the order that finds most comes first."""
        return self.run(tests, "random") or self.run(tests, "forward,reverse")

    def run(self, tests: list[str], orders: str) -> str:
        """In a process of its own, for a fault may end it."""
        log = self.build / "tests.log"
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            os.chdir(ROOT)
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            options = ["-x", "-p", "no:cacheprovider", "--column=sim", f"--levels={orders}"]
            os._exit(pytest.main([*options, f"--library={self.build / 'liblmi_sim.so'}", *tests]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return ""
        if -status == signal.SIGKILL:
            raise RuntimeError("the tests were killed from outside, for want of memory perhaps")
        failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py::\S+)", log.read_text(errors="replace"), flags=re.MULTILINE)
        return failed[1] if failed else signal.Signals(-status).name if status < 0 else f"status {status}"


workplace: Workplace  # of this process


def open_workplace(folder: str) -> None:
    global workplace
    workplace = Workplace(Path(folder) / str(os.getpid()))


def catch(fault: Fault) -> str:
    return workplace.catch(fault)


def failing_without_fault(test: str) -> str:
    return workplace.failing([test])


def main() -> int:
    start, wanted = time.monotonic(), sys.argv[1:] or [""]
    every_source = [path for path in sorted((ROOT / "kernels" / "cuda").glob("*.cu*")) if not path.name.startswith("ptx")]
    sources = [path for path in every_source if any(part in path.name for part in wanted)]
    every = [fault for source in sources for fault in faults(source)]
    survivors = []
    processes = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as folder,
        processes.Pool(len(os.sched_getaffinity(0)), open_workplace, [folder]) as pool,
    ):
        for failing in pool.imap_unordered(failing_without_fault, {test for fault in every for test in tests_of(fault.file)}):
            if failing:
                print(f"{failing} fails without a fault")
                return 1
        for fault, by in zip(every, pool.imap(catch, every), strict=True):
            print("caught  " if by else "harmless" if fault.excuse else "SURVIVES", fault, f"[{by}]" if by else "", flush=True)
            if not by:
                survivors.append(fault)
    num_caught = len(every) - len(survivors)
    for fault in survivors:
        print(f"{fault}\n    {fault.excuse or 'not explained'}")
    print(f"{num_caught} of {len(every)} faults caught in {(time.monotonic() - start) / 60:.0f} minutes")
    return int(not every or num_caught / len(every) < LEAST_SHARE or not all(fault.excuse for fault in survivors))


if __name__ == "__main__":
    sys.exit(main())
