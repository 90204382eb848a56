"""An answer in pieces, as HTTP sends it: what becomes of a worker that is lost, one that is silent and a client that leaves."""

import asyncio
import json

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lmi_dist_handler.front import ClientGoneError
from lmi_dist_handler.group import Piece, Stream, WorkerLostError
from lmi_dist_handler.metrics import Metrics


class Streamed(Response):
    """An answer in pieces, whose status and headers are those of the first. A client that leaves ends it."""

    def __init__(self, first: Piece, stream: Stream, watcher: "asyncio.Task[None]", metrics: Metrics, *, timeout_s: float) -> None:
        super().__init__(None, first.code or 200, dict(first.headers))
        del self.headers["content-length"]  # so that the server sends chunks
        self._piece = first
        self._stream = stream
        self._watcher = watcher
        self._metrics = metrics
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while not self._piece.is_last:
                await self._send(send, self._piece.text)
                self._piece = await self._next()
            await self._send(send, self._piece.text or self._failure(self._piece), is_last=True)
        except ClientGoneError:
            self._metrics.client_gone()
        finally:
            self._watcher.cancel()
            self._stream.close()

    async def _send(self, send: Send, text: str, is_last: bool = False) -> None:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": not is_last})

    async def _next(self) -> Piece:
        """The next piece. A worker that is lost or silent gives an error: the status has been sent already."""
        silent = WorkerLostError(f"no more text came within chunked_read_timeout={self._timeout_s:g} s")
        timer = asyncio.get_running_loop().call_later(self._timeout_s, self._stream.interrupt, silent)
        try:
            return await self._stream.piece()
        except WorkerLostError as error:
            return Piece("", True, error.code, str(error))
        finally:
            timer.cancel()

    def _failure(self, piece: Piece) -> str:
        """An error that nobody has put into the stream's form yet."""
        if piece.code is None:
            return ""
        line = json.dumps({"error": piece.error, "code": piece.code}, ensure_ascii=False)
        return f"data: {line}\n\n" if "event-stream" in self.headers.get("content-type", "") else f"{line}\n"
