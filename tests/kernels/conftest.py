"""Which library, instruction levels and numbers of threads the kernel tests use.

A test that takes `library` runs once for each level that this machine has and each number of threads, with that library chosen as
the column. The sanitizer test runs these same tests on another library: --library=PATH --levels=best --threads=2.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library, find_library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", type=Path, default=None, help="kernel library to test instead of the installed one")
    parser.addoption("--levels", default="", help="instruction levels to test, by commas; default: all that run here")
    parser.addoption("--threads", default="1,2", help="numbers of threads to test, by commas")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "library" in metafunc.fixturenames:
        levels = metafunc.config.getoption("--levels").split(",") if metafunc.config.getoption("--levels") else runnable(metafunc.config)
        threads = metafunc.config.getoption("--threads").split(",")
        backends = [pytest.param((level, int(each)), id=f"{level}-{each}") for level in levels for each in threads]
        metafunc.parametrize("library", backends, indirect=True)


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library under test as the chosen column, at one level and number of threads."""
    level, threads = request.param
    with ops.using("cpu", threads, path=library_path(request.config), level=level) as opened:
        assert opened is not None
        yield opened


@pytest.fixture
def torch_column() -> Iterator[None]:
    with ops.using("torch", 2):
        yield


def library_path(config: pytest.Config) -> Path:
    path = config.getoption("--library") or find_library(list(ops.__path__))
    assert path is not None, "liblmi_cpu.so is not built: install the package first"
    return path


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
