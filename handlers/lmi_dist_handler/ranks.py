"""Hosts that ask every rank (DJL 0.26 to 0.29, later ones with `use_passive_workers=false`) get from each what rank 0 has answered:
it shares its replies, the others repeat them. Not so in async mode, where a host passes on the frames of all that answer: there
the others are silent.

A message between ranks is one letter and what it announces: `w` a whole reply, `s` the header of a stream, `p` one of its texts,
`e` its end. Replies are in the order of requests, which all ranks get alike.
"""

import asyncio
import io
import logging
import os
import threading
from collections.abc import AsyncIterator
from typing import Any

from lmi_dist import DeviceError, Follower, FollowerLink, Link, RankError
from lmi_dist_handler.formatter import sentence
from lmi_dist_handler.served import Answer, Served
from lmi_dist_handler.wire import Codec, Input, Output, read

logger = logging.getLogger(__name__)

WHOLE, STREAM, PIECE, END = b"w", b"s", b"p", b"e"


class Sharing:
    """On rank 0: answers as `served` does, and lets the other ranks know."""

    def __init__(self, served: Served, link: Link, failure: str) -> None:
        self._served = served
        self._link = link
        self._failure = failure  # message of a reply that is an error
        self._codec = Codec()
        self.abort, self.stats, self.drain = served.abort, served.stats, served.drain

    async def answer(self, inputs: Input, *, is_async: bool) -> Answer:
        if _is_for_one(inputs, is_async=is_async):
            return await self._served.answer(inputs, is_async=True)
        try:
            answer = await self._served.answer(inputs, is_async=False)
        except Exception as error:  # the other ranks wait for a reply, whatever it is
            logger.exception("a request failed")
            answer = Output().error(sentence(error), message=self._failure)
        if isinstance(answer, tuple):
            output, texts = answer
            self._share(STREAM, output)
            return output, self._shared(texts)
        assert isinstance(answer, Output), "frames are for async mode"
        self._share(WHOLE, answer)
        return answer

    def _share(self, kind: bytes, output: Output) -> None:
        self._link.publish_reply(kind + b"".join(self._codec.encode_response(output)))

    async def _shared(self, texts: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for text in texts:
                self._link.publish_reply(PIECE + text.encode())
                yield text
        finally:
            self._link.publish_reply(END)


class Following:
    """On a rank above 0: the model's part here follows in a thread of its own, and each request gets rank 0's reply."""

    def __init__(self, link: FollowerLink) -> None:
        self._link = link
        self._codec = Codec()

    async def start(self) -> None:
        """Load this rank's part, then follow. Raises what loading raises, on any rank."""
        loop = asyncio.get_running_loop()
        built: asyncio.Future[None] = loop.create_future()
        threading.Thread(target=self._run, args=(loop, built), name="follower", daemon=True).start()
        await built

    def _run(self, loop: asyncio.AbstractEventLoop, built: "asyncio.Future[None]") -> None:
        try:
            follower = Follower(self._link)
        except Exception as error:  # handed to whoever waits for `start`
            loop.call_soon_threadsafe(built.set_exception, error)
            return
        loop.call_soon_threadsafe(built.set_result, None)
        try:
            follower.run()
        except RankError as error:
            logger.error("this rank follows no more: %s", error)
        except DeviceError as error:  # the launcher ends the others with this one, and the host starts all anew
            logger.critical("this rank ends: %s", error)
            os._exit(1)

    async def answer(self, inputs: Input, *, is_async: bool) -> Answer:
        if _is_for_one(inputs, is_async=is_async):
            return _silence()
        kind, data = await self._next()
        output = read(self._codec.response, io.BytesIO(data))
        return (output, self._texts()) if kind == STREAM else output

    async def _texts(self) -> AsyncIterator[str]:
        while True:
            kind, data = await self._next()
            if kind == END:
                return
            yield data.decode()

    async def _next(self) -> tuple[bytes, bytes]:
        message = await asyncio.to_thread(self._link.await_reply)
        return message[:1], message[1:]

    def abort(self, tracking_id: str) -> bool:
        return False

    def stats(self) -> dict[str, Any]:
        return {}

    async def drain(self) -> None:
        """Rank 0 does."""


def _is_for_one(inputs: Input, *, is_async: bool) -> bool:
    """A request of async mode. What is merged there comes from a host that rolls batches all the same (contract 2.7)."""
    return is_async and not inputs.is_batch()


async def _silence() -> AsyncIterator[Output]:
    """No frame at all."""
    nothing: tuple[Output, ...] = ()
    for each in nothing:
        yield each
