"""Async mode: one call, one request. The engine runs in a thread of its own; each request is an async generator of reply frames.

Bodies above PARSE_INLINE_BYTES are parsed in an executor, images are read in one; tokenization is the engine's (`Engine.add`) and
happens in the engine's thread between two steps, for at most ADMIT_TIME_S at a time while others are decoding.
"""

import asyncio
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lmi_dist import DeviceError, LmiError, StepError
from lmi_dist_handler import requests, responses
from lmi_dist_handler.formatter import UnavailableError
from lmi_dist_handler.inbox import Inbox
from lmi_dist_handler.model_py import NONE, Functions
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.timings import FIRST_TOKEN_BOUNDS_S, Gaps, Histogram
from lmi_dist_handler.wire import Codec, Input, Output

if TYPE_CHECKING:
    from lmi_dist import Engine, EngineStats, Request
    from lmi_dist import Output as EngineOutput

logger = logging.getLogger(__name__)

PARSE_INLINE_BYTES = 32 * 1024
ADMIT_TIME_S = 0.05
LAST_WORDS_S = 1.0  # to send the answers that tell of a lost GPU
IMAGE_READERS = 2  # requests whose images are read at the same time
MAX_PIECE = 4 * 1024 * 1024  # characters of one frame: at most 16 MiB of UTF-8, below DJL's 20 MiB for a content value


class AbortedError(LmiError):
    """The client has gone, or asked to stop."""

    code = 499


Sink = Callable[[Any], None]  # takes an engine output, or the exception that ended the request


class EngineThread:
    """Owns the engine: builds it, steps it while there is work, sleeps otherwise. Its methods are for the loop's thread."""

    def __init__(self, build: Callable[[], "Engine"], end: Callable[[], object] = lambda: os._exit(1)) -> None:
        """end: ends this process, whose host then starts another."""
        self._build, self._end = build, end
        self._commands: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}  # by request id; touched only by the engine's thread
        self._busy_since: float | None = None
        self._counters: EngineStats | None = None  # once there is an engine
        self._failure: Exception | None = None
        self._gaps = Gaps()

    async def start(self) -> "Engine":
        """Build the engine in its thread. Raises what building it raises."""
        self._loop = asyncio.get_running_loop()
        built: asyncio.Future[Engine] = self._loop.create_future()
        threading.Thread(target=self._run, args=(built,), name="engine", daemon=True).start()
        return await built

    def submit(self, request: "Request", sink: Sink) -> None:
        """Add a request; `sink` is called in the loop's thread with each output, or with the exception that ends it."""
        self._commands.put(lambda engine: self._add(engine, request, sink))
        if self._failure is not None:  # looked at last: else the engine could end in between, unnoticed
            sink(StepError(f"the engine has ended: {self._failure}"))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Free what these requests hold before the next step; an id that has ended is a no-op."""
        ids = tuple(request_ids)
        self._commands.put(lambda engine: self._drop(engine, ids))

    def stats(self) -> dict[str, Any]:
        """The engine's counters as of its last step, and for how long it has been busy with the current one."""
        if self._failure is not None:
            raise StepError(f"the engine has ended: {self._failure}")
        assert self._counters is not None, "asked before the engine was built"
        since = self._busy_since
        busy_s = 0.0 if since is None else time.monotonic() - since
        return {**asdict(self._counters), "busy_s": busy_s, "token_gap_s": self._gaps.histogram.as_dict()}

    def _run(self, built: "asyncio.Future[Engine]") -> None:
        try:
            engine = self._build()
        except Exception as error:  # handed to whoever waits for `start`
            self._loop.call_soon_threadsafe(built.set_exception, error)
            return
        self._counters = engine.stats()
        self._loop.call_soon_threadsafe(built.set_result, engine)
        try:
            while True:
                self._take(engine)
                self._step(engine)
                self._counters = engine.stats()
                self._busy_since = None
        except Exception as error:  # the engine could not go on: nobody may be left waiting
            logger.exception("the engine has ended")
            self._failure = error
            while not self._commands.empty():
                self._commands.get()(engine)
            self._deliver([(sink, error) for sink in self._sinks.values()])
            if isinstance(error, DeviceError):  # a new process may find the GPU well; this one answers first
                self._loop.call_soon_threadsafe(lambda: self._loop.call_later(LAST_WORDS_S, self._end))

    def _take(self, engine: "Engine") -> None:
        """Run the commands that wait. Sleeps for one when the engine has nothing to do."""
        if not engine.has_work:
            command = self._commands.get()
            self._busy_since = time.monotonic()
            command(engine)
        self._busy_since = time.monotonic()
        while not self._commands.empty() and time.monotonic() - self._busy_since < ADMIT_TIME_S:
            self._commands.get()(engine)

    def _step(self, engine: "Engine") -> None:
        if not engine.has_work:
            return
        try:
            outputs = engine.step()
        except DeviceError:
            raise
        except Exception as error:  # of failed forwards step() tells itself; what it raises fails all that runs
            logger.exception("a step failed")
            engine.reset()
            self._deliver([(sink, error) for sink in self._sinks.values()])
            self._sinks.clear()
            return
        self._gaps.note(outputs, time.monotonic())
        self._counters = engine.stats()  # before anybody can have seen the step's outputs
        self._deliver([(self._sinks[output.request_id], output) for output in outputs if output.request_id in self._sinks])

    def _add(self, engine: "Engine", request: "Request", sink: Sink) -> None:
        self._sinks[request.id] = sink
        try:
            engine.add(request)
        except Exception as error:  # this request alone ends, with what it did wrong
            del self._sinks[request.id]
            if not isinstance(error, LmiError):
                logger.exception("request %s could not be added", request.id)
            self._deliver([(sink, error)])

    def _drop(self, engine: "Engine", request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._gaps.forget(request_id)
            if self._sinks.pop(request_id, None) is not None:
                engine.abort(request_id)

    def _deliver(self, items: list[tuple[Sink, Any]]) -> None:
        """Hand a step's outputs over in one call: waking the loop costs a system call."""
        if items:
            self._loop.call_soon_threadsafe(_pour, items)


def _pour(items: list[tuple[Sink, Any]]) -> None:
    for sink, item in items:
        sink(item)


class Feed:
    """What the engine says about one stream's requests, and how far the stream has come."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.has_begun = False  # a token has come
        self.has_spoken = False  # the client has been sent text
        self.inbox: Inbox[EngineOutput | Exception] = Inbox()


class Frame(NamedTuple):
    """One piece of an answer. With a code it is the last, and `text` is the error as this client's dialect writes it."""

    text: str
    content_type: str
    is_last: bool = False
    code: int | None = None
    error: str = ""

    def map(self, codec: Codec) -> bytes:
        """As the map of contract 4.4."""
        values: dict[str, Any] = {"data": self.text, "last": self.is_last}
        if self.code is not None:
            values |= {"code": self.code, "error": self.error}
        return codec.encode_map(values)

    def encode(self, codec: Codec) -> Output:
        output = Output()
        if self.content_type:
            output.add_property("Content-Type", self.content_type)
        output.add(self.map(codec))
        return output


Parser = Callable[[Input, "Engine", HandlerConfig, Functions], requests.Parsed]


class Streams:
    """The requests that are being answered. All methods belong to the loop's thread."""

    def __init__(self, thread: EngineThread, engine: "Engine", config: HandlerConfig, own: Functions = NONE) -> None:
        self._thread = thread
        self._engine = engine
        self._config = config
        self._codec = Codec(config.dialect.wire)
        self._own = own  # called in the loop's thread only: nobody has promised that they may be called at once
        self._feeds: dict[str, Feed] = {}  # by tracking id
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._reading = asyncio.Semaphore(IMAGE_READERS)
        self._first_token = Histogram(FIRST_TOKEN_BOUNDS_S)

    async def answer(self, inputs: Input) -> AsyncIterator[Output]:
        """Frames that answer one request: text as it comes, or one frame with a code. Aborts the request when closed early."""
        async for frame in self.frames(inputs, str(inputs.get_property("request_tracking_id") or uuid.uuid4())):
            if frame.text or frame.is_last:
                yield frame.encode(self._codec)

    async def frames(
        self, inputs: Input, tracking_id: str, parse: Parser = requests.parse_input, seed: int | None = None
    ) -> AsyncIterator[Frame]:
        """The same as frames. The first comes when the body has been read: it tells the content type, or what is wrong. `seed` is
        the host's, for a client that has given none."""
        feed = self._feeds[tracking_id] = Feed()
        self._idle.clear()
        try:
            parsed = await self._parse(inputs, parse)
            if isinstance(parsed, Frame):
                yield parsed
                return
            yield Frame("", parsed.formatter.content_type)
            parsed = parsed if seed is None else parsed.seeded(seed)
            try:
                for request in parsed.requests:
                    self._thread.submit(request, feed.inbox.put)
                while not parsed.formatter.is_done:
                    for frame in self._news(parsed.formatter, await feed.inbox.take_all(), feed):
                        yield frame
            finally:
                self._thread.abort(request.id for request in parsed.requests)  # those that have ended are no-ops
        finally:
            del self._feeds[tracking_id]
            if not self._feeds:
                self._idle.set()

    def abort(self, tracking_id: str) -> bool:
        """End a request that runs; False when there is none of this id."""
        feed = self._feeds.get(tracking_id)
        if feed is not None:
            feed.inbox.put(AbortedError("the request was aborted"))
        return feed is not None

    def stats(self) -> dict[str, Any]:
        return {**self._thread.stats(), "num_streams": len(self._feeds), "first_token_s": self._first_token.as_dict()}

    async def drain(self) -> None:
        """Refuse new requests and wait until the running ones have ended."""
        self._is_draining = True
        await self._idle.wait()

    async def _parse(self, inputs: Input, parse: Parser) -> requests.Parsed | Frame:
        """What a request asks for, or the frame that refuses it."""
        try:
            if self._is_draining:
                raise UnavailableError("the model is being stopped; try again later")
            arguments = (inputs, self._engine, self._config, self._own)
            if len(inputs.get_as_bytes() or b"") <= PARSE_INLINE_BYTES or self._own is not NONE:
                parsed = parse(*arguments)
            else:
                parsed = await asyncio.to_thread(parse, *arguments)
            return await self._read_images(parsed)
        except Exception as error:  # told to this client alone
            told = responses.refusal(inputs.get_properties(), _told(error), self._config.dialect)
            return _failed(told, "application/json")

    async def _read_images(self, parsed: requests.Parsed) -> requests.Parsed:
        """Images are decoded and resized in a thread, apart from the loop's and the engine's; of few requests at a time, since each
        may take as much memory as its pixels do."""
        if not any(request.has_unread_images for request in parsed.requests):
            return parsed
        async with self._reading:
            read = await asyncio.to_thread(lambda: tuple([self._engine.prepare(request) for request in parsed.requests]))
        return replace(parsed, requests=read)

    def _news(self, formatter: responses.Formatter, items: "list[EngineOutput | Exception]", feed: Feed) -> list[Frame]:
        """What these items add to the answer. One that is an error ends it."""
        text, told = "", None
        for item in items:
            try:
                text += formatter.push(self._checked(item, feed))
            except Exception as error:  # told to this client alone
                told = formatter.error(_told(error))
                break
        feed.has_spoken = feed.has_spoken or bool(text)
        frames = [Frame(piece, formatter.content_type) for piece in _pieces(text)]
        if told is not None:
            frames.append(_failed(told, formatter.content_type if feed.has_spoken or told.in_form else "application/json"))
        elif formatter.is_done:
            last = frames.pop() if frames else Frame("", formatter.content_type)
            frames.append(last._replace(is_last=True))
        return frames

    def _checked(self, item: "EngineOutput | Exception", feed: Feed) -> "EngineOutput":
        """The output, or raise what ended the request."""
        if isinstance(item, Exception):
            raise item.with_traceback(None)  # of a failed step all requests share it, and each raise would add to it
        if item.error is not None:
            raise item.error
        if item.tokens and not feed.has_begun:
            feed.has_begun = True
            self._first_token.observe(time.monotonic() - feed.started)
        return item


def _pieces(text: str) -> list[str]:
    return [text[start : start + MAX_PIECE] for start in range(0, len(text), MAX_PIECE)]


def _failed(told: responses.Told, content_type: str) -> Frame:
    if told.in_form:
        return Frame(told.text, content_type, is_last=True)
    return Frame(told.text, content_type, is_last=True, code=told.code, error=told.message)


def _told(error: Exception) -> Exception:
    """The error itself; one that we did not raise on purpose is logged with its traceback."""
    if not isinstance(error, LmiError):
        logger.error("a request failed", exc_info=error)
    return error
