"""A loaded model in the hands of a host: which way of working a request asks for, told by its shape.

A batch whose items are new with the host's seed, or known and without a body, is a step of the rolling batch; any other batch was
merged by the host (contract 3.6). What is no batch goes through asynchronously where the host does, else it is one whole answer.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

from lmi_dist_handler import whole_batch
from lmi_dist_handler.rolling_batch import RollingBatch, key_of
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.streaming import Streams
from lmi_dist_handler.wire import Input, Output

Blocking = Callable[[AsyncIterator[Any]], Any]


class Served:
    """What answers requests once the model is loaded. Everything belongs to the loop's thread."""

    def __init__(self, streams: Streams, config: HandlerConfig, reply: type[Output], *, merges: bool = False) -> None:
        """`merges`: the host merges requests into batches (its `batch_size` is above 1)."""
        self.streams = streams
        self.reply = reply
        self._rolls = config.rolling_batch != "disable" and not merges
        self._is_streamed = config.rolling_batch == "disable" and config.enable_streaming != "false"
        self._rolling = RollingBatch(streams, config.dialect)

    async def answer(self, inputs: Input, blocking: Blocking | None) -> Output | AsyncIterator[Output]:
        """The reply, or in async mode its frames. `blocking` is None there, else what makes an iterator for a waiting thread."""
        if inputs.is_batch() and (self._rolls or _is_step(inputs)):
            return await self._rolling.step(inputs, self.reply)
        if blocking is None and not inputs.is_batch():
            return self.streams.answer(inputs, self.reply)
        if blocking is not None and self._is_streamed and not inputs.is_batch():
            return await whole_batch.stream(inputs, self.streams, self.reply, blocking)
        return await whole_batch.answer(inputs, self.streams, self.reply)


def _is_step(inputs: Input) -> bool:
    return all(one.contains_key("seed") or not key_of(one) for one in inputs.get_batches())
