"""handlers/lmi_dist_handler/group.py: several ranks behind one host, and each way in which some of them can be lost."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hosting import alive, ask, pieces, ready, run, text, until
from lmi_dist_handler.group import Group, WorkerLostError
from lmi_dist_handler.host import Host
from lmi_dist_handler.launcher import Launch
from lmi_dist_handler.wire import Codec, Input, PairList

Fault = Callable[[Group], None]


def group_of(host: Host) -> Group:
    assert host._group is not None
    return host._group


def processes(group: Group) -> dict[int, str]:
    """Process ids of supervisor, mpirun and ranks, and what they are."""
    assert group._process is not None
    top = psutil.Process(group._process.pid)
    return {process.pid: process.name() for process in [top, *top.children(recursive=True)]}


def kill_mpirun(group: Group) -> None:
    os.kill(next(pid for pid, name in processes(group).items() if name == "prterun"), signal.SIGKILL)


def cut(group: Group) -> None:
    """Half a request, and then the end."""
    whole = Codec().encode_request(Input({"handler": "handle"}, PairList([("data", b"x" * 1000)])))
    group._writers[0].write(whole[:500])
    group._writers[0].close()


FAULTS: dict[str, Fault] = {
    "rank 0 killed": lambda group: os.kill(group.pids[0], signal.SIGKILL),
    "rank 1 killed": lambda group: os.kill(group.pids[1], signal.SIGKILL),
    "mpirun killed": kill_mpirun,
    "supervisor killed": lambda group: os.kill(group._process.pid, signal.SIGKILL),  # type: ignore[union-attr]
    "socket cut": cut,
    "rank 1 cut off": lambda group: group._writers[1].close(),
}


def test_every_rank_loads_and_rank_0_answers(tmp_path, caplog):
    async def check(host):
        await ready(host)
        group = group_of(host)
        names = sorted(path.name for path in group._folder.path.glob("djl_sock*"))

        assert names == ["djl_sock.0", "djl_sock.0.pid", "djl_sock.1", "djl_sock.1.pid"]
        assert [psutil.Process(pid).environ()["OMPI_COMM_WORLD_RANK"] for pid in group.pids] == ["0", "1"]
        assert (host.worker_pid, await text(host, "abc")) == (group.pids[0], "abc")
        assert group.resident_bytes > sum(psutil.Process(pid).memory_info().rss for pid in group.pids) * 0.9

    caplog.set_level(logging.INFO)
    run(tmp_path, check, num_ranks=2)

    started = {record.getMessage().split()[0][-12:] for record in caplog.records if "Python engine started." in record.getMessage()}
    assert started == {"rank0-stdout", "rank1-stdout"}


@pytest.mark.parametrize("load", ["only1 fault", "only0 fault"])
def test_fault_that_one_rank_finds_is_the_models(tmp_path, load):
    async def check(host):
        await host.settled()

        assert (host.state, host.reason) == ("failed", "hidden_size=7 must be even")

    run(tmp_path, check, load=load, num_ranks=2)


def test_rank_that_does_not_finish_loading_has_a_deadline(tmp_path):
    async def check(host):
        await host.settled()

        assert host.reason == "model test was not loaded within model_loading_timeout=1 s; set a larger one"

    run(tmp_path, check, load="only1 hang", num_ranks=2, loading_timeout_s=1.0)


@pytest.mark.parametrize("fault", FAULTS)
def test_lost_rank_is_told_at_once_and_mended(tmp_path, fault):
    async def check(host):
        await ready(host)
        lost = processes(group_of(host))
        waiting = [ask(host, "endless") for _ in range(3)]
        await waiting[0].piece()

        FAULTS[fault](group_of(host))
        started = asyncio.get_running_loop().time()
        for stream in waiting:
            with pytest.raises(WorkerLostError, match="it is being restarted, try again"):
                await pieces(stream)

        assert asyncio.get_running_loop().time() - started < 2
        await until(lambda: host.num_restarts == 1)
        await ready(host)
        assert await text(host, "abc") == "abc"
        assert [name for pid, name in lost.items() if alive(pid)] == []

    run(tmp_path, check, num_ranks=2)


def test_stopped_rank_is_killed_when_its_group_is(tmp_path):
    async def check(host):
        await ready(host)
        lost = processes(group_of(host))
        for pid in group_of(host).pids:
            os.kill(pid, signal.SIGSTOP)

        await host.stop()

        assert [name for pid, name in lost.items() if alive(pid)] == []

    run(tmp_path, check, num_ranks=2)


def test_stopped_rank_is_killed_without_a_supervisor_too(tmp_path):
    async def check(host):
        await ready(host)
        group = group_of(host)
        lost = processes(group)
        os.kill(group.pids[1], signal.SIGSTOP)
        os.kill(group._process.pid, signal.SIGKILL)

        await until(lambda: host.num_restarts == 1)
        await ready(host)

        await until(lambda: not any(alive(pid) for pid in lost))

    run(tmp_path, check, num_ranks=2)


def test_group_without_mpirun_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))

    async def main() -> None:
        host = Host("test", Launch(model_dir=tmp_path), {})
        host.start()
        await host.settled()
        assert host.state == "failed"
        assert host.reason.startswith("mpirun is neither beside")
        await host.stop()

    asyncio.run(main())
