"""One life of a model's worker, seen from the host: its process group, its socket and the requests on it (djl-contract 1.6-1.13).

A Group is never restarted, only replaced (host.py). Everything here belongs to the event loop's thread; no torch in this process.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmi_dist import ConfigError, LmiError
from lmi_dist_handler.wire import Codec, Disconnected, Input, Output, PairList, WireError, read_async

logger = logging.getLogger(__name__)
worker_logger = logging.getLogger("lmi_dist_handler.worker")  # what workers print

START_MARKER = "Python engine started."
START_TIMEOUT_S = 120.0  # imports only: the model is loaded by the init request
EXIT_GRACE_S = 2.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MAX_SOCKET_PATH = 107  # bytes, of sockaddr_un
PROGRESS_INTERVAL_S = 1.0
LEVELS = {name: getattr(logging, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}


class WorkerLostError(LmiError):
    """The worker ended, or stopped answering, before it had answered; another try may succeed."""

    code = 503


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. With a code it is the last, and `text` the error in the client's dialect ("" when nobody wrote one)."""

    text: str
    is_last: bool
    code: int | None = None
    error: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class Stream:
    """The replies to one request. Close it (or leave its `with`) and the worker frees what the request holds."""

    def __init__(self, group: "Group", tracking_id: str) -> None:
        self._group = group
        self._tracking_id = tracking_id
        self._replies: asyncio.Queue[Output | LmiError] = asyncio.Queue()
        self._is_open = True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def put(self, reply: Output | LmiError) -> None:
        self._replies.put_nowait(reply)

    def interrupt(self, error: LmiError) -> None:
        """Make whoever waits for the next reply get `error` now."""
        self._replies.put_nowait(error)

    async def reply(self) -> Output:
        """The next reply. Raises WorkerLostError when the worker has ended."""
        item = await self._replies.get()
        if isinstance(item, LmiError):
            raise item
        return item

    async def piece(self) -> Piece:
        """The next part of the answer; errors of the worker are pieces too."""
        piece = self._group.piece(await self.reply())
        if piece.is_last:
            self._finish()
        return piece

    def close(self) -> None:
        """Forget the request, and tell the worker to, if it may still be running."""
        if self._is_open:
            self._finish()
            self._group.abort(self._tracking_id)

    def _finish(self) -> None:
        self._is_open = False
        self._group.forget(self._tracking_id)


class Group:
    """The worker's process group and connection. `died` is done, with the reason, once it is of no use any more."""

    def __init__(self, name: str, model_dir: Path | None, entry_point: str, environment: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._environment = environment  # of its processes; None: the server's
        self._model_dir = model_dir
        self._entry_point = entry_point
        self._codec = Codec()
        self._streams: dict[str, Stream] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._last_lines: deque[str] = deque(maxlen=5)
        self._started = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._folder: Path | None = None
        self.num_opened = 0
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    async def start(self) -> None:
        """Start the worker and connect to it. Raises WorkerLostError when it does not come up."""
        self._folder = Path(tempfile.mkdtemp(prefix="lmi-dist-"))  # private: nobody else can connect
        path = self._folder / "djl_sock.0"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise ConfigError(f"{path} is too long for a socket; set TMPDIR to a shorter folder")
        await self._spawn(path)
        await self._until_started()
        reader, self._writer = await asyncio.open_unix_connection(str(path))
        self._task(self._receive(reader))

    async def _spawn(self, path: Path) -> None:
        model_dir = str(self._model_dir or self._folder)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lmi_dist_handler.worker", "--sock-type", "unix", "--sock-name", str(path)),
            *("--model-dir", model_dir, "--entry-point", self._entry_point, "--device-id", "-1", "--async-mode"),
            env=self._environment,
            cwd=self._folder,  # -m imports from it first; the worker itself goes to the model's folder later
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # a group of its own, and deaf to the terminal's Ctrl-C
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._task(self._read_log(self._process.stdout, "stdout", logging.INFO))
        self._task(self._read_log(self._process.stderr, "stderr", logging.WARNING))
        self._task(self._wait_for_exit(self._process))

    async def _until_started(self) -> None:
        self.died.add_done_callback(lambda _: self._started.set())
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._started.wait(), START_TIMEOUT_S)
        if self.died.done():
            raise WorkerLostError(self.died.result())
        if not self._started.is_set():
            raise WorkerLostError(f"the worker of model {self._name} did not start within {START_TIMEOUT_S:g} s")

    def open(self, properties: Mapping[str, str], content: PairList, handler: str = "handle") -> Stream:
        """Send a request; its replies come out of the stream."""
        if self.died.done() or self._writer is None:
            raise WorkerLostError(self.died.result() if self.died.done() else "the worker is not connected")
        tracking_id = str(uuid.uuid4())
        request = Input({**properties, "handler": handler, "request_tracking_id": tracking_id}, content)
        self._writer.write(self._codec.encode_request(request))
        stream = self._streams[tracking_id] = Stream(self, tracking_id)
        self.num_opened += handler == "handle"
        return stream

    async def call(self, handler: str, properties: Mapping[str, str], timeout_s: float) -> Output:
        """One request, one reply. Raises TimeoutError, WorkerLostError."""
        stream = self.open(properties, PairList(), handler)
        try:
            return await asyncio.wait_for(stream.reply(), timeout_s)
        finally:
            stream._finish()

    async def stats(self, timeout_s: float) -> dict[str, Any]:
        """Counters of the engine. Raises TimeoutError, WorkerLostError."""
        reply = await self.call("stats", {}, timeout_s)
        if reply.code != 200:
            raise WorkerLostError(f"the worker of model {self._name} could not tell its state: {reply.message}")
        values: dict[str, Any] = json.loads(reply.content.value_at(0))
        return values

    def abort(self, tracking_id: str) -> None:
        """Tell the worker that nobody wants this answer any more; its reply to that is of no interest."""
        if not self.died.done():
            self.open({"abort_tracking_id": tracking_id}, PairList(), "abort")._finish()

    def forget(self, tracking_id: str) -> None:
        self._streams.pop(tracking_id, None)

    def piece(self, reply: Output) -> Piece:
        """What a reply says (djl-contract 2.7)."""
        headers = {key: value for key, value in reply.properties.items() if key != "request_tracking_id"}
        if reply.code != 200 or reply.content.is_empty():
            return Piece("", True, reply.code if reply.code >= 300 else 500, _message(reply), headers)
        values = self._codec.decode_map(reply.content.value_at(0))
        code = int(values["code"]) if "code" in values else None
        is_last = values["last"].lower() == "true" or code is not None
        return Piece(values["data"], is_last, code, values.get("error", ""), headers)

    @property
    def resident_bytes(self) -> int:
        """Memory that the worker's process holds now; 0 when there is none."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES
        except (FileNotFoundError, ProcessLookupError):
            return 0

    def die(self, reason: str, hint: str = "; it is being restarted, try again") -> None:
        """Give this worker up: whoever waits gets an error now. The processes are `kill`'s to end."""
        if self.died.done():
            return
        self.died.set_result(reason)
        error = WorkerLostError(reason + hint)
        for stream in self._streams.values():
            stream.interrupt(error)

    async def kill(self) -> None:
        """End the whole process group and remove its files. A worker that listens gets EXIT_GRACE_S to end by itself.
        To be called again when it was cancelled."""
        if self._folder is None:
            return  # never started, or over already
        is_stuck = self.died.done()
        self.die(f"the worker of model {self._name} was stopped", hint="")
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            if self._writer is not None and not is_stuck:
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._process.wait(), EXIT_GRACE_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what the worker has started too
            await self._process.wait()
        if self._tasks:  # they see the end of their streams, which also closes these
            await asyncio.wait(self._tasks, timeout=EXIT_GRACE_S)
        for task in self._tasks:
            task.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                reply = await read_async(self._codec.response(), reader)
                stream = self._streams.get(reply.get_property("request_tracking_id") or "")
                if stream is not None:  # else somebody has lost interest
                    stream.put(reply)
        except (Disconnected, OSError):
            assert self._process is not None
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # its exit status tells more than the end of its socket
                await asyncio.wait_for(asyncio.shield(self._process.wait()), 0.5)
            self.die(f"the worker of model {self._name} closed its connection")
        except WireError as error:
            self.die(f"the worker of model {self._name} sent bytes that are no reply: {error}")

    async def _wait_for_exit(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        last_words = "" if self._writer is not None else "".join(f"; {line}" for line in list(self._last_lines)[-1:])
        self.die(f"the worker of model {self._name} {how}{last_words}")

    async def _read_log(self, stream: asyncio.StreamReader, which: str, level: int) -> None:
        """Log the worker's lines. A progress bar ends its states with a carriage return: of those, one a second."""
        rest, last_progress = b"", 0.0
        while data := await stream.read(65536):
            *lines, rest = re.split(rb"(?<=[\r\n])", rest + data)
            for line in lines:
                is_progress = line.endswith(b"\r")
                if is_progress and time.monotonic() - last_progress < PROGRESS_INTERVAL_S:
                    continue
                last_progress = time.monotonic() if is_progress else last_progress
                self._log(line.decode(errors="replace").strip(), which, level)
        self._log(rest.decode(errors="replace").strip(), which, level)

    def _log(self, line: str, which: str, level: int) -> None:
        if not line:
            return
        self._last_lines.append(line)
        if START_MARKER in line:
            self._started.set()
        word, separator, message = line.partition("::")
        if separator and word in LEVELS:
            level, line = LEVELS[word], message
        worker_logger.log(level, "W-%s-%s-%s %s", self.pid, self._name[:15], which, line)


def _message(reply: Output) -> str:
    """The full text of an error reply: the worker's JSON has it, the status line may not."""
    data = b"" if reply.content.is_empty() else reply.content.value_at(0)
    with contextlib.suppress(ValueError):
        error = json.loads(data).get("error") if data else None
        if error:
            return str(error)
    return reply.message
