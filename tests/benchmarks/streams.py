"""What HTTP costs: concurrent streams of a server's /v1/completions against the engine alone with the same requests, in turn.

    .venv/bin/python tests/benchmarks/streams.py --model MODEL

The engine lives in this process and the server beside it; one sleeps while the other is measured, so that both have the same
machine. The client is this one thread, which looks at its sockets once in LOOK_S and for nothing but the end: what it takes, and
what waking it takes, is lost to the server. Prints a line a turn, then the medians: tokens a second both ways, and the CPU time of
a token in the host, in the worker beside the threads that compute, and in the client.
"""

import argparse
import json
import os
import random
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lmi_dist import Engine, EngineConfig, Request, SamplingParams

START_TIMEOUT_S = 120.0
LOOK_S = 0.01  # a step of llama-160m takes four times as long, a turn hundreds of times


class Turn(NamedTuple):
    """What one turn came to: tokens a second, and microseconds of CPU a token."""

    engine: float
    http: float
    host_us: float
    worker_us: float
    client_us: float

    def __str__(self) -> str:
        rates = f"engine {self.engine:.0f} tok/s, HTTP {self.http:.0f}, {1 - self.http / self.engine:.1%} less"
        return f"{rates}; CPU a token: host {self.host_us:.1f} us, worker {self.worker_us:.1f}, client {self.client_us:.1f}"


def prompts(turn: int, options: argparse.Namespace, vocab: int) -> list[list[int]]:
    chance = random.Random(turn)
    return [[chance.randrange(3, vocab) for _ in range(options.prompt)] for _ in range(options.streams)]


def engine_s(engine: Engine, turn: int, wanted: Sequence[list[int]], num_new: int) -> float:
    """Seconds until the engine has given all tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
    start = time.perf_counter()
    for place, ids in enumerate(wanted):
        engine.add(Request(id=f"{turn}.{place}", prompt=tuple(ids), params=params, add_special_tokens=False))
    num_tokens = 0
    while engine.has_work:
        num_tokens += sum(len(output.tokens) for output in engine.step())
    assert num_tokens == num_new * len(wanted), num_tokens
    return time.perf_counter() - start


def http_s(port: int, wanted: Sequence[list[int]], num_new: int) -> float:
    """Seconds until every stream has said [DONE]."""
    streams = [socket.create_connection(("127.0.0.1", port)) for _ in wanted]
    requests = [_request(ids, num_new) for ids in wanted]
    start = time.perf_counter()
    last: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector:
        for opened, request in zip(streams, requests, strict=True):
            opened.sendall(request)
            opened.setblocking(False)
            selector.register(opened, selectors.EVENT_READ, opened)
            last[opened] = b""
        while selector.get_map():
            time.sleep(LOOK_S)
            for key, _ in selector.select(0):
                stream: socket.socket = key.data
                data = stream.recv(65536)
                assert data, f"a stream ended after {last[stream]!r}"
                last[stream] = data
                if b"[DONE]" in data:
                    selector.unregister(stream)
    seconds = time.perf_counter() - start
    for ended, data in last.items():
        assert b'"completion_tokens": %d,' % num_new in data, data
        ended.close()
    return seconds


def _request(ids: list[int], num_new: int) -> bytes:
    values = {"prompt": ids, "max_tokens": num_new, "temperature": 0.0, "ignore_eos": True, "stream": True}
    body = json.dumps({"model": "tgi", **values, "stream_options": {"include_usage": True}}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class Server:
    """`lmi-dist serve` on a free port, and what its processes have used of the CPUs."""

    def __init__(self, model: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        environment = os.environ | {"OPTION_MODEL_ID": str(model.absolute()), "SERVING_PORT": str(self.port)}
        command = [str(Path(sys.executable).with_name("lmi-dist")), "serve"]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + START_TIMEOUT_S
        while not self._serves():
            assert time.monotonic() < until, "the server has not started in time"
            assert self._process.poll() is None, "the server has ended"
            time.sleep(0.2)
        described = json.loads(self._get("/models/model"))
        self._worker = int(described[0]["models"][0]["workerGroups"][0]["workers"][0]["id"])

    def _serves(self) -> bool:
        try:
            return bool(self._get("/ping"))
        except (urllib.error.URLError, ConnectionError):
            return False

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            body: bytes = answer.read()
            return body

    def host_cpu_s(self) -> dict[str, float]:
        """CPU time of each thread of the process that speaks HTTP."""
        return _thread_cpu_s(self._process.pid)

    def worker_cpu_s(self) -> dict[str, float]:
        """CPU time of each thread of the process that has the engine."""
        return _thread_cpu_s(self._worker)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


def _thread_cpu_s(pid: int) -> dict[str, float]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return {thread.name: int((thread / "schedstat").read_text(encoding="ascii").split()[0]) / 1e9 for thread in threads}


def _taken_s(before: dict[str, float], after: dict[str, float]) -> list[float]:
    """By thread, least first."""
    return sorted(cpu_s - before.get(name, 0.0) for name, cpu_s in after.items())


def take_turn(turn: int, engine: Engine, server: Server, options: argparse.Namespace, vocab: int) -> Turn:
    wanted = prompts(turn, options, vocab)
    num_tokens = options.streams * options.new
    alone_s = engine_s(engine, turn, wanted, options.new)
    host, worker, client_s = server.host_cpu_s(), server.worker_cpu_s(), time.process_time()
    served_s = http_s(server.port, wanted, options.new)
    client_s = time.process_time() - client_s
    host_s = sum(_taken_s(host, server.host_cpu_s()))
    num_computing = len(os.sched_getaffinity(0))  # the engine's thread and those that help it: a CPU each
    worker_s = sum(_taken_s(worker, server.worker_cpu_s())[:-num_computing])
    return Turn(num_tokens / alone_s, num_tokens / served_s, *(cpu_s / num_tokens * 1e6 for cpu_s in (host_s, worker_s, client_s)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=8, help="tokens (%(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens (%(default)s)")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    vocab = json.loads((options.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    engine = Engine(EngineConfig.of({"model": str(options.model)}))
    server = Server(options.model)
    turns = []
    try:
        take_turn(-1, engine, server, options, vocab)  # warms up
        for turn in range(options.turns):
            turns.append(take_turn(turn, engine, server, options, vocab))
            print(turns[-1], flush=True)
    finally:
        server.stop()
    print(f"{options.streams} streams, medians: {Turn(*map(statistics.median, zip(*turns, strict=True)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
