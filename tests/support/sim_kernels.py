"""Kernels of a `.cu` beside this file, compiled with the stand-in for a GPU, and what they leave in `results`."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

SUPPORT = Path(__file__).parent
KERNELS = SUPPORT.parents[1] / "kernels"
SOURCES = [*sorted((KERNELS / "sim").glob("*.cc")), KERNELS / "common" / "check.cc",
           KERNELS / "cuda" / "runtime.cu", KERNELS / "cuda" / "tensor_map.cu"]  # fmt: skip
ORDERS = ("forward", "reverse", "random", "random:1", "random:2")


class SimKernels:
    """Each kernel is `lmi_status name(int32_t argument)` in a library that exports results, message and set_order."""

    def __init__(self, path: Path, num_results: int) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.message.restype = ctypes.c_char_p
        self.results = (ctypes.c_float * num_results).in_dll(self.library, "results")

    @classmethod
    def build(cls, source: str, folder: Path, num_results: int, *flags: str) -> "SimKernels":
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        assert compiler is not None
        path = folder / "kernels.so"
        flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-DLMI_SIM", "-DLMI_LEVEL=sim", *flags)
        includes = [f"-I{KERNELS}", f"-I{KERNELS / 'include'}"]
        subprocess.run([compiler, *flags, *includes, "-x", "c++", SUPPORT / source, *SOURCES, "-o", path], check=True)
        return cls(path, num_results)

    def run(self, name: str, argument: int = 0, order: str = "forward") -> str:
        """The report; "" if all went well."""
        assert self.library.set_order(order.encode())
        ctypes.memset(self.results, 0, ctypes.sizeof(self.results))
        status = getattr(self.library, name)(argument)
        return self.library.message().decode() if status else ""

    def results_of(self, name: str, argument: int = 0, order: str = "forward", num: int = 128) -> list[float]:
        assert self.run(name, argument, order) == ""
        return list(self.results[:num])
