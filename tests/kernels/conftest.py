"""Which columns, instruction levels and numbers of threads the kernel tests use.

A test that takes `library` runs with that library chosen as the column: the CPU's at the best level of this machine with 1 and 2
threads, and at each other level with 2, since how rows are shared does not depend on the level; and the CUDA column on its
stand-in, whose levels are orders of threads. A test marked `cpu_column` or `device_column` is about what only one of them
promises. The sanitizer test runs these same tests on another library: --column=cpu --library=PATH --levels=base,best --threads=2.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library, find_library

ORDERS = ("forward", "reverse", "random")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_column: not for the CUDA column")
    config.addinivalue_line("markers", "device_column: for the CUDA column only")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--column", default="", help="the only column to test: cpu or sim; default: both")
    parser.addoption("--library", default="", help="kernel library to test instead of the installed one")
    parser.addoption("--levels", default="", help="instruction levels to test, by commas; default: all that run here")
    parser.addoption("--threads", default="", help="numbers of threads to test, by commas; default: 1,2")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "library" in metafunc.fixturenames:
        marks = {mark.name for mark in metafunc.definition.iter_markers()}
        columns = {"cpu"} if "cpu_column" in marks else {"sim"} if "device_column" in marks else {"cpu", "sim"}
        backends = [each for each in backends_of(metafunc.config) if each[0] in columns]
        names = ["-".join(map(str, each)) for each in backends]
        metafunc.parametrize("library", backends, ids=names, indirect=True)


def backends_of(config: pytest.Config) -> list[tuple[str, str, int]]:
    """Column, level and number of threads."""
    wanted = [option(config, "column")] if option(config, "column") else ["cpu", "sim"]
    levels = {"cpu": option(config, "levels").split(",") if option(config, "levels") else None, "sim": ORDERS}
    threads = [int(each) for each in (option(config, "threads") or "1,2").split(",")]
    backends = []
    for column in wanted:
        own = levels[column] or runnable(config)
        for level in own:
            numbers = [1] if column == "sim" else threads if level == own[-1] else threads[-1:]
            backends += [(column, level, number) for number in numbers]
    return backends


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Another library than the installed one: only what runs on it."""
    if option(config, "library"):
        items[:] = [item for item in items if "library" in getattr(item, "fixturenames", ())]


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library under test as the chosen column, at one level and number of threads."""
    column, level, threads = request.param
    with ops.using(column, threads, path=library_path(request.config, column), level=level) as opened:
        assert opened is not None
        yield opened


@pytest.fixture(params=["cpu", "torch"])
def column(request: pytest.FixtureRequest) -> Iterator[str]:
    """Either column, chosen: for what both must refuse in the same words."""
    with ops.using(request.param, 2, path=library_path(request.config)):
        yield request.param


def library_path(config: pytest.Config, column: str = "cpu") -> Path:
    wanted, name = option(config, "library"), f"liblmi_{column}.so"
    path = Path(wanted) if wanted else find_library(list(ops.__path__), name)
    assert path is not None, f"{name} is not built: install the package first"
    return path


def option(config: pytest.Config, name: str) -> str:
    """What was given, or "": pytest knows the options only when tests/kernels is named on its command line."""
    return str(config.getoption(name, ""))


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
