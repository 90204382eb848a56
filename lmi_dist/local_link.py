"""Links between the ranks of one machine: tensors through shared memory, everything else through Unix sockets from rank 0 to each
other rank. Who waits at a socket costs nothing, and wakes when the process at the other end has gone, whatever its end was."""

import contextlib
import json
import logging
import queue
import select
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lmi_dist import errors
from lmi_dist.device_group import DeviceGroup
from lmi_dist.errors import DeviceError, LmiError, RankError
from lmi_dist.link import Link
from lmi_dist.ops import Segment
from lmi_dist.parallel import Ranks
from lmi_dist.plan import Plan
from lmi_dist.plan_stream import PlanReader, PlanWriter

logger = logging.getLogger(__name__)

NUMBER = struct.Struct("<q")  # a frame's length; the turn at which a step begins
ENDING_MS = 50  # until all that a process held is given back: the segment, by which its end shows in a step, and its sockets
MAX_REPLIES = 1024  # kept for a rank whose host does not ask it


class _LocalLink(Link):
    """What all ends share: the segment."""

    def __init__(self, ranks: Ranks, segment: Segment) -> None:
        super().__init__(ranks)
        self._segment = segment
        self._tensors: Segment | DeviceGroup = segment  # what carries them

    def join_gpus(self, store: Path, place: torch.device, backend: str = "nccl") -> None:
        self._tensors = DeviceGroup(self.ranks, store, place, backend)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._tensors.all_reduce(x)

    def gather(self, x: torch.Tensor, num_columns: int) -> torch.Tensor:
        parts = [self.ranks.slice(num_columns, "num_columns", rank) for rank in range(self.ranks.size)]
        return self._tensors.gather(x, [part.stop - part.start for part in parts])

    def drop(self, error: Exception) -> None:
        self._segment.drop(f"{type(error).__name__}: {error}")
        if self._tensors is not self._segment:
            raise DeviceError(
                f"rank {self.ranks.rank} has failed in a step in which the GPUs of the others wait for it, so that all end and "
                f"are started again: {error}"
            ) from error


class LeaderLink(_LocalLink):
    """Rank 0's end. plans, replies: the sockets to ranks 1, 2, ..."""

    def __init__(self, ranks: Ranks, segment: Segment, plans: list[socket.socket], replies: list[socket.socket]) -> None:
        super().__init__(ranks, segment)
        self._plans, self._replies = plans, replies
        self._writer = PlanWriter()

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the others learn of it, whatever it is; then it goes its way
            self._conclude(_told(error, self.ranks))
            raise
        states = [_receive_json(plans) for plans in self._plans]
        outcome = next((state for state in states if "error" in state), {})
        self._conclude(outcome)
        _raise_told(outcome)

    def _conclude(self, outcome: Mapping[str, Any]) -> None:
        for plans in self._plans:
            with contextlib.suppress(RankError):  # one that has failed may have gone
                send(plans, json.dumps(outcome).encode())

    def share_setup(self, setup: Mapping[str, Any]) -> None:
        for plans in self._plans:
            send(plans, json.dumps(setup).encode())

    def publish(self, plan: Plan) -> None:
        message = NUMBER.pack(self._segment.begin()) + self._writer.write(plan)
        try:
            for plans in self._plans:
                send(plans, message)
        except RankError as error:
            self.drop(error)  # some may have begun
            raise

    @property
    def has_lost_a_rank(self) -> bool:
        poll = select.poll()
        for plans in self._plans:
            poll.register(plans, select.POLLIN)  # between steps nobody sends anything there
        return bool(poll.poll(ENDING_MS))

    def publish_reply(self, reply: bytes) -> None:
        for replies in self._replies:
            send(replies, reply)

    def close(self) -> None:
        for rank_socket in self._plans:
            with contextlib.suppress(RankError):  # one that has ended needs no word
                send(rank_socket, b"")
        for rank_socket in (*self._plans, *self._replies):
            rank_socket.close()


class FollowerLink(_LocalLink):
    """The end of a rank above 0."""

    def __init__(self, ranks: Ranks, segment: Segment, plans: socket.socket, replies: socket.socket) -> None:
        super().__init__(ranks, segment)
        self._plans, self._replies = plans, replies
        self._reader = PlanReader()
        self._is_told = False  # that rank 0 has failed
        self._answers: queue.Queue[bytes | RankError] = queue.Queue()
        threading.Thread(target=self._hear_replies, name="replies", daemon=True).start()

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._is_told:
                with contextlib.suppress(RankError):  # rank 0 may have gone; the error in hand says more
                    send(self._plans, json.dumps(_told(error, self.ranks)).encode())
                    receive(self._plans)
            raise
        with contextlib.suppress(RankError):  # if rank 0 has failed and gone, what it said is still there
            send(self._plans, b"{}")
        _raise_told(_receive_json(self._plans))

    def await_setup(self) -> dict[str, Any]:
        """What rank 0 shares, inside `together`. Raises rank 0's error if it comes to nothing."""
        values = _receive_json(self._plans)
        self._is_told = "error" in values
        _raise_told(values)
        return values

    def next_plan(self) -> Plan | None:
        """The plan of the step that rank 0 begins now; None when it has closed the link. Raises RankError if it has ended."""
        message = receive(self._plans)
        if not message:
            return None
        self._segment.begin(*NUMBER.unpack_from(message))
        return self._reader.read(memoryview(message)[NUMBER.size :])

    def await_reply(self) -> bytes:
        """Rank 0's next reply: the k-th call gives the k-th one. Raises RankError if rank 0 has ended, or if more than MAX_REPLIES
        were not asked for."""
        answer = self._answers.get()
        if isinstance(answer, RankError):
            self._answers.put(answer)
            raise answer
        return answer

    def close(self) -> None:
        for own in (self._plans, self._replies):
            own.close()

    def _hear_replies(self) -> None:
        """In a thread of its own, so that rank 0 never waits for a host that does not ask this rank."""
        try:
            while self._answers.qsize() < MAX_REPLIES:
                self._answers.put(receive(self._replies))
            self._answers = queue.Queue()
            self._answers.put(RankError(f"more than {MAX_REPLIES} replies of rank 0 were not asked for"))
            while True:
                receive(self._replies)
        except (RankError, OSError) as error:
            self._answers.put(error if isinstance(error, RankError) else RankError(f"the link is closed: {error}"))


# ---- frames ----


def send(connection: socket.socket, message: bytes) -> None:
    """A frame: its length and its bytes. Raises RankError if the other end has gone."""
    try:
        connection.sendall(NUMBER.pack(len(message)) + message)
    except OSError as error:
        raise RankError(f"another rank has ended: {error}") from error


def receive(connection: socket.socket) -> bytes:
    """The next frame. Raises RankError if the other end has gone."""
    (length,) = NUMBER.unpack(_receive_exactly(connection, NUMBER.size))
    return _receive_exactly(connection, length)


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    buffer = bytearray(num_bytes)
    view = memoryview(buffer)
    while view:
        try:
            num = connection.recv_into(view)
        except OSError as error:
            raise RankError(f"another rank has ended: {error}") from error
        if num == 0:
            raise RankError("another rank has ended")
        view = view[num:]
    return bytes(buffer)


def _receive_json(connection: socket.socket) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(receive(connection))
    return values


def _told(error: Exception, ranks: Ranks) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": str(error), "rank": ranks.rank}


def _raise_told(values: Mapping[str, Any]) -> None:
    """The error of another rank, as one of ours with the same sentence if it was one."""
    if "error" in values:
        kind = getattr(errors, values["error"], None)
        if isinstance(kind, type) and issubclass(kind, LmiError):
            raise kind(values["message"])
        raise RankError(f"rank {values['rank']} has failed: {values['error']}: {values['message']}")
