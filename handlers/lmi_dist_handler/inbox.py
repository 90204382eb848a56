"""Items that wait for one reader, in one event loop's thread. asyncio.Queue is for several readers, and takes twice the time."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Put at any time; taken one by one, or all at once by a reader that catches up."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._reader: asyncio.Future[None] | None = None  # while it waits

    def put(self, item: T) -> None:
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> T:
        """The next item."""
        await self._until_filled()
        return self._items.popleft()

    async def take_all(self) -> list[T]:
        """All that waits, at least one item."""
        await self._until_filled()
        items = list(self._items)
        self._items.clear()
        return items

    async def _until_filled(self) -> None:
        if not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
