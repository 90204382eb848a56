"""How ranks find each other: rank 0 listens at a Unix socket without a file, and MPI tells the others its name and a password.

MPI ends as soon as that is said. A process that waits in an MPI call burns a CPU, and one that is killed while MPI lives leaves its
segments in /dev/shm; what we use instead has no name anywhere, and is gone with the processes.
"""

import json
import logging
import os
import secrets
import socket
import struct
import time

from lmi_dist.errors import ConfigError, RankError
from lmi_dist.link import Link
from lmi_dist.local_link import FollowerLink, LeaderLink, receive, send
from lmi_dist.ops import Segment
from lmi_dist.parallel import Ranks

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0  # for all ranks to come, once MPI has brought them together
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid of a socket's other end


def connect(degree: int, ranks: Ranks | None = None) -> Link:
    """Join the ranks that the launcher has started, which are all to call this; alone if there is one.
    Raises ConfigError if `degree`, the tensor_parallel_degree, is not their number, RankError if one does not come."""
    ranks = ranks or Ranks.of_environment()
    if degree != ranks.size:
        raise ConfigError(
            f"tensor_parallel_degree={degree} must be the number of ranks, and the launcher has started {ranks.size}; "
            f"start with mpirun -np {degree}, or set tensor_parallel_degree={ranks.size}"
        )
    if ranks.size == 1:
        return Link(ranks)
    if ranks.rank == 0:
        with Meeting() as meeting:
            _broadcast(ranks, meeting.invitation)
            return meeting.lead(ranks)
    return join(ranks, _broadcast(ranks, ""))


def _broadcast(ranks: Ranks, invitation: str) -> str:
    """Rank 0's invitation, on every rank. MPI starts and ends in here, once in a process' life."""
    from mpi4py import rc

    rc.initialize = rc.finalize = False
    from mpi4py import MPI

    if MPI.Is_finalized():
        raise RankError("the ranks have met before and cannot meet again; start them anew")
    MPI.Init()
    try:
        if MPI.COMM_WORLD.size != ranks.size:
            raise ConfigError(f"the launcher speaks of {ranks.size} ranks, MPI of {MPI.COMM_WORLD.size}; start with mpirun")
        return str(MPI.COMM_WORLD.bcast(invitation))
    finally:
        MPI.Finalize()


class Meeting:
    """Where rank 0 waits for the others."""

    def __init__(self) -> None:
        self._name, self._password = f"\0lmi-dist-{secrets.token_hex(16)}", secrets.token_hex(32)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self._name)  # abstract: no file
        self._server.listen(128)

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    @property
    def invitation(self) -> str:
        """For `join`; who has it can take part."""
        return json.dumps([self._name, self._password])

    def lead(self, ranks: Ranks) -> LeaderLink:
        """Wait for all ranks above 0. Raises RankError if one does not come."""
        places = [(rank, use) for rank in range(1, ranks.size) for use in ("plans", "replies")]
        fd = Segment.create(ranks.size)
        segment = Segment(fd, ranks.rank, ranks.size)
        taken: dict[tuple[int, str], socket.socket] = {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(taken) < len(places):
            missing = sorted({rank for rank, use in places if (rank, use) not in taken})
            taken |= self._admit(places, deadline - time.monotonic(), missing)
        plans, replies = ([taken[rank, use] for rank in range(1, ranks.size)] for use in ("plans", "replies"))
        for connection in plans:
            socket.send_fds(connection, [b"0"], [fd])
        for connection in plans:
            receive(connection)  # it has mapped the segment, and holds its lock
        return LeaderLink(ranks, segment, plans, replies)

    def _admit(self, places: list[tuple[int, str]], timeout_s: float, missing: list[int]) -> dict[tuple[int, str], socket.socket]:
        """The next one that comes, if it is one of ours."""
        try:
            self._server.settimeout(max(timeout_s, 0.001))
            connection, _ = self._server.accept()
        except TimeoutError:
            raise RankError(f"ranks {missing} have not come within {TIMEOUT_S:g} s") from None
        connection.settimeout(TIMEOUT_S)
        _, uid, _ = CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
        password, rank, use = json.loads(receive(connection)) if uid == os.getuid() else ("", 0, "")
        if not secrets.compare_digest(password, self._password) or (rank, use) not in places:
            logger.warning("a stranger (uid %d) has come to where the ranks meet, and was sent away", uid)
            connection.close()
            return {}
        connection.settimeout(None)
        return {(rank, use): connection}


def join(ranks: Ranks, invitation: str) -> FollowerLink:
    """Go to where rank 0 waits. Raises RankError if it is not there."""
    name, password = json.loads(invitation)
    sockets = []
    for use in ("plans", "replies"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_S)
        try:
            connection.connect(name)
        except OSError as error:
            raise RankError(f"rank 0 has ended: {error}") from error
        send(connection, json.dumps([password, ranks.rank, use]).encode())
        sockets.append(connection)
    plans, replies = sockets
    _, descriptors, _, _ = socket.recv_fds(plans, 1, 1)
    if not descriptors:
        raise RankError("rank 0 has ended while the ranks met")
    segment = Segment(descriptors[0], ranks.rank, ranks.size)
    send(plans, b"here")
    plans.settimeout(None)
    replies.settimeout(None)
    return FollowerLink(ranks, segment, plans, replies)
