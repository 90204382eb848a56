"""handlers/lmi_dist_handler/supervisor.py: whatever ends first, nothing of what the command has started is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lmi_dist_handler import supervisor

# children in sessions of their own, and an orphan; each tells its process id in a file of the folder given
STARTS = """
for name in one two; do setsid sh -c "echo \\$\\$ > $1/$name.tmp; mv $1/$name.tmp $1/$name; exec sleep 60" & done
sh -c "setsid sh -c 'echo \\$\\$ > $1/three.tmp; mv $1/three.tmp $1/three; exec sleep 60' &"
while [ ! -e $1/one ] || [ ! -e $1/two ] || [ ! -e $1/three ]; do sleep 0.01; done
echo $$ > $1/shell.tmp; mv $1/shell.tmp $1/shell
"""
WAITS = "exec sleep 60"


class Supervised:
    """A supervisor over a shell script that starts processes in `folder`, which is not the one that it removes."""

    def __init__(self, folder: Path, then: str) -> None:
        self.folder, self.own = folder, folder / "own"
        self.own.mkdir()
        (self.own / "lock").touch()
        command = [sys.executable, "-I", "-S", supervisor.__file__, str(self.own), "sh", "-c", STARTS + then, "sh", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)

    def pid(self, name: str) -> int:
        path = self.folder / name
        until(path.exists)
        return int(path.read_text())

    def check_nothing_is_left(self) -> None:
        pids = [self.pid(name) for name in ("one", "two", "three", "shell")]
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        assert not self.own.exists()


def until(is_true):
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Supervised]]:
    started: list[Supervised] = []

    def begin(then: str) -> Supervised:
        started.append(Supervised(tmp_path, then))
        return started[-1]

    yield begin
    for supervised in started:
        supervised.process.stdin.close()
        supervised.process.wait(10)


def test_command_that_ends_takes_its_processes_along(start):
    supervised = start("exit 7")

    assert supervised.process.wait(10) == 7
    supervised.check_nothing_is_left()


def test_killed_command_takes_its_processes_along(start):
    supervised = start(WAITS)

    os.kill(supervised.pid("shell"), signal.SIGKILL)

    assert supervised.process.wait(10) == 128 + signal.SIGKILL
    supervised.check_nothing_is_left()


def test_end_of_whoever_started_it_ends_all(start):
    supervised = start(WAITS)
    os.kill(supervised.pid("shell"), signal.SIGSTOP)  # what is stopped can be killed, too

    supervised.process.stdin.close()

    assert supervised.process.wait(10) == 128 + signal.SIGHUP
    supervised.check_nothing_is_left()


def test_termination_ends_all(start):
    supervised = start(WAITS)
    supervised.pid("shell")

    supervised.process.terminate()

    assert supervised.process.wait(10) == 128 + signal.SIGTERM
    supervised.check_nothing_is_left()


def test_killed_supervisor_takes_its_command_along(start):
    supervised = start(WAITS)
    shell = supervised.pid("shell")

    supervised.process.kill()

    until(lambda: not Path(f"/proc/{shell}").exists())
    for name in ("one", "two", "three"):  # these see the end of their socket, if they are workers
        os.kill(supervised.pid(name), signal.SIGKILL)


def test_missing_program_is_named(tmp_path):
    (tmp_path / "lock").touch()
    command = [sys.executable, supervisor.__file__, str(tmp_path), "no-such-program"]

    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr.read() == b"no-such-program: No such file or directory\n"
        assert process.wait(10) == 127
