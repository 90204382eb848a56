"""The header read into ctypes: against what a C compiler makes of it; and what is refused when a library is opened."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_cases import rand

from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Header, Library, find_library

INCLUDE = Path(__file__).parents[2] / "kernels" / "include"


@pytest.fixture(scope="module")
def header() -> Header:
    return Header.read(INCLUDE / "lmi_kernels.h")


def test_structs_lie_as_a_compiler_lays_them(header: Header, tmp_path: Path) -> None:
    ours, lines = [], []
    for name, struct in header.structs.items():
        ours.append(f"{name} {ctypes.sizeof(struct)}")
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, _ in struct._fields_:
            ours.append(f"{name}.{field} {getattr(struct, field).offset} {getattr(struct, field).size}")
            lines.append(f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));')
    lines += [f'printf("{name} %d\\n", (int){name});' for name in header.constants]
    ours += [f"{name} {value}" for name, value in header.constants.items()]

    assert compiled(lines, tmp_path).splitlines() == ours


def compiled(lines: list[str], folder: Path) -> str:
    """What a C program with these lines in main prints."""
    source = '#include <stddef.h>\n#include <stdio.h>\n#include "lmi_kernels.h"\nint main(void) {\n' + "\n".join(lines) + "\n}\n"
    (folder / "layout.c").write_text(source)
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None
    subprocess.run([compiler, "-I", INCLUDE, "layout.c", "-o", "layout"], cwd=folder, check=True)
    return subprocess.run([folder / "layout"], capture_output=True, text=True, check=True).stdout


def test_header_reader_finds_every_declaration(header: Header) -> None:
    code = re.sub(r"/\*.*?\*/", "", (INCLUDE / "lmi_kernels.h").read_text(), flags=re.DOTALL)

    assert set(header.functions) == set(re.findall(r"(lmi_\w+)\(", code))
    assert set(header.structs) == set(re.findall(r"\} (lmi_\w+);", code))


@pytest.mark.cpu_column
def test_installed_header_is_the_sources(library: Library) -> None:
    assert library.path.with_name("lmi_kernels.h").read_text() == (INCLUDE / "lmi_kernels.h").read_text()


def test_unknown_type_in_header_is_refused() -> None:
    with pytest.raises(KernelError, match=r"type that is not known here: double"):
        Header.parse("#define LMI_ABI_VERSION 1\ntypedef struct {\n  double eps;\n} lmi_norm_args;\n")


@pytest.mark.cpu_column
def test_library_without_header_is_refused(library: Library, tmp_path: Path) -> None:
    shutil.copy(library.path, tmp_path)

    with pytest.raises(KernelError, match=r"lmi_kernels\.h must lie beside the library"):
        Library(tmp_path / library.path.name)


@pytest.mark.cpu_column
@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("LMI_ABI_VERSION 3", "LMI_ABI_VERSION 1", "another version than the header"),
        ("lmi_describe(void)", "lmi_describe_more(void)", "lmi_describe_more.*build it again"),
    ],
)
def test_library_of_another_header_is_refused(library: Library, tmp_path: Path, old: str, new: str, sentence: str) -> None:
    shutil.copy(library.path, tmp_path)
    text = library.path.with_name("lmi_kernels.h").read_text()
    (tmp_path / "lmi_kernels.h").write_text(text.replace(old, new))

    with pytest.raises(KernelError, match=sentence):
        Library(tmp_path / library.path.name)


@pytest.mark.cpu_column
def test_file_that_is_no_library_is_refused(library: Library, tmp_path: Path) -> None:
    shutil.copy(library.path.with_name("lmi_kernels.h"), tmp_path)
    (tmp_path / "liblmi_cpu.so").write_text("not a library")

    with pytest.raises(KernelError, match="cannot be opened"):
        Library(tmp_path / "liblmi_cpu.so")


def test_library_is_found_in_a_later_folder(tmp_path: Path) -> None:
    (tmp_path / "liblmi_cpu.so").touch()

    assert find_library([str(tmp_path / "absent"), str(tmp_path)]) == tmp_path / "liblmi_cpu.so"
    assert find_library([str(tmp_path / "absent")]) is None


@pytest.mark.cpu_column
def test_status_says_whose_fault_it_is(library: Library) -> None:
    args = library.header.structs["lmi_activation_args"]()

    assert library.function("activation")(args, None) == library.constant("BAD_ARGUMENT")
    assert library.function("error_message")().decode().startswith("activation: x is absent")
    assert library.function("activation")(None, None) == library.constant("BAD_ARGUMENT")
    assert library.function("set_level")(b"avx1024") == library.constant("UNSUPPORTED")
    assert library.function("set_threads")(0) == library.constant("BAD_ARGUMENT")


@pytest.mark.parametrize(
    "tensor", [rand(1, 1, 1, 2, 3), torch.zeros(2, 3, dtype=torch.complex64), torch.zeros((2, 3), device="meta")]
)
def test_tensor_that_no_column_takes_is_refused(library: Library, tensor: torch.Tensor) -> None:
    with pytest.raises(KernelError, match=r"x is a tensor .* which this column cannot take"):
        library.call("activation", out=rand(2, 3), x=tensor)


def test_last_dimension_must_lie_together(library: Library) -> None:
    with pytest.raises(KernelError, match="x has stride 2 in its last dimension; it must be 1"):
        library.call("activation", out=rand(2, 3), x=rand(2, 6)[:, ::2])


@pytest.mark.cpu_column
def test_packed_bytes_are_zero_for_what_cannot_be(library: Library) -> None:
    packed_bytes = library.function("linear_packed_bytes")

    assert packed_bytes(33, 10, library.constant("BF16"), library.constant("DENSE"), 0, 0) == 2 * 32 * 64
    assert packed_bytes(33, 10, library.constant("I32"), library.constant("DENSE"), 0, 0) == 0
    assert packed_bytes(33, 10, library.constant("BF16"), library.constant("INT4"), 3, 0) == 0
    assert packed_bytes(33, 10, library.constant("BF16"), library.constant("DENSE"), 0, 1) == 0
