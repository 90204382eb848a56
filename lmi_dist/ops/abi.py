"""Opens a column's shared library: reads lmi_kernels.h, which lies beside it, into ctypes structures and prototypes.

The header is the only place where an argument struct is written down. Calls take torch tensors and numbers by the struct's field
names; a status other than LMI_OK becomes a KernelError with the library's sentence.
"""

import ctypes
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmi_dist.errors import KernelError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32", torch.int64: "I64",
          torch.uint8: "U8", torch.uint64: "U64"}  # fmt: skip
MAX_DIMS = 4

_SCALARS: dict[str, Any] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "void *": ctypes.c_void_p,
    "const char *": ctypes.c_char_p,
}


@dataclass(frozen=True)
class Header:
    """What lmi_kernels.h says: constants by name, structures by name, functions as (result type, parameter types)."""

    version: int
    constants: Mapping[str, int]
    structs: Mapping[str, type[ctypes.Structure]]
    functions: Mapping[str, tuple[Any, list[Any]]]

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Raises KernelError when the file is missing or says something that this reader does not know."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise KernelError(f"{path} must lie beside the library: {error.strerror}") from None
        return cls.parse(text)

    @classmethod
    def parse(cls, text: str) -> "Header":
        version = re.search(r"#define LMI_ABI_VERSION (\d+)", text)
        if version is None:
            raise KernelError("lmi_kernels.h does not define LMI_ABI_VERSION")
        code = re.sub(r"/\*.*?\*/|^#[^\n]*", "", text, flags=re.DOTALL | re.MULTILINE)
        types = dict(_SCALARS) | {alias: _SCALARS[base] for base, alias in re.findall(r"typedef (int32_t|void \*)\s*(\w+);", code)}
        structs = _read_structs(code, types)
        return cls(int(version[1]), _read_enums(code), structs, _read_functions(code, types))


def _read_enums(code: str) -> dict[str, int]:
    bodies = re.findall(r"enum \w+ \{(.*?)\};", code, flags=re.DOTALL)
    return {name: int(value) for body in bodies for name, value in re.findall(r"(\w+) = (\d+)", body)}


def _read_structs(code: str, types: dict[str, Any]) -> dict[str, type[ctypes.Structure]]:
    """Structures in the header's order; each is added to `types`, so that later ones can hold it."""
    structs = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", code, flags=re.DOTALL):
        fields = [field for line in body.split(";") if line.strip() for field in _read_fields(line.strip(), types)]
        structs[name] = types[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


def _read_fields(line: str, types: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """One declaration, such as `int64_t size[4]` or `lmi_tensor out, x`."""
    kind, names = re.fullmatch(r"(void \*|\w+)\s*(.*)", line, flags=re.DOTALL).groups()  # type: ignore[union-attr]  # matches any text
    fields = []
    for name, length in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
        base = _type_of(kind, types)
        fields.append((name, base * int(length) if length else base))
    return fields


def _read_functions(code: str, types: Mapping[str, Any]) -> dict[str, tuple[Any, list[Any]]]:
    functions = {}
    for result, name, parameters in re.findall(r"LMI_API ([\w ]+?\**)(lmi_\w+)\((.*?)\);", code, flags=re.DOTALL):
        parts = [" ".join(part.split()) for part in parameters.split(",")]
        kinds = [re.sub(r"\w+$", "", part).strip() for part in parts if part != "void"]
        functions[name] = (_type_of(result.strip(), types), [_type_of(kind, types) for kind in kinds])
    return functions


def _type_of(kind: str, types: Mapping[str, Any]) -> Any:
    if kind in types:
        return types[kind]
    pointee = re.fullmatch(r"const (lmi_\w+) \*", kind)
    if pointee and pointee[1] in types:
        return ctypes.POINTER(types[pointee[1]])
    raise KernelError(f"lmi_kernels.h has a type that is not known here: {kind}")


class Library:
    """One opened column. Its functions may be called from any thread; the GIL is not held meanwhile."""

    def __init__(self, path: Path) -> None:
        """Raises KernelError when the library cannot be opened, lacks a function of its header or is of another version."""
        self.path = path
        self.header = Header.read(path.with_name("lmi_kernels.h"))
        try:
            self._library = ctypes.CDLL(str(path))
            self._functions = {name: self._bind(name, *kinds) for name, kinds in self.header.functions.items()}
        except (OSError, AttributeError) as error:
            raise KernelError(f"{path} cannot be opened: {error}; build it again") from None
        self._dtypes = {dtype: self.header.constants[f"LMI_{name}"] for dtype, name in DTYPES.items()}
        self._tensor_type = self.header.structs["lmi_tensor"]
        self._operations = {name: self._operation(name) for name in self._functions if f"{name}_args" in self.header.structs}
        if self.function("abi_version")() != self.header.version:
            raise KernelError(f"{path} has another version than {path.with_name('lmi_kernels.h')}; build it again")

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the header as it stands, without the prefix lmi_."""
        return self._functions[f"lmi_{name}"]

    def call(self, name: str, **fields: torch.Tensor | float | None) -> None:
        """Runs the operation lmi_<name>. fields: those of its argument struct (tensors and numbers; those left out and None: absent
        or 0; nested structs are flat). Raises KernelError with the library's sentence."""
        function, args_type, places = self._operations[f"lmi_{name}"]
        args = args_type()
        for field, value in fields.items():
            if value is None:
                continue
            place = places[field]
            setattr(
                args if place is None else getattr(args, place),
                field,
                self.tensor(value) if isinstance(value, torch.Tensor) else value,
            )
        self.check(function(args, None))

    def check(self, status: int) -> None:
        """Raises KernelError unless status is LMI_OK."""
        if status:
            raise KernelError(self.function("error_message")().decode())

    def tensor(self, value: torch.Tensor) -> ctypes.Structure:
        """lmi_tensor that looks at value's memory; value must outlive its use."""
        size = value.shape
        if value.device.type != "cpu" or value.dtype not in self._dtypes or len(size) > MAX_DIMS:
            raise KernelError(f"a tensor {list(size)} of {value.dtype} on {value.device} is not one that this column can take")
        return self._tensor_type(value.data_ptr(), tuple(size), value.stride(), len(size), self._dtypes[value.dtype])

    def constant(self, name: str) -> int:
        """An enumerator of the header, without the prefix LMI_."""
        return self.header.constants[f"LMI_{name}"]

    def describe(self) -> str:
        text: bytes = self.function("describe")()
        return text.decode()

    def set_threads(self, num_threads: int) -> None:
        self.check(self.function("set_threads")(num_threads))

    def set_level(self, level: str) -> None:
        self.check(self.function("set_level")(level.encode()))

    def _bind(self, name: str, result: Any, parameters: list[Any]) -> Callable[..., Any]:
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, parameters
        return function  # type: ignore[no-any-return]  # ctypes calls it Any

    def _operation(self, name: str) -> tuple[Callable[..., Any], type[ctypes.Structure], dict[str, str | None]]:
        """The function, its struct, and for each field the nested struct it stands in."""
        args_type = self.header.structs[f"{name}_args"]
        places: dict[str, str | None] = {}
        for field, kind in args_type._fields_:  # type: ignore[misc]  # never a bit field
            if isinstance(kind, type) and issubclass(kind, ctypes.Structure) and kind is not self._tensor_type:
                places |= {inner: field for inner, _ in kind._fields_}  # type: ignore[misc]
            else:
                places[field] = None
        return self._functions[name], args_type, places


def find_library(folders: list[str], name: str = "liblmi_cpu.so") -> Path | None:
    """The column's file in the first of the folders that has it."""
    return next((path for folder in folders if (path := Path(folder) / name).exists()), None)
