"""A loaded model in the hands of a host: which way of working a request asks for, told by its shape.

A batch whose items are new with the host's seed, or known and without a body, is a step of the rolling batch; any other batch was
merged by the host (contract 3.6). What is no batch goes through asynchronously where the host does, else it is one answer: whole, or
a stream.
"""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from lmi_dist_handler import whole_batch
from lmi_dist_handler.rolling_batch import RollingBatch, key_of
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.streaming import Streams
from lmi_dist_handler.wire import Input, Output

WAY = "lmi_way"  # property by which our own outer worker asks for an answer as a sync host gets it: `whole` or `stream`

Pieces = tuple[Output, AsyncIterator[str]]  # a stream's header and its texts


class Served(Protocol):
    """What answers requests once the model is loaded. All calls come from the loop's thread."""

    async def answer(self, inputs: Input, *, is_async: bool) -> Output | Pieces | AsyncIterator[Output]:
        """The reply; the header and texts of one that is streamed; or, in async mode, all frames of one request."""

    def abort(self, tracking_id: str) -> bool: ...

    def stats(self) -> dict[str, Any]: ...

    async def drain(self) -> None: ...


class Leading:
    """Of the process that has the engine."""

    def __init__(self, streams: Streams, config: HandlerConfig, *, merges: bool = False) -> None:
        """`merges`: the host merges requests into batches (its `batch_size` is above 1)."""
        self._streams = streams
        self._failure = config.dialect.failure
        self._rolls = config.rolling_batch != "disable" and not merges
        self._is_streamed = config.rolling_batch == "disable" and config.enable_streaming != "false"
        self._rolling = RollingBatch(streams, config.dialect)

    async def answer(self, inputs: Input, *, is_async: bool) -> Output | Pieces | AsyncIterator[Output]:
        if inputs.is_batch() and (self._rolls or _is_step(inputs)):
            return await self._rolling.step(inputs)
        if is_async and not inputs.is_batch() and not inputs.get_property(WAY):
            return self._streams.answer(inputs)
        if self._is_streamed and not inputs.is_batch():
            return await self._stream(inputs)
        return await whole_batch.answer(inputs, self._streams, self._failure)

    async def _stream(self, inputs: Input) -> Output | Pieces:
        """Only what is wrong before the first text has a code of its own."""
        frames = whole_batch.lines(inputs, self._streams)
        first = await anext(frames)
        if first.code is not None:
            return Output().error(first.error, first.code, self._failure)
        return Output().add_property("Content-Type", first.content_type), (frame.text async for frame in frames if frame.text)

    def abort(self, tracking_id: str) -> bool:
        return self._streams.abort(tracking_id)

    def stats(self) -> dict[str, Any]:
        return self._streams.stats()

    async def drain(self) -> None:
        await self._streams.drain()


def _is_step(inputs: Input) -> bool:
    return all(one.contains_key("seed") or not key_of(one) for one in inputs.get_batches())
