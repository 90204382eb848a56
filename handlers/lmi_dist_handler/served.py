"""A loaded model in the hands of a host: which way of working a request asks for, told by its shape.

A batch whose items are new with the host's seed, or known and without a body, is a step of the rolling batch; any other batch was
merged by the host (contract 3.6). What is no batch goes through asynchronously where the host does, else it is one answer: whole or
a stream.
"""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from lmi_dist_handler import whole_batch
from lmi_dist_handler.rolling_batch import RollingBatch, key_of
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.streaming import Frame, Streams
from lmi_dist_handler.wire import Codec, Input, Output

WAY, WHOLE, LINES = "lmi_way", "whole", "lines"  # property by which forwarding.py asks for what a sync host gets, and its values

Answer = (
    Output  # the reply
    | tuple[Output, AsyncIterator[str]]  # the header and the texts of one that is streamed
    | AsyncIterator[Output]  # in async mode, all frames of one request
)


class Served(Protocol):
    """What answers requests once the model is loaded. All calls come from the loop's thread."""

    async def answer(self, inputs: Input, *, is_async: bool) -> Answer: ...

    def abort(self, tracking_id: str) -> bool: ...

    def stats(self) -> dict[str, Any]: ...

    async def drain(self) -> None: ...


class Leading:
    """Of the process that has the engine."""

    def __init__(self, streams: Streams, config: HandlerConfig, *, merges: bool = False) -> None:
        """`merges`: the host merges requests into batches (its `batch_size` is above 1)."""
        self._streams = streams
        self._codec = Codec(config.dialect.wire)
        self._failure = config.dialect.failure
        self._rolls = config.rolling_batch != "disable" and not merges
        self._is_streamed = config.rolling_batch == "disable" and config.enable_streaming != "false"
        self._rolling = RollingBatch(streams, config.dialect)

    async def answer(self, inputs: Input, *, is_async: bool) -> Answer:
        if inputs.is_batch() and (self._rolls or _is_step(inputs)):
            return await self._rolling.step(inputs)
        way = WHOLE if inputs.is_batch() else inputs.get_property(WAY)
        if way == LINES:
            return self._encoded(whole_batch.lines(inputs, self._streams))
        if way is None and is_async:
            return self._streams.answer(inputs)
        if way is None and self._is_streamed:
            return await self._stream(inputs)
        return await whole_batch.answer(inputs, self._streams, self._failure)

    async def _stream(self, inputs: Input) -> Answer:
        """Only what is wrong before the first text has a code of its own."""
        frames = whole_batch.lines(inputs, self._streams)
        first = await anext(frames)
        if first.code is not None:
            return Output().error(first.error, first.code, self._failure)
        return Output().add_property("Content-Type", first.content_type), (frame.text async for frame in frames if frame.text)

    async def _encoded(self, frames: AsyncIterator[Frame]) -> AsyncIterator[Output]:
        async for frame in frames:
            if frame.text or frame.is_last:
                yield frame.encode(self._codec)

    def abort(self, tracking_id: str) -> bool:
        return self._streams.abort(tracking_id)

    def stats(self) -> dict[str, Any]:
        return self._streams.stats()

    async def drain(self) -> None:
        await self._streams.drain()


def _is_step(inputs: Input) -> bool:
    return all(one.contains_key("seed") or not key_of(one) for one in inputs.get_batches())
