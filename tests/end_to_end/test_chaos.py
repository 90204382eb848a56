"""Two ranks under load, and every way to lose them. Each client has its answer, the service comes back, and nothing is left.

`make test` has one round; `make soak` has twenty (SOAK_SCALE=0.1: two), in which the service has to be back within 15 s.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import tiny_models
from running_server import Server, until

NUM_ROUNDS = max(1, int(20 * float(os.environ.get("SOAK_SCALE", "1"))))
NUM_CLIENTS = 4
BACK_S = 15.0  # on a machine that does nothing else
BACK_BUSY_S = 90.0
IDLE_SHARE = 0.01  # of a core


def left_in_shared_memory() -> set[str]:
    """Names in /dev/shm that no process maps any more: what others run beside this test is their business."""
    mapped = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mapped |= {Path(found.path).name for found in process.memory_maps() if found.path.startswith("/dev/shm/")}
    return set(os.listdir("/dev/shm")) - mapped


class CuttableServer(Server):
    program = (str(Path(__file__).parents[1] / "support" / "cuttable_server.py"),)


def seed_variables(model: Path, degree: str) -> dict[str, str]:
    """README's configuration by variables."""
    return {
        "SERVING_LOAD_MODELS": f"test::MPI={model}",
        "OPTION_MODEL_ID": str(model),
        "OPTION_TENSOR_PARALLEL_DEGREE": degree,
        "OPTION_ROLLING_BATCH": "lmi-dist",
        "OPTION_MAX_ROLLING_BATCH_PREFILL_TOKENS": "4096",
    }


class Chaos:
    """A server over two ranks, with a folder of its own for temporary files, and its processes by what they are."""

    def __init__(self, model: Path, temporary: Path) -> None:
        self.temporary = temporary
        self.shared = left_in_shared_memory()
        self.server = CuttableServer(**seed_variables(model, "2"), OPTION_PREDICT_TIMEOUT="5", TMPDIR=str(temporary))
        self.server.wait_until_ready()

    def ranks(self) -> list[psutil.Process]:
        found = [process for process in self.group() if process.parent().name() == "prterun"]
        return sorted(found, key=lambda process: process.environ()["OMPI_COMM_WORLD_RANK"])

    def mpirun(self) -> psutil.Process:
        return next(process for process in self.group() if process.name() == "prterun")

    def group(self) -> list[psutil.Process]:
        return psutil.Process(self.server.process.pid).children(recursive=True)

    def num_restarts(self) -> int:
        return int(self.server.metric("lmi_worker_restarts_total"))

    def answers(self) -> bool:
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 4, "ignore_eos_token": True}}
        return self.server.post("/invocations", json=body).status_code == 200

    def check_clean(self) -> None:
        """One group's files are there, of this life; what earlier ones had is gone."""
        (folder,) = self.temporary.glob("lmi-dist-*")
        names = {path.name for path in folder.iterdir()}
        sockets = {"djl_sock.0", "djl_sock.1", "djl_sock.0.pid", "djl_sock.1.pid"}
        assert names == {"lock", *sockets, f"ompi.{self.mpirun().pid}"}
        assert {(folder / f"djl_sock.{rank}.pid").read_text() for rank in (0, 1)} == {str(rank.pid) for rank in self.ranks()}
        until(lambda: left_in_shared_memory() <= self.shared)


class Clients:
    """Ask without end in threads of their own; `outcomes` counts how answers ended, `failures` those that never came."""

    def __init__(self, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self._url = url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number % 2 == 0,)) for number in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, is_streamed: bool) -> None:
        body = {"inputs": "hello", "stream": is_streamed, "parameters": {"max_new_tokens": 100, "ignore_eos_token": True}}
        with httpx.Client(timeout=30) as client:
            while not self._is_over.is_set():
                try:
                    answer = client.post(f"{self._url}/invocations", json=body)
                    last = json.loads(answer.text.strip().splitlines()[-1] if answer.status_code == 200 else answer.text)
                except (httpx.HTTPError, ValueError, IndexError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    continue
                code = last.get("code", 200) if "generated_text" not in last else 200
                self.outcomes[f"{answer.status_code}/{code}"] += 1
                if answer.status_code != 200:
                    time.sleep(0.1)


def kill(number: int) -> Callable[[Chaos], None]:
    return lambda chaos: chaos.ranks()[number].kill()


def stop(number: int) -> Callable[[Chaos], None]:
    return lambda chaos: chaos.ranks()[number].suspend()


def faults_of(number: int) -> dict[str, Callable[[Chaos], None]]:
    """Each kind once; of the ranks each in its turn."""
    return {
        f"SIGKILL of rank {number % 2}": kill(number % 2),
        f"SIGSTOP of rank {(number + 1) % 2}": stop((number + 1) % 2),
        "SIGKILL of mpirun": lambda chaos: chaos.mpirun().kill(),
        "socket cut mid-frame": lambda chaos: chaos.server.process.send_signal(signal.SIGUSR1),
    }


def suffer(chaos: Chaos, fault: Callable[[Chaos], None], limit_s: float) -> float:
    """One fault under load; seconds until the next group answered."""
    clients = Clients(chaos.server.url)
    try:
        until(lambda: clients.outcomes["200/200"] >= NUM_CLIENTS)
        lost, num_restarts, started = chaos.group(), chaos.num_restarts(), time.monotonic()
        fault(chaos)
        until(lambda: chaos.num_restarts() == num_restarts + 1, limit_s)
        until(lambda: chaos.server.ping().status_code == 200 and chaos.answers(), limit_s)
        back_s = time.monotonic() - started
    finally:
        clients.end()
    assert clients.failures == []
    assert set(clients.outcomes) <= {"200/200", "200/503", "503/503"}
    assert clients.outcomes["503/503"] + clients.outcomes["200/503"] > 0
    assert [process for process in lost if process.is_running()] == []
    chaos.check_clean()
    assert back_s < limit_s
    return back_s


def idle_share(chaos: Chaos, seconds: float) -> float:
    """Of one core, that the group's processes take while nobody asks."""
    processes = chaos.group()
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    time.sleep(seconds)
    return (sum(sum(process.cpu_times()[:2]) for process in processes) - before) / seconds


def kill_host(chaos: Chaos) -> None:
    """With the server, all that it had started ends, and takes its files along."""
    left = chaos.group()
    chaos.server.process.kill()
    chaos.server.process.wait()
    until(lambda: not any(process.is_running() for process in left))
    until(lambda: not list(chaos.temporary.iterdir()))
    until(lambda: left_in_shared_memory() <= chaos.shared)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama2-gqa", max_position_embeddings=1024), tmp_path_factory.mktemp("chaos"))


@pytest.fixture
def chaos(model: Path) -> Iterator[Chaos]:
    with tempfile.TemporaryDirectory(prefix="t-") as short:  # sockets have short names
        chaos = Chaos(model, Path(short))
        try:
            yield chaos
        finally:
            chaos.server.process.kill()
            chaos.server.process.wait(10)


@pytest.mark.timeout(600)
def test_every_fault_is_survived_and_leaves_nothing(chaos: Chaos) -> None:
    assert chaos.answers()
    until(lambda: idle_share(chaos, 3) < IDLE_SHARE, 60)  # when the KV pool's pages are there
    for fault in faults_of(0).values():
        suffer(chaos, fault, BACK_BUSY_S)
    kill_host(chaos)


@pytest.mark.soak
@pytest.mark.parametrize("degree", ["1", "2", "max"])
@pytest.mark.parametrize("form", ["file", "variables"])
def test_both_configurations_start(model: Path, tmp_path: Path, form: str, degree: str) -> None:
    """README's; `max` is the number of GPUs, or 1."""
    values = seed_variables(model, degree)
    if form == "file":
        options = {name.lower().replace("option_", "option."): value for name, value in values.items() if "OPTION" in name}
        lines = ["engine=MPI", *(f"{name}={value}" for name, value in options.items())]
        (tmp_path / "serving.properties").write_text("\n".join(lines))
        values = {"MODEL_DIR": str(tmp_path)}
    server = Server(**values)
    try:
        server.wait_until_ready()
        answer = server.post("/invocations", json={"inputs": "hello", "parameters": {"max_new_tokens": 4}})
        started = {line.split("-stdout")[0][-5:] for line in server.lines if "Python engine started." in line}
    finally:
        server.end()

    assert answer.status_code == 200
    assert started == {f"rank{rank}" for rank in range(2 if degree == "2" else 1)}


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_fault_is_survived_many_times(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times: dict[str, list[float]] = {}
    try:
        for number in range(NUM_ROUNDS):
            with tempfile.TemporaryDirectory(prefix="t-") as short:
                chaos = Chaos(model, Path(short))
                try:
                    for name, fault in faults_of(number).items():
                        back_s = suffer(chaos, fault, BACK_S)
                        times.setdefault(name, []).append(back_s)
                    kill_host(chaos)
                finally:
                    chaos.server.process.kill()
                    chaos.server.process.wait(10)
    finally:
        with capsys.disabled():
            for name, seconds in times.items():
                sys.stdout.write(f"\n{name}: {len(seconds)} times, back after {min(seconds):.1f} to {max(seconds):.1f} s")


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_idle_group_takes_next_to_nothing(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.answers()

    share = idle_share(chaos, 60)

    with capsys.disabled():
        sys.stdout.write(f"\nidle: {100 * share:.3f} % of a core over 60 s")
    assert share < IDLE_SHARE
