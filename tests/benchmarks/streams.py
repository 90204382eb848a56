"""What HTTP costs: concurrent streams of a server's /v1/completions against the engine alone with the same requests, in turn.

    .venv/bin/python tests/benchmarks/streams.py --model MODEL

The engine lives in this process and the server beside it; one sleeps while the other is measured, so that both have the same
machine. The client is one thread with one selector that looks for nothing but the end; its own CPU time is told, as it takes time
from the server's CPUs too. Prints a line a turn, then the medians.
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

from lmi_dist import Engine, EngineConfig, Request, SamplingParams

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 120.0


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
            for key, _ in selector.select():
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

    def _serves(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    def host_cpu_s(self) -> float:
        """CPU time of the process that speaks HTTP."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


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
    num_tokens = options.streams * options.new
    rates: dict[str, list[float]] = {"engine": [], "http": []}
    try:
        for turn in range(-1, options.turns):  # the first warms up
            wanted = prompts(turn, options, vocab)
            alone_s = engine_s(engine, turn, wanted, options.new)
            host_s, own_s = server.host_cpu_s(), time.process_time()
            served_s = http_s(server.port, wanted, options.new)
            host_us, client_us = ((now - before) / num_tokens * 1e6 for now, before in (
                (server.host_cpu_s(), host_s), (time.process_time(), own_s)))  # fmt: skip
            if turn >= 0:
                rates["engine"].append(num_tokens / alone_s)
                rates["http"].append(num_tokens / served_s)
                cpu = f"CPU a token: host {host_us:.0f} us, client {client_us:.0f} us"
                print(f"engine {num_tokens / alone_s:.0f} tok/s, HTTP {num_tokens / served_s:.0f}; {cpu}", flush=True)
    finally:
        server.stop()
    alone, served = (statistics.median(rates[name]) for name in ("engine", "http"))
    print(f"{options.streams} streams, medians: engine {alone:.0f} tok/s, HTTP {served:.0f}, {1 - served / alone:.1%} less")
    return 0


if __name__ == "__main__":
    sys.exit(main())
