"""Sync mode: one call, one step of the host's batch (contract 4). The engine does not wait for the host between two calls.

A request has no id here, its place in the host's list is who it is: known requests come first, in order and without a body, new
ones behind them, and what was answered with `last` is gone. Each is a stream of frames as in async mode; a reply has what came
since the last one. So a reply may hold several tokens of a request, or none.
"""

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from lmi_dist_handler.dialects import LmiDialect
from lmi_dist_handler.streaming import MAX_PIECE, Frame, Streams
from lmi_dist_handler.wire import Codec, Input, Output

logger = logging.getLogger(__name__)

HOLD_S = 0.1  # a reply waits this long for a word of anybody: meanwhile the host can send nothing new
SILENT_FORMS = ("text/plain", "")  # whose last piece may have no text
NOTHING = "\n"  # what a version that needs a last word gets from such an answer without any


def key_of(inputs: Input) -> tuple[tuple[str | None, bytes], ...]:
    """What makes a first step a request's own: body and seed. Empty in its later steps."""
    content = inputs.get_content()
    pairs = [(content.key_at(place), bytes(content.value_at(place))) for place in range(content.size())]
    return tuple(pair for pair in pairs if pair[1])


class Answer:
    """One request of the batch, and what of its answer the host has not had yet."""

    def __init__(self, key: int, frames: AsyncIterator[Frame], on_news: Callable[[], object], dialect: LmiDialect) -> None:
        self.key = key
        self._on_news = on_news
        self._dialect = dialect
        self._frames: deque[Frame] = deque()
        self._content_type: str | None = None
        self._held = ""
        self._has_spoken = False
        self._task = asyncio.get_running_loop().create_task(self._read(frames))

    @property
    def has_begun(self) -> bool:
        """The body has been read."""
        return self._content_type is not None

    @property
    def has_news(self) -> bool:
        return bool(self._frames)

    def take(self) -> Frame:
        """All that there is to say now, as one frame: with `is_last`, nothing comes behind it."""
        frame = self._frames.popleft() if self._frames else Frame("", self._content_type or "")
        while self._frames and self._frames[0].code is None and len(frame.text) + len(self._frames[0].text) <= MAX_PIECE:
            following = self._frames.popleft()  # not one with a code: the host drops the text beside it
            frame = following._replace(text=frame.text + following.text)
        return self._with_last_word(frame) if self._dialect.last_must_speak else frame

    async def close(self) -> None:
        """End it here; what it holds is freed before the next step."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _read(self, frames: AsyncIterator[Frame]) -> None:
        try:
            async for frame in frames:
                self._put(frame)
        except Exception as error:  # a bug: even so the host must not lose its place for this request
            logger.exception("an answer broke off")
            self._put(
                Frame("", "application/json", is_last=True, code=424, error=f"internal error: {type(error).__name__}: {error}")
            )

    def _put(self, frame: Frame) -> None:
        self._content_type = frame.content_type
        if frame.text or frame.is_last:
            self._frames.append(frame)
        self._on_news()

    def _with_last_word(self, frame: Frame) -> Frame:
        """A form that may end without text keeps a character back for the end."""
        if frame.code is not None or frame.content_type not in SILENT_FORMS:
            return frame
        text = self._held + frame.text
        self._has_spoken = self._has_spoken or bool(text)
        if frame.is_last:
            return frame._replace(text=text if self._has_spoken else NOTHING)
        self._held = text[-1:]
        return frame._replace(text=text[:-1])


class RollingBatch:
    """The host's list of requests. Everything belongs to the loop's thread."""

    def __init__(self, streams: Streams, dialect: LmiDialect) -> None:
        self._streams = streams
        self._dialect = dialect
        self._codec = Codec(dialect.wire)
        self._answers: list[Answer] = []
        self._news = asyncio.Event()

    @property
    def is_empty(self) -> bool:
        return not self._answers

    async def step(self, inputs: Input) -> Output:
        """The reply to one step: an item for each request, in the host's order."""
        if inputs.get_property("reset_rollingbatch"):
            await self._clear("the host has told so")
        batch = inputs.get_batches()
        keys = [key_of(one) for one in batch]
        if not self._goes_on([hash(key) if key else None for key in keys]):
            await self._clear("the host's list has no place for what it had")
        num_known = len(self._answers)
        self._answers += [self._open(one, hash(key)) for one, key in zip(batch[num_known:], keys[num_known:], strict=True)]
        await self._until_news()
        return self._reply()

    def _goes_on(self, keys: Sequence[int | None]) -> bool:
        """Whether the host's list begins with ours. A body that is sent again is no other request."""
        known = self._answers
        return len(keys) >= len(known) and all(key is None or key == answer.key for key, answer in zip(keys, known, strict=False))

    def _open(self, inputs: Input, key: int) -> Answer:
        seed = inputs.get_as_string("seed") if inputs.contains_key("seed") else ""
        frames = self._streams.frames(inputs, uuid.uuid4().hex, seed=int(seed) if seed else None)
        return Answer(key, frames, self._on_news, self._dialect)

    def _on_news(self) -> None:
        """Behind all that is due in this turn of the loop, so that one step's texts go out together."""
        asyncio.get_running_loop().call_soon(self._news.set)

    async def _until_news(self) -> None:
        """Wait until every body has been read and somebody has something to say, or the host has waited long enough."""
        deadline = asyncio.get_running_loop().time() + HOLD_S
        while not all(answer.has_begun for answer in self._answers) or (
            not any(answer.has_news for answer in self._answers) and asyncio.get_running_loop().time() < deadline
        ):
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), HOLD_S)
            except (TimeoutError, asyncio.TimeoutError):
                continue

    def _reply(self) -> Output:
        output = Output()
        frames = [answer.take() for answer in self._answers]
        for place, frame in enumerate(frames):
            if frame.content_type:
                output.add_property(f"batch_{place}_Content-Type", frame.content_type)
            output.add(frame.map(self._codec), key="data", batch_index=place)
        self._answers = [answer for answer, frame in zip(self._answers, frames, strict=True) if not frame.is_last]
        return output

    async def _clear(self, why: str) -> None:
        if self._answers:
            logger.warning("%d requests are given up: %s", len(self._answers), why)
        await asyncio.gather(*(answer.close() for answer in self._answers))
        self._answers = []
