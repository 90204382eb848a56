"""A client's connection: uvicorn's HTTP/1.1 with limits of time, and with errors in the words of every other answer.

What uvicorn leaves open: headers that never end, a client that never reads, and refusals in plain text without a log line.
"""

import asyncio
import fcntl
import struct
import sys
import termios
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from lmi_dist_handler.front import LONG_HEADERS, WRITE, HttpError, logger, refusal
from lmi_dist_handler.metrics import Metrics


class Connection(H11Protocol):
    """One TCP connection, from its first byte to its last."""

    def __init__(self, *given: Any, metrics: Metrics, read_timeout_s: float, write_timeout_s: float, **more: Any) -> None:
        super().__init__(*given, **more)
        self._metrics = metrics
        self._read_timeout_s = read_timeout_s
        self._write_timeout_s = write_timeout_s
        self._header_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._mind_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._header_timer)
        self._header_timer = None
        _stop(self._unread_timer)
        self._unread_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._mind_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._mind_unread()

    def resume_writing(self) -> None:
        _stop(self._unread_timer)
        self._unread_timer = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._mind_unread()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is no HTTP; called while h11's exception is handled, which knows more."""
        error = sys.exc_info()[1]
        code = getattr(error, "error_status_hint", 400)
        self._refuse(code, LONG_HEADERS if code == 431 else f"the request is not valid HTTP/1.1: {error or msg}")

    def handle_events(self) -> None:
        super().handle_events()
        if self.scope is not None and self.scope["http_version"] == "1.1":  # before it an answer has no chunks
            self.scope.setdefault("extensions", {})[WRITE] = self._write  # type: ignore[assignment]  # uvicorn has none

    # ---- its parts ----

    def _write(self, piece: bytes) -> bool:
        """Send a piece of a body that comes in chunks. Not while too many wait for the client, which is `send`'s to await."""
        is_taken = bool(piece) and not self.flow.write_paused and not self.cycle.disconnected
        if is_taken:
            self.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return is_taken

    def _mind_headers(self) -> None:
        """Headers have a time limit from the first byte of the connection, or of a later request, to their end."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            _stop(self._header_timer)
            self._header_timer = None
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self._read_timeout_s, self._on_slow_headers)

    def _on_slow_headers(self) -> None:
        self._header_timer = None
        self._refuse(408, f"the request's headers must come within read_timeout={self._read_timeout_s:g} s")

    def _mind_unread(self) -> None:
        if self._unread_timer is None and self.transport.get_write_buffer_size():
            self._unread_timer = self.loop.call_later(self._write_timeout_s, self._on_unread, self._num_unread())

    def _on_unread(self, size_before: int) -> None:
        """A client that has taken nothing of what waits for it is cut off, which also aborts its request."""
        self._unread_timer = None
        if self._num_unread() < size_before:
            self._mind_unread()
            return
        logger.warning("%s has read nothing for write_timeout=%g s; its connection is cut", self._client(), self._write_timeout_s)
        self.transport.abort()

    def _num_unread(self) -> int:
        """Bytes that wait for the client: ours, and the kernel's, which takes from ours in large portions."""
        connection = self.transport.get_extra_info("socket")
        of_kernel = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return self.transport.get_write_buffer_size() + int(of_kernel)

    def _refuse(self, code: int, message: str) -> None:
        """Answer what never became a request, or whose body broke off, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            scope = self.scope if self.conn.our_state is h11.SEND_RESPONSE else {"path": ""}
            answer = refusal(scope, HttpError(code, message))  # type: ignore[arg-type]  # it looks at the path only
            headers = [*answer.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=code, headers=headers, reason=STATUS_PHRASES[code]),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self._metrics.answered("invalid", code, 0.0)
        logger.info('%s "-" %d %s', self._client(), code, message)
        self.transport.close()
        self._mind_unread()

    def _client(self) -> str:
        return self.client[0] if self.client else "-"


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def connections(metrics: Metrics, *, read_timeout_s: float, write_timeout_s: float) -> Callable[..., Connection]:
    """What uvicorn calls for each connection."""

    def make(*given: Any, **more: Any) -> Connection:
        return Connection(*given, metrics=metrics, read_timeout_s=read_timeout_s, write_timeout_s=write_timeout_s, **more)

    return make
