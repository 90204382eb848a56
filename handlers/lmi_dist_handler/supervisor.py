"""Runs a command until it ends or whoever started this is gone, and leaves nothing behind: `python supervisor.py FOLDER COMMAND…`.

The kernel makes this process the parent of whatever the command's processes leave behind (PR_SET_CHILD_SUBREAPER), in whatever
group or session that is. So what must be ended is known, not guessed: children, until the kernel says that there are none. That
holds when mpirun alone is killed, and when the host is: its end of our standard input closes then. A script of the standard library
only, which starts in 20 ms; the exit status is the command's, as a shell gives it.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_S = 0.01
LOCK_NAME = "lock"  # in the folder: held, shared, by everybody who will remove it


def main() -> int:
    folder, *command = sys.argv[1:]
    with open(os.path.join(folder, LOCK_NAME), encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        _control(PR_SET_CHILD_SUBREAPER, 1)
        signals = _signals()
        try:
            return _until_over(_start(command), signals)
        finally:
            _end_children()
            shutil.rmtree(folder, ignore_errors=True)


def _control(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _signals() -> int:
    """A descriptor from which each SIGCHLD and SIGTERM is read as a byte."""
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    return reads


def _start(command: list[str]) -> int:
    """The process id of the command, which the kernel kills if this process is."""
    pid = os.fork()
    if pid:
        return pid
    try:
        _control(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and a program would inherit that
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.stderr.flush()
    os._exit(127)


def _until_over(command: int, signals: int) -> int:
    """Wait for the end of the command, of standard input, or for SIGTERM; give each orphan that ends its burial."""
    while True:
        ready, _, _ = select.select([0, signals], [], [])
        if 0 in ready and not os.read(0, 4096):
            return 128 + signal.SIGHUP
        if signals in ready and signal.SIGTERM in os.read(signals, 4096):
            return 128 + signal.SIGTERM
        while child := _ended_child():
            pid, status = child
            if pid == command:
                return status if status >= 0 else 128 - status


def _ended_child() -> tuple[int, int] | None:
    """A child that has ended and its status (negative: by that signal). Raises ChildProcessError when there are no children."""
    pid, status = os.waitpid(-1, os.WNOHANG)
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def _end_children() -> None:
    """Kill until there is nothing left to kill: the children of what was killed become ours."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)
            while _ended_child():
                pass


def _children() -> list[int]:
    """Process ids whose parent is this process. (/proc/*/children would be shorter, but is not in every kernel.)"""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            parent = int(file.read().rpartition(b")")[2].split()[1])
            if parent == os.getpid():
                found.append(int(name))
    return found


if __name__ == "__main__":
    sys.exit(main())
