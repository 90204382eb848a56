"""handlers/lmi_dist_handler/background.py: a loop for hosts without one, and the end that follows a parent's."""

import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest
from lmi_dist_handler.background import Background

ORPHAN = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; from lmi_dist_handler.background import end_with_parent; "
    "end_with_parent(); print('watching', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os._exit(0)
"""


async def double(number: int) -> int:
    if number < 0:
        raise ValueError("negative")
    return 2 * number


def test_coroutine_runs_for_a_thread_without_a_loop() -> None:
    background = Background()

    assert background.run(double(4)) == 8
    with pytest.raises(ValueError, match="negative"):
        background.run(double(-1))


def test_iterator_that_is_given_up_is_closed() -> None:
    ended = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            ended.append(True)

    background = Background()
    assert list(background.iterate(numbers())) == [1, 2]
    items = background.iterate(numbers())
    assert next(items) == 1
    items.close()  # type: ignore[attr-defined]  # it is a generator

    assert ended == [True, True]


def test_process_ends_when_its_parent_has() -> None:
    child = int(subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=True).stdout)

    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
