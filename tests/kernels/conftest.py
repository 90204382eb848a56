"""Which columns, instruction levels and numbers of threads the kernel tests use.

A test that takes `library` runs with that library chosen as the column: the CPU's at the best level of this machine with 1 and 2
threads, and at each other level with 2, since how rows are shared does not depend on the level; and the CUDA column on its
stand-in, whose levels are orders of threads; where there is a GPU and the CUDA column is built, that too, on copies of the tests'
tensors. A test marked `cpu_column`, `device_column` or `sim_column` is about what only one of them promises. The sanitizer test
runs these same tests on another library: --column=cpu --library=PATH --levels=base,best --threads=2.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from cache_order import InOrder
from mirrored import Mirrored

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops import column as columns
from lmi_dist.ops.abi import Library, find_library

ORDERS = ("forward", "reverse", "random")
KEPT_FROM = {"cpu": {"device_column", "sim_column"}, "sim": {"cpu_column"}, "cuda": {"cpu_column", "sim_column"}}  # tests so marked


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_column: not for the CUDA column")
    config.addinivalue_line("markers", "device_column: for the CUDA column only")
    config.addinivalue_line("markers", "sim_column: for the CUDA column's stand-in only")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--column", default="", help="the only column to test: cpu, sim or cuda; default: all")
    parser.addoption("--mirrored", action="store_true", help="run the stand-in on copies of the tensors, as a GPU is")
    parser.addoption("--library", default="", help="kernel library to test instead of the installed one")
    parser.addoption("--levels", default="", help="levels or orders of threads to test, by commas; default: all that run here")
    parser.addoption("--threads", default="", help="numbers of threads to test, by commas; default: 1,2")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "library" in metafunc.fixturenames:
        marks = {mark.name for mark in metafunc.definition.iter_markers()}
        backends = [each for each in backends_of(metafunc.config) if not KEPT_FROM[each[0]] & marks]
        names = ["-".join(map(str, each)) for each in backends]
        metafunc.parametrize("library", backends, ids=names, indirect=True)


def backends_of(config: pytest.Config) -> list[tuple[str, str, int]]:
    """Column, level and number of threads."""
    wanted = [option(config, "column")] if option(config, "column") else default_columns(config)
    given = option(config, "levels").split(",") if option(config, "levels") else None
    threads = [int(each) for each in (option(config, "threads") or "1,2").split(",")]
    backends = []
    for column in wanted:
        own = given or {"cpu": runnable, "sim": lambda _: ORDERS, "cuda": lambda _: ["best"]}[column](config)
        for level in own:
            numbers = [1] if column != "cpu" else threads if level == own[-1] else threads[-1:]
            backends += [(column, level, number) for number in numbers]
    return backends


def default_columns(config: pytest.Config) -> list[str]:
    has_cuda = torch.cuda.is_available() and find_library(list(ops.__path__), "liblmi_cuda.so") is not None
    return ["cpu", "sim", *(["cuda"] if has_cuda else [])]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Another library than the installed one: only what runs on it."""
    if option(config, "library"):
        items[:] = [item for item in items if "library" in getattr(item, "fixturenames", ())]


@pytest.fixture
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """The library under test as the chosen column, at one level and number of threads."""
    column, level, threads = request.param
    path = library_path(request.config, column)
    if column == "cuda" or option(request.config, "mirrored"):
        monkeypatch.setitem(columns._libraries, path, mirrored(path, columns.DEVICES[column]))
    elif column == "cpu":
        monkeypatch.setitem(columns._libraries, path, in_order(path))
    with ops.using(column, threads, path=path, level=level) as opened:
        assert opened is not None
        yield opened


@pytest.fixture(params=["cpu", "torch"])
def column(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Either column, chosen: for what both must refuse in the same words."""
    path = library_path(request.config)
    monkeypatch.setitem(columns._libraries, path, in_order(path))
    with ops.using(request.param, 2, path=path):
        yield request.param


@cache
def in_order(path: Path) -> InOrder:
    return InOrder(path)


@cache
def mirrored(path: Path, device: str) -> Mirrored:
    return Mirrored(path, device)


def library_path(config: pytest.Config, column: str = "cpu") -> Path:
    wanted, name = option(config, "library"), f"liblmi_{column}.so"
    path = Path(wanted) if wanted else find_library(list(ops.__path__), name)
    assert path is not None, f"{name} is not built: install the package first"
    return path


def option(config: pytest.Config, name: str) -> str:
    """What was given, or "": pytest knows the options only when tests/kernels is named on its command line."""
    return str(config.getoption(name, "") or "")


def runnable(config: pytest.Config) -> list[str]:
    """Levels that the library has and this machine runs."""
    opened = Library(library_path(config))
    opened.set_level("best")
    levels = opened.describe().split("(")[1].rstrip(")").split()
    return [level for level in levels if runs(opened, level)]


def runs(opened: Library, level: str) -> bool:
    try:
        opened.set_level(level)
    except KernelError:
        return False
    opened.set_level("best")
    return True
