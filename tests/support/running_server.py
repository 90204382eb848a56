"""`lmi-dist serve` as its users have it: a process on a free port, its log as a list of lines."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

WORDS = ("OPTION_", "SERVING_", "HF_", "MODEL_", "ARGS_", "TENSOR_")  # an operator's own would change what is tested


class Server:
    """`lmi-dist serve` on a free port, its log as a list of lines."""

    program: tuple[str, ...] = ("-m", "lmi_dist_handler.cli")

    def __init__(self, *arguments: str, **variables: str) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(WORDS)}
        self.process = subprocess.Popen(
            [sys.executable, *self.program, "serve", "--port", "0", *arguments],
            env={**environ, **variables},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            self.lines.extend(line.rstrip() for line in iter(stream.readline, ""))

    def _read_line(self, pattern: str) -> str | None:
        return next((found[1] for line in list(self.lines) if (found := re.search(pattern, line))), None)

    @property
    def url(self) -> str:
        until(lambda: self._read_line(r"listening on (http://\S+),") is not None or self.process.poll() is not None)
        url = self._read_line(r"listening on (http://\S+),")
        assert url is not None, self.lines
        return url

    def ping(self) -> httpx.Response:
        return httpx.get(f"{self.url}/ping")

    def wait_until_ready(self) -> None:
        until(lambda: self.ping().status_code == 200, 60)

    def post(self, path: str, **request: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=90, **request)  # loading a model takes long on a busy machine

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return float(next(line for line in text.splitlines() if line.startswith(name)).rpartition(" ")[2])

    def end(self) -> int:
        self.process.terminate()
        status = self.process.wait(20)
        self._reader.join(5)
        return status


def until(is_true: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
