"""One life of a model's ranks, seen from the host: their processes, their sockets and the requests on them (djl-contract 1.6-1.13).

A Group is never restarted, only replaced (host.py). Everything here belongs to the event loop's thread; no torch in this process.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmi_dist import LmiError
from lmi_dist_handler.inbox import Inbox
from lmi_dist_handler.launcher import GroupFolder, Launch, end_workers, living_pids
from lmi_dist_handler.wire import Codec, Disconnected, Input, Output, PairList, WireError, messages
from lmi_dist_handler.worker_log import WorkerLog

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0  # imports only: the model is loaded by the init request
EXIT_GRACE_S = 2.0
KILL_GRACE_S = 10.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
VALID_SIGNALS = frozenset(signal.valid_signals())


class WorkerLostError(LmiError):
    """The worker ended, or stopped answering, before it had answered; another try may succeed."""

    code = 503


class Piece(NamedTuple):
    """A part of an answer. With a code it is the last, and `text` the error in the client's dialect ("" when nobody wrote one)."""

    text: str
    is_last: bool
    code: int | None = None
    error: str = ""
    headers: Mapping[str, str] = {}


class Stream:
    """The replies to one request. Close it (or leave its `with`) and the worker frees what the request holds."""

    def __init__(self, group: "Group", tracking_id: str) -> None:
        self._group = group
        self._tracking_id = tracking_id
        self._replies: Inbox[Output | LmiError] = Inbox()
        self._is_open = True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def interrupt(self, error: LmiError) -> None:
        """Make whoever waits for the next reply get `error`."""
        self._replies.put(error)

    def put(self, reply: Output) -> None:
        self._replies.put(reply)

    async def reply(self) -> Output:
        """The next reply. Raises WorkerLostError when the worker has ended."""
        item = await self._replies.take()
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
    """Some ranks' processes and connections. `died` is done, with the reason, once it is of no use any more."""

    def __init__(self, name: str, launch: Launch) -> None:
        self._name = name
        self._launch = launch
        self._codec = Codec()
        self._streams: dict[str, Stream] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._log = WorkerLog(name, launch.num_ranks)
        self._process: asyncio.subprocess.Process | None = None
        self._writers: list[asyncio.StreamWriter] = []  # by rank
        self._folder: GroupFolder | None = None
        self.pids: list[int] = []  # by rank, once they have started
        self.num_opened = 0
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    async def start(self) -> None:
        """Start the ranks and connect to each. Raises WorkerLostError when they do not come up, ConfigError when they cannot."""
        self._folder = GroupFolder()
        paths = self._launch.sockets(self._folder.path)
        await self._spawn(self._launch.command(self._folder.path), self._folder.path)
        await self._until_started()
        self.pids = living_pids(self._folder.path)
        for rank, path in enumerate(paths):
            reader, writer = await self._connect(path)
            self._writers.append(writer)
            self._task(self._receive(rank, reader))

    async def _spawn(self, command: Sequence[str], folder: Path) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *command,
            env=self._launch.environment,
            cwd=folder,  # -m imports from it first; a worker itself goes to the model's folder later
            stdin=asyncio.subprocess.PIPE,  # closing it ends all
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # a group of its own, and deaf to the terminal's Ctrl-C
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._task(self._log.read(self._process.stdout, self._process.pid, "stdout", logging.INFO))
        self._task(self._log.read(self._process.stderr, self._process.pid, "stderr", logging.WARNING))
        self._task(self._wait_for_exit(self._process))

    async def _until_started(self) -> None:
        self.died.add_done_callback(lambda _: self._log.started.set())
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._log.started.wait(), START_TIMEOUT_S)
        if self.died.done():
            raise WorkerLostError(self.died.result())
        if not self._log.started.is_set():
            raise WorkerLostError(f"the worker of model {self._name} did not start within {START_TIMEOUT_S:g} s")

    async def _connect(self, path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_unix_connection(str(path))
        except OSError as error:
            raise WorkerLostError(f"the worker of model {self._name} cannot be reached: {error}") from None

    async def load(self, properties: Mapping[str, str], timeout_s: float) -> Output:
        """Have every rank load the model. Returns the first reply with an error, else rank 0's. Raises as `call` does."""
        calls = [asyncio.create_task(self.call("handle", properties, timeout_s, rank=rank)) for rank in range(len(self._writers))]
        try:
            for call in asyncio.as_completed(calls):
                reply = await call
                if reply.code >= 300:
                    return reply
            return calls[0].result()
        finally:
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    def open(self, properties: Mapping[str, str], content: PairList, handler: str = "handle", *, rank: int = 0) -> Stream:
        """Send a request to a rank; its replies come out of the stream. Raises WorkerLostError."""
        if self.died.done() or not self._writers:
            raise WorkerLostError(self.died.result() if self.died.done() else "the worker is not connected")
        tracking_id = str(uuid.uuid4())
        request = Input({**properties, "handler": handler, "request_tracking_id": tracking_id}, content)
        self._writers[rank].write(self._codec.encode_request(request))
        stream = self._streams[tracking_id] = Stream(self, tracking_id)
        self.num_opened += handler == "handle"
        return stream

    async def call(
        self, handler: str, properties: Mapping[str, str], timeout_s: float, *, content: PairList | None = None, rank: int = 0
    ) -> Output:
        """One request, one reply. Raises TimeoutError, WorkerLostError."""
        stream = self.open(properties, content or PairList(), handler, rank=rank)
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
        if reply.code != 200 or reply.content.is_empty():
            return Piece("", True, reply.code if reply.code >= 300 else 500, _message(reply), reply.properties)
        values = self._codec.decode_map(reply.content.value_at(0))
        code = int(values["code"]) if "code" in values else None
        is_last = values["last"].lower() == "true" or code is not None
        return Piece(values["data"], is_last, code, values.get("error", ""), reply.properties)

    @property
    def resident_bytes(self) -> int:
        """Memory that the ranks hold now; 0 when there are none."""
        return sum(_resident_bytes(pid) for pid in self.pids)

    def die(self, reason: str, hint: str = "; it is being restarted, try again") -> None:
        """Give this worker up: whoever waits gets an error now. The processes are `kill`'s to end."""
        if self.died.done():
            return
        self.died.set_result(reason)
        error = WorkerLostError(reason + hint)
        for stream in self._streams.values():
            stream.interrupt(error)

    async def kill(self) -> None:
        """End all processes and remove their files. Ranks that listen get EXIT_GRACE_S to end by themselves.
        To be called again when it was cancelled."""
        if self._folder is None:
            return  # never started, or over already
        is_stuck = self.died.done()
        self.die(f"the worker of model {self._name} was stopped", hint="")
        for writer in self._writers:
            writer.close()
        if self._process is not None:
            if self._writers and not is_stuck:
                await _ends(self._process, EXIT_GRACE_S)
            assert self._process.stdin is not None
            self._process.stdin.close()  # has the supervisor kill what is left
            if not await _ends(self._process, KILL_GRACE_S):
                logger.error("the processes of model %s could not be ended by their supervisor", self._name)
                self._process.kill()
        end_workers(self._folder.path)  # no supervisor, no mpirun, and ranks that do not listen
        if self._tasks:  # they see the end of their streams, which also closes these
            await asyncio.wait(self._tasks, timeout=EXIT_GRACE_S)
        for task in self._tasks:
            task.cancel()
        self._folder.remove()
        self._folder = None

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _receive(self, rank: int, reader: asyncio.StreamReader) -> None:
        try:
            async for reply in messages(self._codec.response, reader):
                stream = self._streams.get(reply.properties.pop("request_tracking_id", ""))
                if stream is not None:  # else somebody has lost interest
                    stream.put(reply)
        except (Disconnected, OSError):
            assert self._process is not None
            await _ends(self._process, 0.5)  # its exit status tells more than the end of its socket
            self.die(f"the worker of model {self._name} closed its connection{self._which(rank)}")
        except WireError as error:
            self.die(f"the worker of model {self._name} sent bytes that are no reply{self._which(rank)}: {error}")

    def _which(self, rank: int) -> str:
        return f" of rank {rank}" if self._launch.num_ranks > 1 else ""

    async def _wait_for_exit(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        number = -status if status < 0 else status - 128  # as a shell tells it
        how = f"was killed by {signal.Signals(number).name}" if number in VALID_SIGNALS else f"ended with exit status {status}"
        last_words = f"; {self._log.last_words}" if self._log.last_words and not self._writers else ""
        self.die(f"the worker of model {self._name} {how}{last_words}")


async def _ends(process: asyncio.subprocess.Process, timeout_s: float) -> bool:
    """Wait for the end of a process, but not forever."""
    with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), timeout_s)
    return process.returncode is not None


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _message(reply: Output) -> str:
    """The full text of an error reply: the worker's JSON has it, the status line may not."""
    data = b"" if reply.content.is_empty() else reply.content.value_at(0)
    with contextlib.suppress(ValueError):
        error = json.loads(data).get("error") if data else None
        if error:
            return str(error)
    return reply.message
