"""Threads beside a host's own: an event loop for hosts that call without one, DJL's sync workers; and a watch over the parent."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

WATCH_INTERVAL_S = 1.0


class Background:
    """Runs coroutines for one thread, which waits for them."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="loop", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns or raises."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """The items as they come. One that is given up early ends them."""

        async def following() -> T:
            return await items.__anext__()

        async def close() -> None:
            await items.aclose()  # type: ignore[attr-defined]  # they are generators

        try:
            while True:
                try:
                    item = self.run(following())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self.run(close())


def end_with_parent() -> None:
    """End this process when its parent ends. mpirun may get a SIGKILL while we wait for another rank; nobody else would tell us."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_INTERVAL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
