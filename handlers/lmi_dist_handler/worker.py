"""The worker's end of the socket: what a host starts with DJL's arguments, in async mode (djl-contract 1.6, 1.7, 1.11, 2.7).

One thread receives, an asyncio loop calls the entry point and sends. The receiving thread ends the process at EOF, whatever the
loop is doing. Knows nothing of models: any module with an async `handle(inputs)` can be the entry point.
"""

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO

from lmi_dist_handler.launcher import lock_pid
from lmi_dist_handler.wire import Codec, Disconnected, Input, Output, WireError, read
from lmi_dist_handler.worker_log import START_MARKER

logger = logging.getLogger(__name__)

TRACKING_ID = "request_tracking_id"
ACCEPT_TIMEOUT_S = 30.0
DEFAULT_ENTRY_POINT = "lmi_dist_handler"
PORTION_BYTES = 8192  # of a step's replies: the host is at work on them while the others are being written


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """DJL's arguments; those of other versions are ignored. Raises ValueError as DJL's worker does."""
    parser = argparse.ArgumentParser(prog="lmi_dist_handler.worker", allow_abbrev=False)
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--entry-point", default="")
    parser.add_argument("--recommended-entry-point", default="")
    parser.add_argument("--sock-type", required=True)
    parser.add_argument("--sock-name", default=None)
    parser.add_argument("--port", type=int, default=None)
    parser.add_argument("--device-id", default="-1")
    parser.add_argument("--tensor-parallel-degree", type=int, default=None)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--djl-version", type=int, default=27, help="26: 16-bit text lengths on the wire")
    arguments, ignored = parser.parse_known_args(argv)
    if arguments.sock_type not in ("unix", "tcp"):
        raise ValueError(f"Invalid socket-type: {arguments.sock_type}.")
    if arguments.sock_type == "unix" and arguments.sock_name is None:
        raise ValueError("Missing sock-name argument.")
    if arguments.sock_type == "tcp" and arguments.port is None:
        raise ValueError("Missing port argument.")
    if ignored:
        logger.debug("ignored arguments: %s", " ".join(ignored))
    return arguments


def take_rank() -> int | None:
    """This process's rank under mpirun, else None. Tells the three numbers also by the names that other libraries know (1.8)."""
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK"):
        if f"OMPI_COMM_WORLD_{name}" in os.environ:
            os.environ[name] = os.environ[f"OMPI_COMM_WORLD_{name}"]
    return int(os.environ["RANK"]) if "OMPI_COMM_WORLD_RANK" in os.environ else None


class Endpoint:
    """Where the worker listens, each rank at its own place; for a Unix socket also the pid file by which hosts find a worker that
    was left behind. The file is locked as long as the worker lives (launcher.py)."""

    def __init__(self, arguments: argparse.Namespace, rank: int | None) -> None:
        suffix = "" if rank is None else f".{rank}"
        self._path = Path(f"{arguments.sock_name}{suffix}") if arguments.sock_type == "unix" else None
        self._address = (arguments.sock_name or "127.0.0.1", (arguments.port or 0) + (rank or 0))
        self._pid_file: TextIO | None = None

    @property
    def _pid_path(self) -> Path | None:
        return self._path.with_name(self._path.name + ".pid") if self._path else None

    def listen(self) -> socket.socket:
        """A listening socket. Kills the worker that holds the path, writes the pid file."""
        if self._path is None or self._pid_path is None:
            return socket.create_server(self._address, backlog=128)
        _kill_stale(self._pid_path)
        self._pid_file = lock_pid(self._pid_path)
        self._path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(self._path))
        server.listen(128)
        return server

    def remove(self) -> None:
        for path in (self._path, self._pid_path):
            if path is not None:
                path.unlink(missing_ok=True)


def _kill_stale(pid_path: Path) -> None:
    if pid_path.exists():
        first_line = pid_path.read_text().partition("\n")[0].strip()
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(first_line), signal.SIGKILL)


def load_entry_point(name: str, model_dir: Path) -> ModuleType:
    """The module that `name` means: a file of the model folder (`*.py`), an absolute path, or a dotted name."""
    if not name.endswith(".py") and not os.path.isabs(name):
        return importlib.import_module(name)
    path = model_dir / name  # an absolute name wins over the folder
    if not path.is_file():
        raise ValueError(f"entry-point file not found {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"entry-point file {path} is no Python module")
    sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def failure(error: Exception) -> Output:
    """The reply for an exception that left a handler (djl-contract 2.6)."""
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return Output(507, str(error))
    return Output().error(str(error), message="service.invoke_handler_async() failure")


class Connection:
    """Serves one connection until it ends. `on_end` is called once, on the receiving thread."""

    def __init__(
        self, module: ModuleType, connection: socket.socket, *, codec: Codec, extra: dict[str, Any], on_end: Callable[[], object]
    ) -> None:
        self._module = module
        self._connection = connection
        self._codec = codec
        self._extra = extra  # properties that the worker inserts into every request
        self._on_end = on_end
        self._unsent = bytearray()
        self._replies: list[Output] = []  # whose bytes are among these
        self._is_flushing = False  # `_flush` is going to be called
        self._is_stuck = False  # by the loop, once the host takes more
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> NoReturn:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._receive, args=(loop,), name="receive", daemon=True).start()
        await loop.create_future()  # forever: the receiving thread decides when it is over
        raise AssertionError("nobody resolves this future")

    def _receive(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            with self._connection.makefile("rb") as stream:
                while True:
                    request = read(self._codec.request, stream)
                    loop.call_soon_threadsafe(self._dispatch, request)
        except (Disconnected, OSError) as error:
            logger.info("the host has closed the connection: %s", error)
        except WireError:
            logger.exception("the host sent bytes that are no request")
        finally:
            self._on_end()

    def _dispatch(self, request: Input) -> None:
        request.properties.update(self._extra)
        task = asyncio.get_running_loop().create_task(self._answer(request))
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: Input) -> None:
        tracking_id = request.get_property(TRACKING_ID)
        try:
            result = getattr(self._module, request.function_name or "handle")(request)
            if inspect.isawaitable(result):
                result = await result
            if hasattr(result, "__aiter__"):
                async for reply in result:
                    self._reply(reply, tracking_id)
            elif result is None:
                self._reply(Output(204, "No content"), tracking_id)
            elif isinstance(result, Output):
                self._reply(result, tracking_id)
            else:
                self._reply(Output().error(f"Invalid output type: {type(result)}"), tracking_id)
        except Exception as error:  # the protocol's duty: whatever happened, this request gets a reply
            logger.exception("handler %s failed", request.function_name)
            self._reply(failure(error), tracking_id)

    def _reply(self, reply: Output, tracking_id: str | None) -> None:
        if tracking_id is not None:
            reply.add_property(TRACKING_ID, tracking_id)
        self._unsent += b"".join(self._codec.encode_response(reply))
        self._replies.append(reply)
        if not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)
        elif not self._is_stuck and len(self._unsent) >= PORTION_BYTES:
            self._send()

    def _flush(self) -> None:
        """Send what a round of the loop gave, such as a step's tokens; what the host does not take yet, once it does."""
        loop = asyncio.get_running_loop()
        self._send()
        if self._unsent and not self._is_stuck:
            loop.add_writer(self._connection, self._flush)
        elif self._is_stuck and not self._unsent:
            loop.remove_writer(self._connection)
        self._is_stuck = self._is_flushing = bool(self._unsent)

    def _send(self) -> None:
        try:
            del self._unsent[: self._connection.send(self._unsent, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            return
        except OSError as error:
            logger.info("the host reads no more: %s", error)  # the receiving thread sees the same end
            self._unsent.clear()
        if not self._unsent:
            replies, self._replies = self._replies, []
            for reply in replies:
                reply.finish()


def run(arguments: argparse.Namespace) -> NoReturn:
    """Serve one host. Ends the process with status 1, as DJL's worker does, once the host has gone."""
    rank = take_rank()
    model_dir = Path(arguments.model_dir).absolute()
    if model_dir.is_dir():
        os.chdir(model_dir)
    module = load_entry_point(arguments.entry_point or arguments.recommended_entry_point or DEFAULT_ENTRY_POINT, model_dir)
    endpoint = Endpoint(arguments, rank)

    def end() -> NoReturn:
        endpoint.remove()  # first: flushing a broken stdout may raise (djl-contract 1.14)
        os._exit(1)  # not sys.exit: a thread may be inside a kernel for long

    with endpoint.listen() as server:
        logger.info(START_MARKER)
        connection = _accept(server, end)
    extra: dict[str, Any] = {"model_dir": str(model_dir), "device_id": arguments.device_id}
    if arguments.tensor_parallel_degree is not None:
        extra["tensor_parallel_degree"] = arguments.tensor_parallel_degree
    served = Connection(module, connection, codec=Codec(arguments.djl_version), extra=extra, on_end=end)
    asyncio.run(served.serve())
    end()


def _accept(server: socket.socket, end: Callable[[], NoReturn]) -> socket.socket:
    server.settimeout(ACCEPT_TIMEOUT_S)
    try:
        connection, _ = server.accept()
    except TimeoutError:
        logger.error("no host has connected within %g s", ACCEPT_TIMEOUT_S)
        end()
    connection.settimeout(None)
    return connection


def main() -> NoReturn:
    arguments = parse_arguments(sys.argv[1:])
    level = logging.DEBUG if arguments.log_level == "debug" else logging.INFO
    logging.basicConfig(stream=sys.stdout, level=level, format="%(levelname)s::%(message)s", force=True)
    run(arguments)


if __name__ == "__main__":
    main()
