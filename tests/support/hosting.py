"""A Host over real worker processes behind an entry point made for tests: `run` a test on it, `ask` it, and see what is left."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from lmi_dist_handler.group import Piece, Stream
from lmi_dist_handler.host import Host, Limits
from lmi_dist_handler.launcher import Launch
from lmi_dist_handler.wire import PairList

ENTRY_POINT = r"""
import asyncio, os, signal, subprocess, sys, time
from lmi_dist_handler.wire import Output

aborted = []
busy_s = 0.0
num_failed = 0
is_silent = False

async def handle(inputs):
    if inputs.is_empty():
        return load(inputs.get_property("load") or "", inputs)
    return answer(inputs)

def refused(sentence, kind):
    return Output().error(sentence, message=sentence).add_property("error_type", kind)

def load(how, inputs):
    if how.startswith("only"):  # on one rank alone
        rank, _, how = how.removeprefix("only").partition(" ")
        how = how if rank == os.environ["RANK"] else ""
    if how == "fault":
        return refused("hidden_size=7 must be even", "ConfigError")
    if how == "bug":
        return refused("a bug", "RuntimeError")
    if how == "hang":
        time.sleep(60)
    if how == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open("child", "w").write(str(child.pid))
    sys.stderr.write("step 1\rstep 2\rstep 3\rlast words\n")
    sys.stderr.flush()

def frame(data, last, **more):
    output = Output().add_property("Content-Type", "text/plain")
    return output.add(Output.binary_encode({"data": data, "last": last, **more}))

async def answer(inputs):
    global busy_s, num_failed, is_silent
    body = inputs.get_as_string()
    if body in ("failing", "working"):
        num_failed = num_failed + 1 if body == "failing" else 0
    if body == "silent":
        is_silent = True
    if body == "error":
        yield frame("told", True, code=418, error="a teapot")
        return
    if body == "die":
        yield frame("a", False)
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    if body == "block":
        time.sleep(60)
    if body == "busy":
        busy_s = 1e9
        await asyncio.sleep(60)
    if body == "raise":
        raise ValueError("raised")
    if body == "endless":
        while inputs.get_property("request_tracking_id") not in aborted:
            yield frame("x", False)
            await asyncio.sleep(0.005)
        return
    for letter in body[:-1]:
        yield frame(letter, False)
    yield frame(body[-1:], True)

def abort(inputs):
    aborted.append(inputs.get_property("abort_tracking_id"))
    return Output()

async def stats(inputs):
    while is_silent:
        await asyncio.sleep(0.01)
    return Output().add({"busy_s": busy_s, "num_failed_in_a_row": num_failed, "aborted": len(aborted), "cwd": os.getcwd()})

def drain(inputs):
    return Output()
"""

BODY = {"content-type": "text/plain"}


def run(folder: Path, test: Callable[[Host], Awaitable[None]], load: str = "", num_ranks: int = 1, **limits: Any) -> Host:
    """Run `test` over a host; whatever happens, its workers are gone and their files too at the end."""
    (folder / "model.py").write_text(ENTRY_POINT)
    launch = Launch(model_dir=folder, entry_point="model.py", num_ranks=num_ranks)

    async def main() -> Host:
        properties = {"load": load, "model_id": "x"}
        host = Host("test", launch, properties, limits=Limits(**limits))
        host.start()
        try:
            await asyncio.wait_for(test(host), 20)
        finally:
            await host.stop()
        return host

    with tempfile.TemporaryDirectory(prefix="t-") as short, pytest.MonkeyPatch.context() as patch:  # sockets have short names
        patch.setattr(tempfile, "tempdir", short)
        host = asyncio.run(main())
        assert not list(Path(short).iterdir())
    assert host.worker_pid is not None
    assert not alive(host.worker_pid)
    return host


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def ready(host: Host) -> None:
    await until(lambda: host.state == "ready")


def ask(host: Host, body: str) -> Stream:
    return host.open(BODY, PairList([("data", body.encode())]))


async def pieces(stream: Stream) -> list[Piece]:
    with stream:
        found = [await stream.piece()]
        while not found[-1].is_last:
            found.append(await stream.piece())
    return found


async def text(host: Host, body: str) -> str:
    return "".join(piece.text for piece in await pieces(ask(host, body)))
