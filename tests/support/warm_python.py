"""A Python that has already loaded what a worker needs, for tests that start many: each start is a fork of it, with the arguments,
environment, folder and streams of whoever asked. `python warm_python.py SOCKET` is that Python; `python warm_python.py SOCKET
SCRIPT ARGUMENTS...` runs a script in a fork and ends as it does. Who kills the one kills the other."""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODULES = (
    "lmi_dist.engine", "lmi_dist_handler.served", "lmi_dist_handler.model_py", "lmi_dist_handler.properties",
    "transformers.models.llama.configuration_llama", "transformers.models.auto.tokenization_auto",
)  # fmt: skip


@contextmanager
def warm(folder: Path) -> Iterator[list[str]]:
    """What to write in place of `python` in a command line."""
    path = folder / "warm"
    process = subprocess.Popen([sys.executable, __file__, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as stream:
        stream.readline()  # it is ready
    try:
        yield [sys.executable, "-S", "-E", __file__, str(path)]
    finally:
        process.terminate()
        process.wait()


def serve(path: str) -> None:
    """Fork for each that asks. Whoever asks waits at its connection: its end is the script's end, and the other way round."""
    for name in MODULES:
        __import__(name)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    signal.signal(signal.SIGCHLD, lambda *_: None)
    asked: dict[socket.socket, int] = {}  # pids
    while True:
        for ready in select.select([server, *asked], [], [], 0.05)[0]:
            if ready is server:
                connection, _ = server.accept()
                pid = fork(connection, [server, *asked])
                asked[connection] = pid
            elif not ready.recv(1):
                os.kill(asked[ready], signal.SIGKILL)
        for connection, pid in list(asked.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                connection.close() if os.WIFSIGNALED(status) else end(connection, os.WEXITSTATUS(status))
                del asked[connection]


def end(connection: socket.socket, status: int) -> None:
    with connection, contextlib.suppress(OSError):  # who asked may have been killed
        connection.sendall(bytes([status]))


def fork(connection: socket.socket, others: list[socket.socket]) -> int:
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    pid = os.fork()
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        return pid
    for other in (connection, *others):
        other.close()
    run(json.loads(message), descriptors)
    raise AssertionError("run does not return")


def run(asked: dict, descriptors: list[int]) -> None:
    """Become the script."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    script, *arguments = asked["arguments"]
    sys.argv = [script, *arguments]
    sys.path[:0] = [str(Path(script).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def ask(path: str, arguments: list[str]) -> int:
    """Have a script run, and wait for its end."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    message = json.dumps(asked).encode() + b"\n"
    sent = socket.send_fds(connection, [message], [0, 1, 2])
    connection.sendall(message[sent:])
    status = connection.recv(1)
    return status[0] if status else 128 + signal.SIGKILL


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
