"""An answer in pieces, as HTTP sends it: what becomes of a worker that is lost, one that is silent and a client that leaves."""

import asyncio
import json
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lmi_dist_handler.front import WRITE, ClientGoneError, refuse
from lmi_dist_handler.group import Piece, Stream, WorkerLostError
from lmi_dist_handler.metrics import Metrics


class Streamed(Response):
    """An answer in pieces, whose status and headers are those of the first. A client that leaves ends it."""

    def __init__(self, first: Piece, stream: Stream, watcher: "asyncio.Task[None]", metrics: Metrics, *, timeout_s: float) -> None:
        super().__init__(None, first.code or 200, dict(first.headers))
        del self.headers["content-length"]  # so that the server sends chunks
        self._first = first
        self._stream = stream
        self._watcher = watcher
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._waiting_since: float | None = None  # for the worker's next piece

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._mind_silence()
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            write = scope.get("extensions", {}).get(WRITE, refuse)
            # a task of its own: else each piece would wake all that has been called up to here
            await asyncio.create_task(self._send_pieces(write, send))
        except ClientGoneError:
            self._metrics.client_gone()
        finally:
            self._timer.cancel()
            self._watcher.cancel()
            self._stream.close()

    async def _send_pieces(self, write: Callable[[bytes], bool], send: Send) -> None:
        piece = self._first
        while not piece.is_last:
            data = piece.text.encode()
            if not write(data):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            piece = await self._next()
        data = (piece.text or self._failure(piece)).encode()
        await send({"type": "http.response.body", "body": data, "more_body": False})

    async def _next(self) -> Piece:
        """The next piece. A worker that is lost or silent gives an error: the status has been sent already."""
        self._waiting_since = self._loop.time()
        try:
            return await self._stream.piece()
        except WorkerLostError as error:
            return Piece("", True, error.code, str(error))
        finally:
            self._waiting_since = None

    def _mind_silence(self) -> None:
        """Interrupt the wait for a piece once it has lasted too long. One timer sees to all of them: each would cost more than the
        wait itself."""
        now = self._loop.time()
        rest_s = self._timeout_s if self._waiting_since is None else self._waiting_since + self._timeout_s - now
        if rest_s <= 0:
            self._stream.interrupt(WorkerLostError(f"no more text came within chunked_read_timeout={self._timeout_s:g} s"))
            rest_s = self._timeout_s
        self._timer = self._loop.call_later(rest_s, self._mind_silence)

    def _failure(self, piece: Piece) -> str:
        """An error that nobody has put into the stream's form yet."""
        if piece.code is None:
            return ""
        line = json.dumps({"error": piece.error, "code": piece.code}, ensure_ascii=False)
        return f"data: {line}\n\n" if "event-stream" in self.headers.get("content-type", "") else f"{line}\n"
