"""Plays DJL Serving's Java side of each version against real worker processes (contract 1, 2, 4, 5.7): starts them as it does,
makes its init request, drives rolling batch, async mode and merged requests, reads items as its code does, bad habits included."""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from djl_wire import HostWire, Reply

SOURCES = Path(__file__).parent / "djl_worker"
STARTED = "Python engine started."
NO_LISTENER = "The PMIx server's listener thread failed to start"
START_TIMEOUT_S = 120
BUFFER = 4  # SERVING_ROLLING_BATCH_BUFFER of 0.26
RECOMMENDED = "djl_python.huggingface"


@dataclass(frozen=True)
class Version:
    """A version of DJL Serving, and which of its ways of working."""

    full: str
    is_async: bool = False

    @property
    def minor(self) -> int:
        return int(self.full.split(".")[1])

    @property
    def is_todays(self) -> bool:
        return self.minor > 29

    def __str__(self) -> str:
        return f"today's {'async' if self.is_async else 'sync'}" if self.is_todays else f"0.{self.minor}"


VERSIONS = [Version("0.26.0"), Version("0.27.0"), Version("0.28.0"), Version("0.29.0"), Version("0.36.0"), Version("0.36.0", True)]


class BatchThreadDied(Exception):  # noqa: N818  # as the contract calls it
    """What the host could not read has ended its only batch thread: this and every later request would hang."""


@dataclass
class Client:
    """An HTTP client: what it has sent, and what it has got."""

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    seed: int = field(default_factory=lambda: random.getrandbits(32) - (1 << 31))
    status: int | None = None
    got: dict[str, str] = field(default_factory=dict)  # headers
    chunks: list[str] = field(default_factory=list)
    is_over: bool = False
    num_steps: int = 0
    buffered: str = ""
    _data_came: bool = False

    @classmethod
    def of(cls, content_type: str = "application/json", **body: object) -> "Client":
        return cls(json.dumps(body).encode(), {"Content-Type": content_type})

    @property
    def text(self) -> str:
        return "".join(self.chunks)

    @property
    def json(self):
        return json.loads(self.text)

    @property
    def lines(self) -> list:
        return [json.loads(line) for line in self.text.splitlines() if line]

    def send(self, text: str) -> None:
        """A chunk goes out; the first takes status and headers with it."""
        self.status = self.status or 200
        self.chunks.append(text)


def install(folder: Path, version: Version) -> Path:
    """The folder with djl_python and djl_python_engine.py as that version's jar has them."""
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = f"__version__ = '{version.full}'\n\nfrom djl_python.inputs import Input\nfrom djl_python.outputs import Output\n"
    (folder / "djl_python" / "__init__.py").write_text(text)
    return folder


class DjlHost:
    """One worker group. Use as a context manager: it starts, loads and stops it."""

    def __init__(
        self,
        version: Version,
        properties: Mapping[str, str],
        *,
        degree: int = 1,
        model_dir: Path | None = None,
        entry_point: str = "lmi_dist_handler",
        predict_timeout_s: float = 60.0,
        environment: Mapping[str, str] | None = None,
        python: Sequence[str] = (sys.executable,),
    ) -> None:
        """`properties` are those of serving.properties, `degree` what tensor_parallel_degree comes to, `python` how a script is
        started."""
        self.python = python
        self.version, self.degree = version, degree
        self.wire = HostWire(version.minor)
        self.given = dict(properties)
        self.is_mpi = self.given.get("engine", "MPI") == "MPI"
        self.num_ranks = degree if self.is_mpi else 1
        self.folder = Path(tempfile.mkdtemp(prefix="djl-"))
        self.model_dir = model_dir or self.folder
        self.cache = install(self.folder / "cache", version)
        self.entry_point = entry_point
        self.timeout_s = predict_timeout_s
        self.environment = {**os.environ, **(environment or {})}
        self.port = 19000
        self.lines: list[str] = []
        self.batch: list[Client] = []
        self.must_reset = False
        self.last_replies: list[Reply] = []
        self.init_replies: list[Reply] = []
        self.connections: list[socket.socket] = []
        self.is_passive = (
            version.is_todays and self.given.get("option.use_passive_workers") != "false"
        )  # ranks above 0 are not asked
        self.process: subprocess.Popen[str] | None = None
        self.reader: threading.Thread | None = None

    def __enter__(self) -> "DjlHost":
        self.start()
        reply = self.load()
        assert reply.code < 300, f"{reply.message}\n" + "\n".join(self.lines)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- processes (contract 1) ----

    @property
    def socket_name(self) -> Path:
        return self.folder / f"djl_sock.{self.port}"

    def command(self) -> list[str]:
        """The version's exact argv (contract 1.2, 1.3), with this environment's mpirun and python."""
        engine = [*self.python, str(self.cache / "djl_python_engine.py")]
        where = ["--sock-type", "unix", "--sock-name", str(self.socket_name)]
        entry = ["--entry-point", self.entry_point]
        recommended = ["--recommended-entry-point", RECOMMENDED] if self.version.minor >= 29 else []
        mode = ["--async-mode" if self.version.is_async else "--no-async-mode"]
        todays = ["--log-level", "info", *mode] if self.version.is_todays else []
        if not self.is_mpi:
            cluster = ["--cluster-size", "1", *recommended] if self.version.minor >= 29 else []
            return [*engine, *where, "--model-dir", str(self.model_dir), *entry, "--device-id", "-1", *cluster, *todays]
        stages = ["--pipeline-parallel-degree", "1"] if self.version.is_todays else []
        return [
            *("mpirun", "-np", str(self.degree), "--allow-run-as-root", "--bind-to", "none"),
            *("--mca", "btl_vader_single_copy_mechanism", "none", "--tag-output"),
            *("-x", "FI_PROVIDER=efa", "-x", "RDMAV_FORK_SAFE=1", "-x", "FI_EFA_USE_DEVICE_RDMA=1"),
            *("-x", "LD_LIBRARY_PATH", "-x", "PYTHONPATH", "-x", "CUDA_VISIBLE_DEVICES=", "-x", "MASTER_ADDR=127.0.0.1"),
            *("-x", f"MASTER_PORT={self.port}", "-x", "MKL_DYNAMIC=FALSE"),
            *engine,
            *("--model-dir", str(self.model_dir), *entry, *where, "--tensor-parallel-degree", str(self.degree)),
            *stages,
            *recommended,
            *todays,
        ]

    def start(self) -> None:
        """Start the group, wait for each rank's marker, connect to all of them. Once more if mpirun itself could not, as now and
        then on a busy machine: DJL would start the group again, too."""
        self._launch()
        if any(NO_LISTENER in line for line in self.lines):
            self.lines.clear()
            self._launch()
        self.connections = [self._connect(rank) for rank in range(self.num_ranks)]

    def _launch(self) -> None:
        self.kill_dangling()
        paths = [self.environment.get("PYTHONPATH", ""), str(self.cache), str(self.model_dir)]
        search = os.pathsep.join([str(Path(sys.executable).parent), self.environment["PATH"]])
        environment = {
            "LD_LIBRARY_PATH": "",
            **self.environment,
            "PATH": search,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        self.process = subprocess.Popen(
            self.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.model_dir, env=environment
        )
        marks = threading.Semaphore(0)
        self.reader = threading.Thread(target=self._read_lines, args=(self.process.stdout, marks), daemon=True)
        self.reader.start()
        for _ in range(self.num_ranks):
            assert marks.acquire(timeout=START_TIMEOUT_S), "Python process startup time out."
            assert self.process.poll() is None or self.is_mpi, "Python stream closed unexpectedly\n" + "\n".join(self.lines)

    def _read_lines(self, stream, marks) -> None:
        with stream:
            for line in stream:
                self.lines.append(line.rstrip("\n"))
                if STARTED in line:
                    marks.release()
        for _ in range(self.num_ranks):
            marks.release()

    def _connect(self, rank: int) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(START_TIMEOUT_S)
        try:
            connection.connect(f"{self.socket_name}.{rank}" if self.is_mpi else str(self.socket_name))
        except OSError as error:
            raise AssertionError("\n".join(self.lines)) from error
        return connection

    def kill_dangling(self) -> None:
        for path in self.folder.glob(f"{self.socket_name.name}*.pid"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)
            path.unlink(missing_ok=True)

    def disconnect(self) -> None:
        for connection in self.connections:
            connection.close()
        for path in self.folder.glob(f"{self.socket_name.name}*"):
            if path.suffix != ".pid":
                path.unlink(missing_ok=True)

    def kill(self) -> None:
        """destroyForcibly: with MPI it hits mpirun only."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.disconnect()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
            self.kill()
        self.kill_dangling()
        if self.reader is not None:
            self.reader.join(5)

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob(f"{self.socket_name.name}*.pid")]

    # ---- requests (contract 2.5, 3.5, 5.7) ----

    def init_properties(self) -> dict[str, str]:
        """What this version makes of serving.properties, its recommender included."""
        values = {key.removeprefix("option."): value for key, value in self.given.items()}
        values["handler"] = "handle"
        if self.is_mpi:
            groups = dict.fromkeys(("minWorkers", "gpu.minWorkers", "maxWorkers", "gpu.maxWorkers"), "1")
            values |= {"mpi_mode": "true", **groups}
        if values.get("tensor_parallel_degree") == "max" and self.version.minor >= 27:
            values["tensor_parallel_degree"] = str(self.degree)
        if self.version.minor >= 27 and values.get("rolling_batch") not in (None, "disable"):
            values.setdefault("max_rolling_batch_size", "256")
        if self.version.minor >= 29:
            values.setdefault("pipeline_parallel_degree", "1")
        if self.version.is_todays and values.get("rolling_batch") == "lmi-dist":
            values["rolling_batch"] = "vllm"
        if self.version.is_async:
            values |= {"rolling_batch": "disable", "async_mode": "true"}
        return values

    def load(self) -> Reply:
        """The init request, to all ranks; the reply that counts."""
        message = self.wire.request(self.init_properties(), [])
        for connection in self.connections:
            connection.sendall(message)
        waited_for = self.asked
        self.init_replies = [self.wire.reply(connection) for connection in waited_for]
        return self.init_replies[-1]

    @property
    def asked(self) -> list[socket.socket]:
        return self.connections[:1] if self.is_passive else self.connections

    def exchange(self, properties, content) -> Reply:
        """One request, one reply: 0.26 to 0.29 ask every rank and take the last one's word, today's rank 0 unless told else."""
        message = self.wire.request(properties, content)
        for connection in self.asked:
            connection.settimeout(self.timeout_s)
            connection.sendall(message)
        self.last_replies = [self.wire.reply(connection) for connection in self.asked]
        return self.last_replies[-1]

    # ---- the rolling batch (contract 4) ----

    def roll(self, clients: Sequence[Client], *, limit: int = 32, on_step: Callable[[], object] = lambda: None) -> None:
        """Serve all of them, at most `limit` at a time, to the end."""
        waiting = list(clients)
        while waiting or self.batch:
            room = limit - len(self.batch)
            self.batch += waiting[:room]
            waiting = waiting[room:]
            self.step()
            on_step()

    def step(self, *, resend: bool = False) -> Reply:
        """One step of all active requests. `resend`: with the bodies of known requests, too."""
        properties, content = {"batch_size": str(len(self.batch)), "handler": "handle"}, []
        if self.must_reset:
            properties["reset_rollingbatch"] = "true"
            self.must_reset = False
        for place, client in enumerate(self.batch):
            is_new = resend or not client._data_came
            if is_new:
                properties |= {f"batch_{place:03d}.{key}": value for key, value in client.headers.items()}
            content.append((f"batch_{place:03d}.data", client.body if is_new else None))
            if is_new:
                content.append((f"batch_{place:03d}.seed", str(client.seed).encode()))
        reply = self.exchange(properties, content)
        if reply.code != 200 or len(reply.content) != len(self.batch):
            self._fail(reply)
        else:
            headers = self._headers(reply)
            for place, (client, (_, value)) in enumerate(zip(self.batch, reply.content, strict=True)):
                self._take(client, value, headers.get(place, {}))
            self.batch = [client for client in self.batch if not client.is_over]
        return reply

    def forget(self) -> None:
        """Clear the list without completing anybody, as after an EngineException, and without telling the worker."""
        self.batch = []

    def _fail(self, reply: Reply) -> None:
        for client in self.batch:
            client.status = client.status or (reply.code if self.version.is_todays else 200)
            client.send(json.dumps({"code": reply.code, "message": "Batch inference failed"}))
            client.is_over = True
        self.batch, self.must_reset = [], True

    def _headers(self, reply: Reply) -> dict[int, dict[str, str]]:
        """Response headers by place. 0.26 ignores them: the option tells its content type."""
        found: dict[int, dict[str, str]] = {}
        for key, value in reply.properties.items():
            if self.version.minor >= 27 and key.startswith("batch_"):
                place, _, name = key[6:].partition("_")
                if not place.isdecimal():
                    raise BatchThreadDied(key)
                found.setdefault(int(place), {})[name] = value
        return found

    def _take(self, client: Client, value: bytes, headers: Mapping[str, str]) -> None:
        if not value or (value[:1] == b"{" and not self.version.is_todays):
            raise BatchThreadDied(f"an item begins with {value[:10]!r}")
        item = self.wire.map(value)
        if None in item.values() or "data" not in item:
            raise BatchThreadDied(f"an item without data: {item}")
        client._data_came = True
        client.num_steps += 1
        if client.status is None:
            client.got |= self._content_type() if self.version.minor == 26 else headers
        is_last, data = item.get("last", "").lower() == "true", item["data"]
        if "code" in item and not (self.version.is_todays and not data and not is_last):
            self._take_error(client, int(item["code"]), item.get("error", ""))
        else:
            self._take_text(client, data, is_last)
        client.is_over = client.is_over or is_last

    def _content_type(self) -> dict[str, str]:
        form = self.given.get("option.output_formatter", "json")
        return {"Content-Type": f"application/{form}"} if form in ("json", "jsonlines") else {}

    def _take_error(self, client: Client, code: int, error: str) -> None:
        """The item's data is dropped, in 0.26 with what was held back."""
        if self.version.minor >= 29 and client.status is None:
            client.status = code
        indent = 2 if self.version.minor == 26 else None
        client.send(json.dumps({"error": error, "code": code}, indent=indent))
        client.is_over = True

    def _take_text(self, client: Client, data: str, is_last: bool) -> None:
        minor = self.version.minor
        if minor == 26:
            client.buffered += data
            if is_last or client.num_steps % BUFFER == 1:
                client.send(client.buffered)
                client.buffered = ""
        elif minor == 29 and not data:
            if is_last:
                raise AssertionError("a last item without text: the response would never end")
        elif data or is_last or minor < 29:
            client.send(data)

    # ---- without rolling batch (contract 3.6), and async mode (2.7) ----

    def ask(self, client: Client) -> Reply:
        """One request by itself."""
        return self.exchange({**client.headers, "handler": "handle"}, [("data", client.body)])

    def merge(self, clients: Sequence[Client]) -> list[bytes]:
        """Several jobs in one call; each one's answer."""
        properties = {"batch_size": str(len(clients)), "handler": "handle"}
        for place, client in enumerate(clients):
            properties |= {f"batch_{place:03d}.{key}": value for key, value in client.headers.items()}
        reply = self.exchange(properties, [(f"batch_{place:03d}.data", client.body) for place, client in enumerate(clients)])
        if reply.code >= 300:
            return [reply.content[0][1]] * len(clients)
        assert len(reply.content) == len(clients), f"Batch output size mismatch, expected: {len(clients)}"
        answers = dict.fromkeys(range(len(clients)), b"")
        for key, value in reply.content:
            place, _, _ = (key or "").removeprefix("batch_").partition(".")
            assert place.isdecimal(), f"Unexpected batch output key: {key}"
            answers[int(place)] = value
        return list(answers.values())

    def go(self, clients: Sequence[Client]) -> None:
        """All at once in async mode, each to its end."""
        running = {str(uuid.uuid4()): client for client in clients}
        for connection in self.asked:
            connection.settimeout(self.timeout_s)
            for tracking_id, client in running.items():
                properties = {**client.headers, "handler": "handle", "request_tracking_id": tracking_id}
                connection.sendall(self.wire.request(properties, [("data", client.body)]))
        while running:
            for ready in select.select(self.asked, [], [], self.timeout_s)[0]:
                reply = self.wire.reply(ready)
                client = running.get(reply.properties["request_tracking_id"])
                if client is not None:  # else a warning
                    self._take_frame(client, reply)
            running = {key: client for key, client in running.items() if not client.is_over}

    def _take_frame(self, client: Client, reply: Reply) -> None:
        if reply.code != 200:
            client.status = client.status or reply.code
            client.send(json.dumps({"code": reply.code, "message": f"Async Inference Failure {reply.message}"}))
            client.is_over = True
            return
        assert reply.content, "code 200 without a content item: the whole group is restarted"
        item = self.wire.map(reply.content[0][1])
        if client.status is None:
            client.got |= reply.properties
            client.status = int(item["code"]) if "code" in item else None
        client.send(item["data"])
        client.is_over = item["last"].lower() == "true"


def wait_until(is_true: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
