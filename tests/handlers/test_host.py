"""handlers/lmi_dist_handler/{host,group}.py: real worker processes behind an entry point made for the test."""

import asyncio
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hosting import ENTRY_POINT, alive, ask, pieces, ready, run, text, until
from lmi_dist_handler import host as host_module
from lmi_dist_handler.group import Group, Piece, WorkerLostError
from lmi_dist_handler.host import Host, NotReadyError
from lmi_dist_handler.launcher import Launch

from lmi_dist import LmiError, OverloadedError


def test_requests_are_answered_side_by_side(tmp_path: Path) -> None:
    async def check(host: Host) -> None:
        with pytest.raises(NotReadyError, match="model test is not ready: it is still loading"):
            ask(host, "abc")
        await ready(host)

        answers = await asyncio.gather(*(text(host, letter * 50) for letter in "abcdefgh"))

        assert answers == [letter * 50 for letter in "abcdefgh"]
        assert (await host.stats())["cwd"] == str(tmp_path)
        assert host.num_in_flight == 0

    assert run(tmp_path, check).state == "stopped"


def test_errors_of_the_worker_are_pieces(tmp_path: Path) -> None:
    async def check(host: Host) -> None:
        await ready(host)

        (told,) = await pieces(ask(host, "error"))
        (raised,) = await pieces(ask(host, "raise"))

        assert told == Piece("told", True, 418, "a teapot", {"Content-Type": "text/plain"})
        assert (raised.code, raised.error) == (424, "raised")

    run(tmp_path, check)


def test_closed_stream_aborts_its_request(tmp_path: Path) -> None:
    async def check(host: Host) -> None:
        await ready(host)
        with ask(host, "endless") as stream:
            assert (await stream.piece()).text == "x"

        assert (await host.stats())["aborted"] == 1
        assert host.num_in_flight == 0

    run(tmp_path, check)


def test_too_many_requests_are_refused(tmp_path: Path) -> None:
    async def check(host: Host) -> None:
        await ready(host)
        full = "Worker queue capacity exceeded for model: test"
        with ask(host, "endless"), ask(host, "endless"), pytest.raises(OverloadedError, match=full):
            ask(host, "abc")
        assert await text(host, "abc") == "abc"

    run(tmp_path, check, max_in_flight=2)


def test_death_of_the_worker_is_told_and_mended(tmp_path: Path) -> None:
    async def check(host: Host) -> None:
        await ready(host)
        other, stream = ask(host, "endless"), ask(host, "die")
        assert (await stream.piece()).text == "a"

        with pytest.raises(WorkerLostError, match=r"the worker of model test was killed by SIGKILL; it is being restarted"):
            await stream.piece()
        with pytest.raises(WorkerLostError):
            await pieces(other)
        await until(lambda: host.state == "loading")
        assert "killed by SIGKILL" in host.reason
        await ready(host)

        assert (await text(host, "abc"), host.num_restarts) == ("abc", 1)

    run(tmp_path, check)


def test_silence_counts_from_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped worker is found out within the limit, not within the limit and the time until it was looked at."""
    allowed: list[float] = []
    stats = Group.stats

    async def noted(group: Group, timeout_s: float) -> dict[str, Any]:
        allowed.append(timeout_s)
        return await stats(group, timeout_s)

    async def check(host: Host) -> None:
        await ready(host)
        monkeypatch.setattr(Group, "stats", noted)
        with ask(host, "endless"):
            await until(lambda: len(allowed) >= 2)

    run(tmp_path, check, step_timeout_s=3.0)

    assert set(allowed) == {2.4}


@pytest.mark.parametrize(("body", "what"), [("block", "did not answer"), ("busy", "was in one step for more")])
def test_stuck_worker_is_replaced(tmp_path: Path, body: str, what: str) -> None:
    async def check(host: Host) -> None:
        await ready(host)

        with pytest.raises(WorkerLostError, match=f"{what}.* predict_timeout=1 s"):
            await pieces(ask(host, body))
        await until(lambda: host.num_restarts == 1)
        await ready(host)

        assert await text(host, "abc") == "abc"

    run(tmp_path, check, step_timeout_s=1.0)


def test_whole_process_group_is_ended(tmp_path: Path) -> None:
    async def check(host: Host) -> None:
        await ready(host)
        assert alive(int((tmp_path / "child").read_text()))

    run(tmp_path, check, load="child")

    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while alive(child):  # the kernel delivers the signal when it likes
        assert time.monotonic() < deadline


def test_fault_of_the_model_is_final(tmp_path: Path) -> None:
    async def check(host: Host) -> None:
        await until(lambda: host.state == "failed")

        assert host.reason == "hidden_size=7 must be even"
        with pytest.raises(LmiError, match="model test is not ready: hidden_size=7 must be even"):
            ask(host, "abc")
        assert host.num_restarts == 0

    ended = run(tmp_path, check, load="fault")

    assert (ended.state, ended.reason) == ("failed", "hidden_size=7 must be even")


def test_other_failures_are_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def check(host: Host) -> None:
        await until(lambda: host.state == "failed")

        assert host.reason == "a bug; given up after 3 tries"

    run(tmp_path, check, load="bug")

    assert re.findall(r"a bug; next try in (\S+) s", caplog.text) == ["0", "0.25"]


def test_loading_has_a_deadline(tmp_path: Path) -> None:
    async def check(host: Host) -> None:
        await until(lambda: host.state == "failed")

        assert host.reason == "model test was not loaded within model_loading_timeout=0.3 s; set a larger one"

    run(tmp_path, check, load="hang", loading_timeout_s=0.3)


def test_worker_that_cannot_start_tells_why(tmp_path: Path) -> None:
    async def main() -> None:
        group = Group("test", Launch(model_dir=tmp_path, entry_point="no_such_module"))
        try:
            with pytest.raises(WorkerLostError, match=r"ended with exit status 1; ModuleNotFoundError: .*no_such_module"):
                await group.start()
        finally:
            await group.kill()

    asyncio.run(main())


def test_lines_of_the_worker_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def check(host: Host) -> None:
        await ready(host)
        await until(lambda: "last words" in caplog.text)

    caplog.set_level(logging.INFO)
    run(tmp_path, check)

    levels = {record.getMessage().split(" ", 1)[1]: record.levelname for record in caplog.records if "W-" in record.getMessage()}
    assert levels["Python engine started."] == "INFO"
    assert "test-rank0-stderr last words" in caplog.text
    assert levels["last words"] == "WARNING"
    assert "step 1" in levels
    assert "step 2" not in levels  # a progress bar's next state, too soon after


HOST_PROCESS = """
import asyncio, sys
from pathlib import Path
from lmi_dist_handler.host import Host
from lmi_dist_handler.launcher import Launch

async def main():
    host = Host("test", Launch(model_dir=Path(sys.argv[1]), entry_point="model.py"), {})
    host.start()
    while host.state != "ready":
        await asyncio.sleep(0.01)
    print(host.worker_pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_worker_ends_with_its_host(tmp_path: Path) -> None:
    """Nobody tells a worker when its host is killed: it sees the end of its socket."""
    (tmp_path / "model.py").write_text(ENTRY_POINT)
    command = [sys.executable, "-c", HOST_PROCESS, str(tmp_path)]
    with (
        tempfile.TemporaryDirectory(prefix="t-") as short,
        subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": short}) as process,
    ):
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert alive(worker)

        process.kill()
        deadline = time.monotonic() + 10
        while alive(worker):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        while list(Path(short).iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "WATCH_INTERVAL_S", 0.02)
    monkeypatch.setattr(host_module, "SILENT_S", 0.1)


@pytest.mark.usefixtures("quick_looks")
def test_failing_steps_are_degraded_until_one_works(tmp_path: Path) -> None:
    async def check(host: Host) -> None:
        assert host.health == ("loading", "")
        await until(lambda: host.health == ("serving", ""))
        await text(host, "failing")
        await until(lambda: host.health[0] == "degraded")
        assert host.health[1] == "the last 1 steps failed, and with them the requests in them"
        await text(host, "working")
        await until(lambda: host.health == ("serving", ""))

    assert run(tmp_path, check).health == ("draining", "the server is being stopped")


@pytest.mark.usefixtures("quick_looks")
def test_silent_worker_is_degraded_then_replaced(tmp_path: Path) -> None:
    async def check(host: Host) -> None:
        await until(lambda: host.health[0] == "serving")
        await text(host, "silent")
        await until(lambda: host.health[0] == "degraded")
        assert "the worker has not answered for" in host.health[1]
        await until(lambda: host.health[0] == "restarting")
        await until(lambda: host.health[0] == "serving")

    run(tmp_path, check, step_timeout_s=0.5)
