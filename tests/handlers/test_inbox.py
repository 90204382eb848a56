"""handlers/lmi_dist_handler/inbox.py: items for one reader."""

import asyncio

import pytest
from lmi_dist_handler.inbox import Inbox


def test_reader_gets_what_waits_in_order() -> None:
    async def main() -> tuple[int, list[int]]:
        inbox: Inbox[int] = Inbox()
        for item in range(4):
            inbox.put(item)
        return await inbox.take(), await inbox.take_all()

    assert asyncio.run(main()) == (0, [1, 2, 3])


def test_reader_sleeps_until_something_comes() -> None:
    async def main() -> list[int]:
        inbox: Inbox[int] = Inbox()
        reader = asyncio.create_task(inbox.take_all())
        await asyncio.sleep(0)
        assert not reader.done()
        inbox.put(1)
        inbox.put(2)
        return await reader

    assert asyncio.run(main()) == [1, 2]


def test_reader_that_gave_up_loses_nothing() -> None:
    async def main() -> int:
        inbox: Inbox[int] = Inbox()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(inbox.take(), 0.001)
        inbox.put(1)
        return await inbox.take()

    assert asyncio.run(main()) == 1
