"""What holds for every test."""

import os

import pytest
from nvcc import NVCC

# Before torch is loaded. The tests' models are so small that a second thread costs more than it does; where a test asks for two,
# they must not spin while they wait, or everything gets slow where programs share the CPUs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if NVCC is None:
        left_out = [item for item in items if item.get_closest_marker("nvcc")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if NVCC is None:
        terminalreporter.write_line(
            "not checked, for there is no nvcc: that the CUDA column compiles (tests marked nvcc)", yellow=True
        )
