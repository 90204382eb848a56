"""The pool's pages are there before they are written, and no more of them than soon will be."""

import numpy as np
import pytest
import torch
from resident import resident_bytes

from lmi_dist.pages import LEAD_BLOCKS, PagesAhead

BLOCK_BYTES = 8192
NUM_BLOCKS = 1024
HUGE_PAGE_BLOCKS = (2 << 20) // BLOCK_BYTES


@pytest.fixture
def parts() -> list[torch.Tensor]:
    return [torch.from_numpy(np.zeros((NUM_BLOCKS, BLOCK_BYTES), np.uint8)) for _ in range(3)]


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
