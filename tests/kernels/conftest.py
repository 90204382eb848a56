"""Which library, instruction levels and numbers of threads the kernel tests use.

A test that takes `library` runs with that library chosen as the column: at the best level of this machine with 1 and 2 threads, and
at each other level with 2, since how rows are shared does not depend on the level. The sanitizer test runs these same tests on
another library: --library=PATH --levels=base,best --threads=2.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library, find_library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", default="", help="kernel library to test instead of the installed one")
    parser.addoption("--levels", default="", help="instruction levels to test, by commas; default: all that run here")
    parser.addoption("--threads", default="", help="numbers of threads to test, by commas; default: 1,2")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "library" in metafunc.fixturenames:
        wanted = option(metafunc.config, "levels")
        levels = wanted.split(",") if wanted else runnable(metafunc.config)
        threads = [int(each) for each in (option(metafunc.config, "threads") or "1,2").split(",")]
        backends = [(level, each) for level in levels for each in (threads if level == levels[-1] else threads[-1:])]
        metafunc.parametrize("library", backends, ids=[f"{level}-{each}" for level, each in backends], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Another library than the installed one: only what runs on it."""
    if option(config, "library"):
        items[:] = [item for item in items if "library" in getattr(item, "fixturenames", ())]


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library under test as the chosen column, at one level and number of threads."""
    level, threads = request.param
    with ops.using("cpu", threads, path=library_path(request.config), level=level) as opened:
        assert opened is not None
        yield opened


@pytest.fixture(params=["cpu", "torch"])
def column(request: pytest.FixtureRequest) -> Iterator[str]:
    """Either column, chosen: for what both must refuse in the same words."""
    with ops.using(request.param, 2, path=library_path(request.config)):
        yield request.param


def library_path(config: pytest.Config) -> Path:
    wanted = option(config, "library")
    path = Path(wanted) if wanted else find_library(list(ops.__path__))
    assert path is not None, "liblmi_cpu.so is not built: install the package first"
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
