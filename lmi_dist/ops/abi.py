"""Opens a column's shared library: reads lmi_kernels.h, which lies beside it, into ctypes structures and prototypes.

The header is the only place where an argument struct is written down. Calls take torch tensors and numbers by the struct's field
names; a status other than LMI_OK becomes a KernelError with the library's sentence.
"""

import ctypes
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lmi_dist.errors import KernelError, RankError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32", torch.int64: "I64",
          torch.uint8: "U8", torch.uint64: "U64", torch.float8_e4m3fn: "F8E4M3"}  # fmt: skip
MAX_DIMS = 4
# lmi_tensor with so many dimensions: data, size[4], stride[4], dims, dtype
_TENSORS = {n: struct.Struct(f"P{n}q{8 * (MAX_DIMS - n)}x{n}q{8 * (MAX_DIMS - n)}x2i") for n in range(1, MAX_DIMS + 1)}

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


@dataclass(frozen=True)
class Operation:
    """A function that takes one argument struct, and where each field of that lies: its offset, and how a number is written there
    (None: a tensor). Fields of nested structs are flat."""

    function: Callable[..., int]
    address: int | None
    args_type: type[ctypes.Structure]
    places: Mapping[str, tuple[int, struct.Struct | None]]


class Call(NamedTuple):
    """One call of an operation, as lmi_call holds it."""

    operation: int | None  # the function's address
    args: ctypes.Structure


class Library:
    """One opened column. Its functions may be called from any thread; the GIL is not held meanwhile. On a CUDA device calls go to
    torch's current stream and return before they have run."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """device: type of device on which tensors must lie. Raises KernelError when the library cannot be opened, lacks a function
        of its header or is of another version."""
        self.path = path.resolve()
        self.device = device
        self.header = Header.read(self.path.with_name("lmi_kernels.h"))
        try:
            library = ctypes.CDLL(str(self.path))
            self._functions = {name: _bind(library, name, *kinds) for name, kinds in self.header.functions.items()}
        except (OSError, AttributeError) as error:
            raise KernelError(f"{path} cannot be opened: {error}; build it again") from None
        if self.function("abi_version")() != self.header.version:
            raise KernelError(f"{path} is of another version than the header beside it; build it again")
        self._dtypes = {dtype: self.constant(name) for dtype, name in DTYPES.items()}
        self._operations = {name: self._operation(name) for name in self._functions if f"{name}_args" in self.header.structs}

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the header as it stands, without the prefix lmi_."""
        return self._functions[f"lmi_{name}"]

    def call(self, name: str, **fields: torch.Tensor | float | None) -> None:
        """Runs the operation lmi_<name>. fields: those of its argument struct, tensors and numbers; what is None or left out is
        absent or 0. Raises KernelError with the library's sentence."""
        operation = self._operations[f"lmi_{name}"]
        args = operation.args_type()
        for field, value in fields.items():
            offset, number = operation.places[field]
            if isinstance(value, torch.Tensor):
                self._write_tensor(args, offset, field, value)
            elif value is not None and number is not None:
                number.pack_into(args, offset, value)
        self.check(operation.function(args, self.stream()))
        watcher = _watchers.get(threading.get_ident()) if _watchers else None
        if watcher is not None:
            watcher(self, Call(operation.address, args), [value for value in fields.values() if isinstance(value, torch.Tensor)])

    def stream(self) -> int | None:
        """Where calls go: on a CUDA device torch's current stream."""
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None

    def check(self, status: int) -> None:
        """Raises KernelError unless status is LMI_OK; RankError where another rank is the cause."""
        if status:
            kind = RankError if status == self.constant("RANK_ERROR") else KernelError
            raise kind(self.function("error_message")().decode())

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

    def _write_tensor(self, args: ctypes.Structure, offset: int, name: str, value: torch.Tensor) -> None:
        """lmi_tensor that looks at value's memory. A struct.pack costs half of what a ctypes constructor does."""
        size, dtype = value.shape, self._dtypes.get(value.dtype)
        if value.device.type != self.device or dtype is None or not 0 < len(size) <= MAX_DIMS:
            raise KernelError(f"{name} is a tensor {list(size)} of {value.dtype} on {value.device}, which this column cannot take")
        _TENSORS[len(size)].pack_into(args, offset, value.data_ptr(), *size, *value.stride(), len(size), dtype)

    def _operation(self, name: str) -> Operation:
        args_type = self.header.structs[f"{name}_args"]
        function = self._functions[name]
        address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]  # a ctypes function is one
        return Operation(function, address, args_type, dict(self._places(args_type, 0)))

    def _places(self, kind: Any, start: int) -> Iterator[tuple[str, tuple[int, struct.Struct | None]]]:
        for field, inner in kind._fields_:
            offset = start + getattr(kind, field).offset
            if inner is self.header.structs["lmi_tensor"]:
                yield field, (offset, None)
            elif issubclass(inner, ctypes.Structure):
                yield from self._places(inner, offset)
            else:
                yield field, (offset, struct.Struct(inner._type_))


Watcher = Callable[[Library, Call, Sequence[torch.Tensor]], None]
_watchers: dict[int, Watcher] = {}  # by thread


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Within a `with`: tell of each call that this thread has made through Library.call, with the tensors that were given to it."""
    _watchers[threading.get_ident()] = watcher
    try:
        yield
    finally:
        del _watchers[threading.get_ident()]


def _bind(library: ctypes.CDLL, name: str, result: Any, parameters: list[Any]) -> Callable[..., Any]:
    function = getattr(library, name)
    function.restype, function.argtypes = result, parameters
    return function  # type: ignore[no-any-return]  # ctypes calls it Any


def find_library(folders: list[str], name: str = "liblmi_cpu.so") -> Path | None:
    """The column's file in the first of the folders that has it."""
    return next((path for folder in folders if (path := Path(folder) / name).exists()), None)
