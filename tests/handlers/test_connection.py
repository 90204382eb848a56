"""handlers/lmi_dist_handler/connection.py: time limits of a real socket, with an application made for the test behind uvicorn.

What clients are told is in tests/end_to_end/test_bad_input.py."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from lmi_dist_handler.connection import connections
from lmi_dist_handler.front import WRITE, refuse
from lmi_dist_handler.metrics import Metrics

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
PIECE = b"x" * 65536
LIMIT_S = 0.2


class Pieces:
    """Answers in pieces by the extension where there is one."""

    def __init__(self) -> None:
        self.taken: list[bool] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"a", b"", b"b" * 20):
            self.taken.append(scope.get("extensions", {}).get(WRITE, refuse)(piece))
            if not self.taken[-1]:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"c", "more_body": False})


class Endless:
    """Answers without end, until its client has gone."""

    def __init__(self, num_pieces: int | None = None) -> None:
        self.num_sent = 0
        self.ended = asyncio.Event()
        self._num_pieces = num_pieces

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone = asyncio.create_task(self._watch(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done() and self.num_sent != self._num_pieces:
            self.num_sent += 1
            await send({"type": "http.response.body", "body": PIECE, "more_body": self.num_sent != self._num_pieces})
            await asyncio.sleep(0)
        gone.cancel()
        self.ended.set()

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


def serve(app: Any, talk: Callable[[socket.socket, uvicorn.Server], Awaitable[None]], request: bytes = REQUEST) -> None:
    """The application on a socket, and a client with a small buffer that has sent one request."""

    async def main() -> None:
        protocol: Any = connections(Metrics(), read_timeout_s=LIMIT_S, write_timeout_s=LIMIT_S)
        server = uvicorn.Server(uvicorn.Config(app, http=protocol, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
        listener = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.001)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, listener.getsockname())
            await asyncio.get_running_loop().sock_sendall(client, request)
            await asyncio.wait_for(talk(client, server), 20)
        server.should_exit = True
        await serving

    asyncio.run(main())


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("request_line", "taken", "body"),
    [
        (b"GET / HTTP/1.1", [True, False, True], b"1\r\na\r\n14\r\n" + b"b" * 20 + b"\r\n1\r\nc\r\n0\r\n\r\n"),
        (b"GET / HTTP/1.0", [False, False, False], b"a" + b"b" * 20 + b"c"),  # it knows no chunks
    ],
)
def test_pieces_are_chunks_where_there_are_any(request_line: bytes, taken: list[bool], body: bytes) -> None:
    app, got = Pieces(), b""

    async def talk(client: socket.socket, server: uvicorn.Server) -> None:
        nonlocal got
        while data := await asyncio.get_running_loop().sock_recv(client, 65536):
            got += data

    serve(app, talk, request_line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert (app.taken, got.partition(b"\r\n\r\n")[2]) == (taken, body)


def test_client_that_never_reads_is_cut_off() -> None:
    async def talk(client: socket.socket, server: uvicorn.Server) -> None:
        await app.ended.wait()
        await until(lambda: not server.server_state.connections)

    app = Endless()
    serve(app, talk)


def test_unread_rest_of_an_answer_is_not_kept_for_ever() -> None:
    async def talk(client: socket.socket, server: uvicorn.Server) -> None:
        await app.ended.wait()
        await until(lambda: not server.server_state.connections)

    app = Endless(100)  # more than the kernel's buffers take
    serve(app, talk)


def test_slow_reader_is_left_alone() -> None:
    """Judged by a trial in which the reader was no slower than it meant to be: a busy machine may keep it from its turn."""
    app, size, longest_s = Endless(100), 0, 0.0

    async def talk(client: socket.socket, server: uvicorn.Server) -> None:
        nonlocal size, longest_s
        loop, read_at = asyncio.get_running_loop(), time.monotonic()
        while size < 100 * len(PIECE):
            try:
                data = await loop.sock_recv(client, 65536 if loop.time() < slow_until else 1 << 20)
            except ConnectionResetError:
                data = b""
            longest_s, read_at = max(longest_s, time.monotonic() - read_at), time.monotonic()
            size += len(data)
            if not data:
                return
            await asyncio.sleep(0.02 if loop.time() < slow_until else 0)

    for _ in range(20):
        app, size, longest_s, slow_until = Endless(100), 0, 0.0, time.monotonic() + 3 * LIMIT_S
        serve(app, talk)
        if longest_s < LIMIT_S / 2:
            break

    assert longest_s < LIMIT_S / 2, "the machine is too busy to tell"
    assert size >= 100 * len(PIECE)
    assert app.ended.is_set()
