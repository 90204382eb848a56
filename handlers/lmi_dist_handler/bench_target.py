"""What `lmi-dist bench` measures: the engine in this process, or a running server over HTTP. Both answer jobs and tell the time."""

import http.client
import json
import resource
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import urlsplit

from lmi_dist import Engine, EngineConfig, LmiError, Request, SamplingParams
from lmi_dist_handler.bench_work import MAX_RUNNING, ElementBytes, Job, Timing

WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class BenchError(LmiError):
    """A target did not do the work it was asked for, so that its time means nothing."""


class Target(Protocol):
    """Something that can be measured."""

    name: str
    element_bytes: ElementBytes

    def run(self, jobs: Sequence[Job]) -> Timing:
        """Answer all jobs, all there at once. Raises BenchError if one of them fails or has not the length asked for."""

    def peak_mb(self) -> int | None:
        """Most memory that was resident so far; None if it cannot be told."""


class EngineTarget:
    """lmi_dist.Engine, stepped here."""

    def __init__(self, options: Mapping[str, object]) -> None:
        """`options`: values of EngineConfig. Raises what Engine raises."""
        config = EngineConfig.of({"max_batch_size": MAX_RUNNING, **options})
        self.engine = Engine(config)
        resolved = self.engine.config
        self.name = f"engine {resolved.dtype} {resolved.kernels}, {resolved.cpu_threads} threads"
        weight = WEIGHT_BYTES[resolved.dtype]
        self.element_bytes = ElementBytes(weight, cached=1 if resolved.kv_cache_dtype == "fp8" else weight)
        self._num_requests = 0

    def run(self, jobs: Sequence[Job]) -> Timing:
        start, first_s = time.perf_counter(), 0.0
        missing = {self._add(job): job.num_new for job in jobs}
        while self.engine.has_work:
            for output in self.engine.step():
                first_s = first_s or time.perf_counter() - start
                if output.error is not None:
                    raise BenchError(f"a job ended with an error: {output.error}")
                if output.finish_reason is not None:
                    _check_length(missing.pop(output.request_id), output.num_generated_tokens)
        return Timing(time.perf_counter() - start, first_s)

    def _add(self, job: Job) -> str:
        self._num_requests += 1
        params = SamplingParams(temperature=0.0, max_tokens=job.num_new, ignore_eos=True)
        request = Request(id=str(self._num_requests), prompt=job.token_ids, params=params, add_special_tokens=False)
        self.engine.add(request)
        return request.id

    def peak_mb(self) -> int | None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class HttpTarget:
    """A server's /v1/completions, streamed, with at most MAX_RUNNING connections at the same time."""

    element_bytes = ElementBytes(weight=2, cached=2)  # a server computes in bf16 wherever it can

    def __init__(self, url: str) -> None:
        """Raises BenchError when there is no server with a model at `url`."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise BenchError(f"--url={url!r} must look like http://127.0.0.1:8080")
        self._host, self._port = parts.hostname, parts.port or 80
        self._model = self._served_model()
        self.name = f"{url}, model {self._model}"

    def run(self, jobs: Sequence[Job]) -> Timing:
        start = time.perf_counter()
        first = threading.Event()
        first_s: list[float] = []

        def stamp() -> None:
            if not first.is_set():
                first.set()
                first_s.append(time.perf_counter() - start)

        with ThreadPoolExecutor(MAX_RUNNING) as pool:
            for done in [pool.submit(self._complete, job, stamp) for job in jobs]:
                done.result()
        return Timing(time.perf_counter() - start, first_s[0])

    def peak_mb(self) -> int | None:
        return None  # that of another process, perhaps of another machine

    def _complete(self, job: Job, stamp: Any) -> None:
        """One request, to its end; `stamp` is called at each event that brings tokens."""
        body = {
            "model": self._model,
            "prompt": list(job.token_ids),
            "max_tokens": job.num_new,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        usage: dict[str, int] = {}
        for event in self._events("/v1/completions", body):
            if event.get("choices"):
                stamp()
            usage = event.get("usage") or usage
        _check_length(job.num_new, usage.get("completion_tokens", 0))

    def _events(self, path: str, body: dict[str, Any]) -> Any:
        response = self._answer("POST", path, json.dumps(body))
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line.removeprefix(b"data: "))

    def _served_model(self) -> str:
        return str(json.loads(self._answer("GET", "/v1/models").read())["data"][0]["id"])

    def _answer(self, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=600)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            response = connection.getresponse()
        except OSError as error:
            raise BenchError(f"no server answers at http://{self._host}:{self._port}: {error}") from None
        if response.status != 200:
            raise BenchError(f"{path} answered {response.status}: {response.read().decode(errors='replace')}")
        return response


def _check_length(wanted: int, got: int) -> None:
    if got != wanted:
        raise BenchError(f"{wanted} tokens were asked for and {got} came")
