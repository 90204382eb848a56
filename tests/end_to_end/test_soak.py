"""The long counts (`make soak`): many mixed requests, many at once, and ten minutes of fuzzing. Nothing may be lost or kept.

SOAK_SCALE=0.1 runs a tenth of it.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmi_dist_handler import openapi, properties
from lmi_dist_handler.options import OPTIONS
from running_server import Server, until

from lmi_dist import ConfigError

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

SCALE = float(os.environ.get("SOAK_SCALE", "1"))
NUM_REQUESTS, NUM_WARM, NUM_AT_ONCE = int(10_000 * SCALE), int(2_000 * SCALE), max(1, int(2_000 * SCALE))
FUZZ_S = 600 * SCALE
CONCURRENCY = 32
MEGA = 1 << 20
MOST_GROWTH = 16_000_000  # bytes of resident memory, host and worker
NUM_PARTS, WARM_PARTS = 8, 2  # of a fuzzing's time, and of them those before which memory may grow
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
LONG_CALM = {"deadline": None, "database": None, "max_examples": 100, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("soak") / "tiny"
    tiny_models.save(tiny_models.build("llama2-gqa", max_position_embeddings=1024), folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    server = Server(SERVING_LOAD_MODELS=f"tiny={folder}", OPTION_KV_CACHE_MEMORY_BYTES=str(4 * MEGA), SERVING_READ_TIMEOUT="5")
    try:
        server.wait_until_ready()
        yield server
        assert not [line for line in server.lines if "Traceback" in line or "Exception in" in line]
        assert server.metric("lmi_worker_restarts_total") == 0
        assert server.ping().status_code == 200
    finally:
        server.end()


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Figures for whoever runs this, also when all is well."""

    def out(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}")

    return out


@pytest.fixture(autouse=True)
def nothing_is_kept(request: pytest.FixtureRequest, tell: Callable[[str], None]) -> Iterator[None]:
    """After each test on the server: no request, no block, no descriptor more than before."""
    if "server" not in request.fixturenames:
        yield
        return
    server: Server = request.getfixturevalue("server")
    before = num_files(server)
    yield
    until(lambda: server.metric("lmi_requests_in_flight") == server.metric("lmi_sequences_running") == 0, 60)
    until(lambda: num_files(server) <= before, 90)
    free, all_blocks = server.metric("lmi_kv_blocks_free"), server.metric("lmi_kv_blocks{")
    tell(f"afterwards: {free:g} of {all_blocks:g} blocks free, {num_files(server)} descriptors, {before} before\n")
    assert free == all_blocks


def processes(server: Server) -> list[psutil.Process]:
    """The host and its worker."""
    host = psutil.Process(server.process.pid)
    return [host, *host.children(recursive=True)]


def num_files(server: Server) -> int:
    return sum(process.num_fds() for process in processes(server))


def resident_bytes(server: Server) -> int:
    return sum(int(process.memory_info().rss) for process in processes(server))


# ---- many ----


class Mix:
    """Requests of all kinds, the same in each run; `counts` tells how they ended."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self._client = client
        self._random = random.Random(seed)
        self.counts: dict[int, int] = {}

    async def one(self) -> None:
        kind = self._random.choice(
            [self._whole, self._stream, self._left, self._chat, self._completion, self._bad, self._candidates]
        )
        code = await kind()
        self.counts[code] = self.counts.get(code, 0) + 1

    def _body(self, **parameters: Any) -> dict[str, Any]:
        words = " ".join(self._random.choices(["hello", "world", "one", "two", "é", "日本"], k=self._random.randint(1, 60)))
        return {"inputs": words, "parameters": {"max_new_tokens": self._random.randint(1, 24), **parameters}}

    async def _post(self, path: str, body: object) -> int:
        return (await self._client.post(path, json=body)).status_code

    async def _whole(self) -> int:
        return await self._post("/invocations", self._body(do_sample=True, temperature=0.9, details=True, logprobs=3))

    async def _stream(self) -> int:
        return await self._post(
            "/invocations", {**self._body(output_formatter=self._random.choice(["sse", "jsonlines"])), "stream": True}
        )

    async def _left(self) -> int:
        """A client that goes after the first piece, or before any."""
        body = {**self._body(), "stream": True}
        body["parameters"] |= {"max_new_tokens": 900, "ignore_eos_token": True}
        if self._random.random() < 0.5:
            try:
                await self._client.post("/invocations", json={**body, "stream": False}, timeout=0.02)
            except httpx.TimeoutException:
                return 0
        async with self._client.stream("POST", "/invocations", json=body) as answer:
            async for _ in answer.aiter_raw():
                break
        return 0

    async def _chat(self) -> int:
        messages = [{"role": "user", "content": "hi " * self._random.randint(1, 30)}]
        return await self._post(
            "/v1/chat/completions", {"messages": messages, "max_tokens": 8, "stream": self._random.random() < 0.5}
        )

    async def _completion(self) -> int:
        prompt = [self._random.randint(3, 100) for _ in range(self._random.randint(1, 300))]
        return await self._post("/v1/completions", {"prompt": prompt, "max_tokens": 4, "echo": True, "logprobs": 2})

    async def _bad(self) -> int:
        path = self._random.choice(["/invocations", "/v1/completions", "/generate", "/nowhere"])
        return await self._post(path, self._random.choice([{"inputs": 7}, [], {"prompt": "a", "n": -1}, {"inputs": "a" * 100_000}]))

    async def _candidates(self) -> int:
        return await self._post(
            "/invocations", self._body(do_sample=True, n=3, seed=self._random.randint(0, 99), stop_sequences=["e"])
        )


async def send(mix: Mix, count: int) -> None:
    """`count` requests, CONCURRENCY of them at a time."""
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            await mix.one()

    await asyncio.gather(*(some() for _ in range(CONCURRENCY)))


def run(server: Server, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]], limit: int) -> None:
    async def main() -> None:
        limits = httpx.Limits(max_connections=limit, max_keepalive_connections=limit)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            await work(client)

    asyncio.run(main())


def test_mixed_requests_leave_nothing(server: Server, tell: Callable[[str], None]) -> None:
    marks: list[tuple[int, int]] = []

    async def work(client: httpx.AsyncClient) -> None:
        mix = Mix(client, 1)
        for count in (NUM_WARM, NUM_REQUESTS - NUM_WARM):
            await send(mix, count)
            marks.append((resident_bytes(server), num_files(server)))
        tell(f"{NUM_REQUESTS} requests, answers by status (0: left early): {dict(sorted(mix.counts.items()))}")
        assert set(mix.counts) <= {0, 200, 400, 404, 422, 424}

    started = time.monotonic()
    run(server, work, CONCURRENCY)

    (warm, warm_files), (end, end_files) = marks
    tell(f"in {time.monotonic() - started:.0f} s; resident {warm / MEGA:.1f} MiB after {NUM_WARM}, {end / MEGA:.1f} MiB at the end")
    tell(f"descriptors {warm_files} and {end_files}")
    assert end - warm <= MOST_GROWTH
    assert end_files <= warm_files + CONCURRENCY  # connections that are kept open; when they are closed, `nothing_is_kept` counts


def test_many_at_once_are_all_answered(server: Server, tell: Callable[[str], None]) -> None:
    answers: list[httpx.Response] = []

    async def work(client: httpx.AsyncClient) -> None:
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 8, "ignore_eos_token": True}}
        answers.extend(await asyncio.gather(*(client.post("/invocations", json=body) for _ in range(NUM_AT_ONCE))))

    run(server, work, NUM_AT_ONCE)

    codes = [answer.status_code for answer in answers]
    tell(f"{NUM_AT_ONCE} at once: {codes.count(200)} answered, {codes.count(503)} told to come back")
    assert codes.count(200) >= min(NUM_AT_ONCE, 1000)
    assert set(codes) <= {200, 503}
    assert len({answer.text for answer in answers if answer.status_code == 200}) == 1
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)


# ---- fuzzing ----

NAMES = sorted(
    {"inputs", "parameters", "stream", "messages", "prompt", "model", "tools", "role", "content", "stream_options", "adapters"}
    | set(openapi.LMI_ONLY)
    | set(openapi.OPENAI_ONLY)
    | set(openapi.sampling_fields(openapi.CHAT))
    | set(openapi.sampling_fields(openapi.LMI))
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["user", "sse", "json", "auto"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), inner, max_size=6),
)
PARAMETERS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
BODIES = st.one_of(
    st.builds(lambda given: json.dumps(given).encode(), PARAMETERS),
    st.builds(lambda text, given: json.dumps({"inputs": text, "parameters": given}).encode(), st.text(), PARAMETERS),
    st.builds(lambda text, given: json.dumps({**given, "prompt": text}).encode(), st.text() | st.lists(st.integers()), PARAMETERS),
    st.builds(
        lambda text, given: json.dumps({**given, "messages": [{"role": "user", "content": text}]}).encode(), VALUES, PARAMETERS
    ),
    st.binary(max_size=200),
)
PATHS = ("/invocations", "/models/tiny/invoke", "/generate", "/generate_stream", "/", "/v1/completions", "/v1/chat/completions")
KINDS = (
    "application/json",
    "text/plain",
    "text/csv",
    "application/x-www-form-urlencoded",
    "",
    "x/y",
    "application/json; charset=utf-16",
)


class Fuzzing:
    """A share of the ten minutes, and what came of it."""

    def __init__(self, share: float, server: Server | None = None) -> None:
        self.codes: dict[int, int] = {}
        self._server = server
        self._took_s = FUZZ_S * share
        self._resident: list[int] = []

    def count(self, code: int) -> None:
        self.codes[code] = self.codes.get(code, 0) + 1

    def run(self, work: Callable[[], None]) -> None:
        """Repeat a round of examples, each of them new, and look at the memory after each eighth of the time. A leak grows in each
        of them. A request for 128 answers of 900 tokens takes 100 MB, which malloc keeps for the next one: growth, but once."""
        begun = time.monotonic()
        for part in range(1, NUM_PARTS + 1):
            while time.monotonic() < begun + self._took_s * part / NUM_PARTS:
                work()
            if self._server:
                self._resident.append(resident_bytes(self._server))
        growths = [after - before for before, after in pairwise(self._resident[WARM_PARTS - 1 :])]
        if growths:
            assert median(growths) * len(growths) <= MOST_GROWTH, self

    def __str__(self) -> str:
        num_5xx = sum(count for code, count in self.codes.items() if code >= 500)
        told = f"{self._took_s / 60:.1f} min, {sum(self.codes.values())} requests, {num_5xx} with 5xx"
        grown = ", ".join(f"{size / MEGA:.1f}" for size in self._resident)
        return f"{told}, resident {grown} MiB; by status {dict(sorted(self.codes.items()))}"


def bounded(body: bytes) -> bytes:
    """Without the wish for a thousand tokens, which is right but takes its time."""
    return body if b"ignore_eos" not in body and b"max" not in body else body[:2000]


def test_fuzzed_bodies_get_no_500(server: Server, tell: Callable[[str], None]) -> None:
    fuzzing = Fuzzing(0.4, server)

    with httpx.Client(base_url=server.url, timeout=60) as client:

        @settings(**LONG_CALM)
        @given(path=st.sampled_from(PATHS), body=BODIES, kind=st.sampled_from(KINDS))
        def post(path: str, body: bytes, kind: str) -> None:
            answer = client.post(path, content=bounded(body), headers={"content-type": kind})
            fuzzing.count(answer.status_code)
            assert answer.status_code < 500, (path, body, answer.text)

        fuzzing.run(post)

    tell(f"fuzzed bodies: {fuzzing}")


def test_published_schema_holds(server: Server, tell: Callable[[str], None]) -> None:
    import schemathesis  # slow, and ordinary runs collect this file too

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = schemathesis.checks.CHECKS.get_by_names(CHECKS)
    operations = [found.ok() for found in schema.get_all_operations()]
    fuzzing, labels = Fuzzing(0.4, server), set()

    def fuzz(operation: Any) -> None:
        @settings(**{**LONG_CALM, "max_examples": 10})
        @given(case=operation.as_strategy())
        def call(case: Any) -> None:
            fuzzing.count(case.call_and_validate(checks=checks, timeout=60).status_code)
            labels.add(operation.label)

        call()

    def rounds() -> None:
        for operation in operations:
            fuzz(operation)

    fuzzing.run(rounds)

    tell(f"schemathesis, {len(labels)} operations: {fuzzing}")
    assert len(labels) == len(operations)


LINES = st.one_of(
    st.builds(lambda key, value: f"{key}={value}", st.sampled_from(sorted(OPTIONS)), st.text(max_size=20) | LEAVES.map(str)),
    st.text(max_size=40),
    st.sampled_from(
        ["option.model_id=/nowhere", "a\\\n  b", "\\u00e9=\\u12", "! note", "# note", "=x", ":", "option.dtype : bf16"]
    ),
)


def test_fuzzed_properties_give_settings_or_a_sentence(tmp_path: Path, tell: Callable[[str], None]) -> None:
    counts = {"settings": 0, "refused": 0}
    file = tmp_path / "serving.properties"

    @settings(**LONG_CALM)
    @given(content=st.lists(LINES, max_size=8).map("\n".join).map(str.encode) | st.binary(max_size=100))
    def load(content: bytes) -> None:
        file.write_bytes(content)
        try:
            properties.load(tmp_path, {})
            counts["settings"] += 1
        except ConfigError:
            counts["refused"] += 1

    fuzzing = Fuzzing(0.2)
    fuzzing.run(load)

    tell(f"fuzzed serving.properties: {FUZZ_S * 0.2 / 60:.1f} min, {counts}")
