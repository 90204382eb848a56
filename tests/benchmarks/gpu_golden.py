"""Golden tests of the PTX wrappers: each on the GPU against its twin for the CPU, on the same random input (support/ptx_golden.cu).

Sums of products are compared bit for bit where every sum is a whole number that fp32 holds, and within the rounding of tensor cores
where it is not.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
KERNELS, SOURCE = ROOT / "kernels", ROOT / "tests" / "support" / "ptx_golden.cu"
TRIALS = 20
WARP = 32
Words = NDArray[np.uint32]
Chance = np.random.Generator


@dataclass(frozen=True)
class Input:
    """draw(chance, number of words) gives the words. tolerance: how far a float of the output may be off, as a share of the
    greatest one, or of its own size; None: equal bits."""

    draw: Callable[[Chance, int], Words]
    tolerance: float | None = None
    of_own_size: bool = False

    def differing(self, actual: Words, expected: Words) -> int:
        """How many words differ."""
        if self.tolerance is None:
            return int((actual != expected).sum())
        a, b = actual.view(np.float32), expected.view(np.float32)
        scale = np.abs(b) if self.of_own_size else np.abs(b).max()
        return int((~(np.abs(a - b) <= self.tolerance * scale)).sum())


def words(chance: Chance, num: int) -> Words:
    return chance.integers(0, 1 << 32, num, dtype=np.uint32)


def exponents(chance: Chance, num: int) -> Words:
    """Floats for 2^x: none whose result is denormal, which a GPU takes for 0."""
    values = chance.uniform(-125, 127, num).astype(np.float32)
    values[:2] = 0.0, -np.inf
    return values.view(np.uint32)


def product(to_bits: Callable[[NDArray[np.float32]], NDArray[np.generic]], *, whole: bool) -> Callable[[Chance, int], Words]:
    """Six words of two or four factors a lane, then four sums: small whole numbers, or normal ones."""

    def draw(chance: Chance, num: int) -> Words:
        sums = num - 6 * WARP
        size = 6 * WARP * 4 // to_bits(np.zeros(1, np.float32)).itemsize
        factors = chance.integers(-8, 9, size) if whole else chance.standard_normal(size)
        first = chance.integers(-99, 100, sums) if whole else chance.standard_normal(sums)
        return np.concatenate([to_bits(factors.astype(np.float32)).view(np.uint32), first.astype(np.float32).view(np.uint32)])

    return draw


def factors(to_bits: Callable[[NDArray[np.float32]], NDArray[np.generic]], *, whole: bool) -> Callable[[Chance, int], Words]:
    """Words of two factors and nothing else."""

    def draw(chance: Chance, num: int) -> Words:
        values = chance.integers(-8, 9, 2 * num) if whole else chance.standard_normal(2 * num)
        return to_bits(values.astype(np.float32)).view(np.uint32)

    return draw


def int8_product(chance: Chance, num: int) -> Words:
    return np.concatenate([words(chance, 6 * WARP), chance.integers(-99, 100, num - 6 * WARP).astype(np.int32).view(np.uint32)])


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def f16_bits(values: NDArray[np.float32]) -> NDArray[np.float16]:
    return values.astype(np.float16)


def e4m3_bits(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest e4m3 number, by a table of all of them."""
    sizes = np.array([float(i & 7) / 512 if i < 8 else (8 + (i & 7)) * 2.0 ** ((i >> 3) - 10) for i in range(127)], np.float32)
    nearest = np.abs(np.abs(values)[:, None] - sizes[None]).argmin(1).astype(np.uint8)
    return nearest | (np.signbit(values).astype(np.uint8) << 7)


# fp32 sums of tensor cores lose some bits on the way; those of fp8 products keep 13
INPUTS: dict[str, list[Input]] = {
    "words": [Input(words)],
    "exponents": [Input(exponents, 2**-21, of_own_size=True)],
    "int8 product": [Input(int8_product)],
    "bf16": [Input(factors(bf16_bits, whole=True)), Input(factors(bf16_bits, whole=False), 2**-20)],
    "f16": [Input(factors(f16_bits, whole=True)), Input(factors(f16_bits, whole=False), 2**-20)],
    "bf16 product": [Input(product(bf16_bits, whole=True)), Input(product(bf16_bits, whole=False), 2**-20)],
    "f16 product": [Input(product(f16_bits, whole=True)), Input(product(f16_bits, whole=False), 2**-20)],
    "e4m3 product": [Input(product(e4m3_bits, whole=True)), Input(product(e4m3_bits, whole=False), 2**-11)],
}


@dataclass(frozen=True)
class Golden:
    """A row of the table in ptx_golden.cu."""

    index: int
    name: str
    wrappers: tuple[str, ...]
    input: str
    capability: str
    in_words: int
    out_words: int

    def runs_on(self, capability: int) -> bool:
        return capability == int(self.capability[:-1]) if self.capability.endswith("+") else capability >= int(self.capability)


class Side:
    """The golden tests on the GPU or on the stand-in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.golden_describe.restype = self.library.golden_message.restype = ctypes.c_char_p

    def goldens(self) -> list[Golden]:
        goldens = []
        for index in range(self.library.golden_count()):
            name, wrappers, given, capability, num_in, num_out = self.library.golden_describe(index).decode().split("|")
            goldens.append(Golden(index, name, tuple(wrappers.split()), given, capability, int(num_in), int(num_out)))
        return goldens

    def run(self, golden: Golden, given: Words) -> Words:
        """Raises RuntimeError with the library's sentence."""
        aligned = np.empty(golden.in_words + 4, np.uint32)
        aligned = aligned[-(aligned.ctypes.data // 4) % 4 :][: golden.in_words]
        aligned[:] = given
        out = np.full(golden.out_words, 0xFFFFFFFF, np.uint32)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (aligned, out)]
        if self.library.golden_run(golden.index, *pointers):
            raise RuntimeError(self.library.golden_message().decode())
        return out


class Twin(Side):
    """The stand-in, in an order of threads."""

    def __init__(self, path: Path, order: str) -> None:
        super().__init__(path)
        self.order = order.encode()

    def run(self, golden: Golden, given: Words) -> Words:
        self.library.golden_order(self.order)
        return super().run(golden, given)


def wrappers_in_sources() -> set[str]:
    """Names of all wrappers in ptx*.cuh."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((KERNELS / "cuda").glob("ptx*.cuh"))]
    return {name for text in texts for name in re.findall(r"^__device__ __forceinline__ [\w ]*?(\w+)\(", text, flags=re.MULTILINE)}


def build_twin(folder: Path) -> Path:
    path = folder / "golden_sim.so"
    compiler = shutil.which("c++") or shutil.which("g++") or "c++"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-DLMI_SIM", "-DLMI_LEVEL=sim"]
    sources = ["-x", "c++", SOURCE, *sorted((KERNELS / "sim").glob("*.cc")), *common_sources()]
    compile_with([compiler, *flags, *includes(), *sources, "-o", path])
    return path


def build_for_gpu(folder: Path, architecture: str, *, nvcc: str) -> Path:
    """architecture: as in sm_90a, without the sm_."""
    path = folder / "golden_cuda.so"
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "-Werror=all-warnings"]
    flags += [f'-DLMI_ARCHITECTURES="{architecture}"']
    compile_with([nvcc, code, *flags, *includes(), SOURCE, *common_sources(), "-o", path])
    return path


def common_sources() -> list[Path]:
    return [KERNELS / "common" / "check.cc", KERNELS / "cuda" / "runtime.cu", KERNELS / "cuda" / "tensor_map.cu"]


def includes() -> list[str]:
    return [f"-I{KERNELS}", f"-I{KERNELS / 'include'}", f"-I{SOURCE.parent}"]


def compile_with(command: list[object]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{SOURCE.name} does not compile: {(done.stdout + done.stderr)[-2000:]}")


def compare(golden: Golden, device: Side, twin: Side) -> str:
    """What differs on random input; "" if nothing does."""
    for given in INPUTS[golden.input]:
        for trial in range(TRIALS):
            drawn = given.draw(np.random.default_rng(trial), golden.in_words)
            try:
                actual, expected = device.run(golden, drawn), twin.run(golden, drawn)
            except RuntimeError as error:
                return str(error)
            differences = given.differing(actual, expected)
            if differences:
                return f"{differences} of {golden.out_words} words differ (trial {trial}, tolerance {given.tolerance})"
    return ""
