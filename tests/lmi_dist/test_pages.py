"""Pages of the pool are there before they are written, and no more of them than soon will be; those of results stay."""

import mmap
import subprocess
import sys

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


def settled(pages: PagesAhead) -> None:
    assert pages.thread is not None
    pages.thread.join(60)
    assert not pages.thread.is_alive()


def test_pages_are_there_ahead_of_the_blocks_that_are_written(parts: list[torch.Tensor]) -> None:
    pages = PagesAhead(parts)
    settled(pages)
    begun = [resident_bytes(part) // BLOCK_BYTES for part in parts]

    pages.reach(LEAD_BLOCKS // 2)
    first = pages.thread
    pages.reach(300)
    settled(pages)
    grown = [resident_bytes(part) // BLOCK_BYTES for part in parts]

    assert all(LEAD_BLOCKS - 1 <= num < LEAD_BLOCKS + HUGE_PAGE_BLOCKS for num in begun)
    assert pages.thread is not first
    assert all(300 + LEAD_BLOCKS - 1 <= num < 300 + LEAD_BLOCKS + HUGE_PAGE_BLOCKS for num in grown)


def test_pages_of_the_last_blocks_are_asked_for_once(parts: list[torch.Tensor]) -> None:
    parts[0][7, 9] = 3
    pages = PagesAhead(parts)
    pages.reach(NUM_BLOCKS - 1)
    settled(pages)
    last = pages.thread
    pages.reach(NUM_BLOCKS - 1)

    assert pages.thread is last
    assert parts[0][7, 9] == 3
    assert not any(part[-1].any() for part in parts)
    assert all(resident_bytes(part) // BLOCK_BYTES >= NUM_BLOCKS - 1 for part in parts)


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
