"""engine=Python with tensor_parallel_degree above 1: DJL starts one process, which starts the ranks and hands all on to rank 0.

If they end, so does this process: the host then starts another, as it would for a worker that crashed.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from lmi_dist_handler.group import Group, Piece, Stream, WorkerLostError
from lmi_dist_handler.host import LoadError
from lmi_dist_handler.launcher import Launch
from lmi_dist_handler.served import LINES, WAY, WHOLE, Answer
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.wire import Input, Output, PairList

logger = logging.getLogger(__name__)

FOREVER_S = 1e9  # the host has the deadlines


class Forwarding:
    """The group of ranks behind this process. All calls come from the loop's thread."""

    def __init__(self, config: HandlerConfig) -> None:
        self._config = config
        self._is_streamed = config.rolling_batch == "disable" and config.enable_streaming != "false"
        self._failure = config.dialect.failure

    async def start(self, properties: Mapping[str, Any], djl_version: str) -> None:
        """Start the ranks and have them load the model. Raises LoadError with what the first that failed has said."""
        folder = properties.get("model_dir")
        launch = Launch(model_dir=Path(folder) if folder else None, num_ranks=self._config.engine.tensor_parallel_degree)
        self._group = Group(self._config.model_name, launch)
        await self._group.start()
        init = {name: str(value) for name, value in properties.items() if not callable(value)}
        reply = await self._group.load({**init, "djl_version": djl_version}, FOREVER_S)
        if reply.code >= 300:
            await self._group.kill()
            raise LoadError(reply.message, reply.code)
        self._watch = asyncio.create_task(self._end_with_it())

    async def answer(self, inputs: Input, *, is_async: bool) -> Answer:
        content = inputs.get_content()
        pairs = PairList((content.key_at(place), bytes(content.value_at(place))) for place in range(content.size()))
        properties = {name: str(value) for name, value in inputs.get_properties().items()}
        if is_async and not inputs.is_batch():
            return self._frames(self._group.open(properties, pairs))
        if self._is_streamed and not inputs.is_batch():
            return await self._lines(self._group.open({**properties, WAY: LINES}, pairs))
        return await self._group.call("handle", {**properties, WAY: WHOLE}, FOREVER_S, content=pairs)

    async def _frames(self, stream: Stream) -> AsyncIterator[Output]:
        with stream:
            while True:
                reply = await stream.reply()
                yield reply
                if self._group.piece(reply).is_last:
                    return

    async def _lines(self, stream: Stream) -> Answer:
        first = await stream.piece()
        if first.code is not None:
            return Output().error(first.error, first.code, self._failure)
        output = Output()
        for name, value in first.headers.items():
            output.add_property(name, value)
        return output, _texts(first, stream)

    def abort(self, tracking_id: str) -> bool:
        return False

    def stats(self) -> dict[str, Any]:
        return {}

    async def drain(self) -> None:
        """Our own host has no such worker."""

    async def _end_with_it(self) -> NoReturn:
        reason = await self._group.died
        logger.error("%s; this process ends, too", reason)
        await self._group.kill()
        os._exit(1)


async def _texts(first: Piece, stream: Stream) -> AsyncIterator[str]:
    with stream:
        piece = first
        while True:
            if piece.text:
                yield piece.text
            if piece.is_last:
                return
            try:
                piece = await stream.piece()
            except WorkerLostError as error:
                piece = Piece("", True, error.code, str(error))
