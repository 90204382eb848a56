"""Pages of the pool are there before they are written, and no more of them than soon will be; those of results stay."""

import itertools
import mmap
import subprocess
import sys
import time

import pytest
import torch
from resident import resident_bytes

from lmi_dist.pages import LEAD_BLOCKS, PagesAhead

BLOCK_BYTES = 8192
NUM_BLOCKS = 1024
HUGE_PAGE_BLOCKS = (2 << 20) // BLOCK_BYTES


@pytest.fixture
def parts() -> list[torch.Tensor]:
    """Each a mapping of its own: malloc's memory may have been written before."""
    mappings = [mmap.mmap(-1, NUM_BLOCKS * BLOCK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(3)]
    return [torch.frombuffer(each, dtype=torch.uint8).view(NUM_BLOCKS, BLOCK_BYTES) for each in mappings]


def come(parts: list[torch.Tensor], num: int) -> bool:
    """Whether `num` blocks come to be there, and no more of them than a huge page holds."""
    deadline = time.monotonic() + 30
    while min(there(parts)) < num - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    return all(num - 1 <= each < num + HUGE_PAGE_BLOCKS for each in there(parts))


def there(parts: list[torch.Tensor]) -> list[int]:
    return [resident_bytes(part) // BLOCK_BYTES for part in parts]


def test_pages_are_there_ahead_of_the_blocks_that_are_written(parts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmi_dist.pages.IDLE_S", 3600.0)
    pages = PagesAhead(parts)
    assert come(parts, LEAD_BLOCKS)

    pages.reach(300)

    assert come(parts, 301 + LEAD_BLOCKS)


def test_steps_have_the_cpus_between_one_tensor_and_the_next(parts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    began = []

    def populate(memory: torch.Tensor) -> None:
        began.append(time.perf_counter())
        time.sleep(0.01)

    monkeypatch.setattr("lmi_dist.pages.IDLE_S", 3600.0)
    monkeypatch.setattr("lmi_dist.pages._populate", populate)
    pages = PagesAhead(parts)
    while len(began) < 5:
        time.sleep(0.01)
    assert not pages.is_done

    assert min(after - before for before, after in itertools.pairwise(began)) >= 0.05  # 10 ms of work, four times as long of rest


def test_more_pages_come_while_no_step_runs(parts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmi_dist.pages.IDLE_S", 0.3)
    monkeypatch.setattr("lmi_dist.pages.IDLE_BYTES", 400 * len(parts) * BLOCK_BYTES)
    pages = PagesAhead(parts)
    assert come(parts, 400)

    pages.reach(399)

    assert come(parts, 800)


def test_thread_ends_with_the_last_page(parts: list[torch.Tensor]) -> None:
    parts[0][7, 9] = 3
    pages = PagesAhead(parts)

    pages.reach(NUM_BLOCKS - 1)
    pages.thread.join(60)

    assert not pages.thread.is_alive()
    assert parts[0][7, 9] == 3
    assert not any(part[-1].any() for part in parts)
    assert min(there(parts)) >= NUM_BLOCKS - 1


def test_thread_ends_with_the_pool(parts: list[torch.Tensor]) -> None:
    pages = PagesAhead(parts)
    thread = pages.thread

    del pages
    thread.join(60)

    assert not thread.is_alive()


FAULTS = """
import resource, torch
from lmi_dist.pages import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(20 << 20, dtype=torch.uint8).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(*(faults() for _ in range(20)))
"""


def test_memory_of_a_large_result_is_used_again() -> None:
    """In a process of its own, for malloc is the process's. The system gives pages until there is a place where another fits."""
    said = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True).stdout
    faults = [int(num) for num in said.split()]

    assert faults[0] > 5000
    assert sorted(faults)[len(faults) // 2] < 50
