"""handlers/lmi_dist_handler/{management,registry}.py: real HTTP and real worker processes, with an entry point made for tests."""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from lmi_dist_handler import registry
from lmi_dist_handler.front import HttpError
from lmi_dist_handler.host import Host
from lmi_dist_handler.http import Api
from lmi_dist_handler.launcher import Launch
from lmi_dist_handler.metrics import Metrics
from lmi_dist_handler.properties import load

MODELS = {"one": "", "two": "", "bad": "fault", "big": "room", "slow": "slow"}
LAZY_BYTES = 3000 << 20  # what each says that its memory plan has beyond what it holds
Check = Callable[[httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A model store. `model_id` of each is its name: the fake worker wants no checkpoint."""
    for name in MODELS:
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / "serving.properties").write_text(f"option.model_id=hub/{name}\n")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "serving.properties").write_text("option.model_id=hub/outside\n")
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def _fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts start the fake entry point, told by the model's name how its loading goes."""
    real = Host.__init__

    def init(self: Host, name: str, launch: Launch, properties: dict[str, str], **more: Any) -> None:
        how = MODELS.get(properties["model_id"].rpartition("/")[2], "")
        told = {**properties, "load": how, "lazy": str(LAZY_BYTES)}
        real(self, name, dataclasses.replace(launch, entry_point="fake_worker"), told, **more)

    monkeypatch.setattr(Host, "__init__", init)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))


def serving(store: Path, check: Check, *, start: str = "one", **words: str) -> None:
    """Run `check` against a server of the store whose start-up models are `start`."""
    listed = ",".join(str(store / name) for name in start.split()) or "NONE"
    environ = {"SERVING_MODEL_STORE": str(store), "SERVING_LOAD_MODELS": listed, **words}

    async def main() -> None:
        settings = load(None, environ)
        models = registry.of_settings(settings)
        config = uvicorn.Config(Api(models, settings.server, Metrics()).app(), port=0, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        for model in models.all():
            model.host.start()
        try:
            await asyncio.wait_for(asyncio.gather(*(model.host.settled() for model in models.all())), 20)
            while not server.started:
                await asyncio.sleep(0.005)
            port = server.servers[0].sockets[0].getsockname()[1]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                await check(client)
        finally:
            await models.stop(0)
            server.should_exit = True
            await task

    asyncio.run(main())


async def states(client: httpx.AsyncClient) -> dict[str, str]:
    return {model["modelName"]: model["status"] for model in (await client.get("/models")).json()["models"]}


async def until(client: httpx.AsyncClient, name: str, status: str) -> None:
    deadline = time.monotonic() + 10
    while (await states(client)).get(name) != status:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_registered_model_answers_and_leaves(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        registered = await client.post("/models", params={"url": "two", "model_name": "second", "job_queue_size": "5"})
        told = (await client.post("/predictions/second", content=b"x")).json()
        (described,) = (await client.get("/models/second")).json()
        unnamed = (await client.post("/invocations", content=b"x")).json()
        gone = await client.delete("/models/second")
        after = await client.post("/predictions/second", content=b"x")

        assert (registered.status_code, registered.json()) == (200, {"status": 'Model "second" registered.'})
        assert (told["model_name"], told["model_id"], told["job_queue_size"]) == ("second", "hub/two", "5")
        assert (described["workflowName"], described["models"][0]["loadedAtStartup"]) == ("second", False)
        assert described["models"][0]["queueSize"] == 5
        assert unnamed["model_name"] == "one"  # the only one of the start goes on being the one that need not be named
        assert (gone.status_code, gone.json()) == (200, {"status": 'Model or workflow "second" unregistered'})
        assert (after.status_code, after.json()["message"]) == (404, "Model or workflow not found: second")
        assert not alive(told["pid"])
        assert await states(client) == {"one": "READY"}

    serving(store, check)


@pytest.mark.parametrize(("device", "told"), [("cpu", ("cpu", -1)), ("cuda", ("gpu", 0))])
def test_description_tells_where_the_worker_runs(device: str, told: tuple[str, int], store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        (described,) = (await client.get("/models/one")).json()

        place = described["models"][0]["workerGroups"][0]["device"]
        assert (place["deviceType"], place["deviceId"]) == told

    serving(store, check, OPTION_DEVICE=device)


def test_description_has_djls_shape_and_scaling_changes_nothing(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        (described,) = (await client.get("/models/one")).json()
        (model,) = described["models"]
        (group,) = model["workerGroups"]
        (worker,) = group["workers"]

        assert {*model} == {
            "modelName", "modelUrl", "batchSize", "maxBatchDelayMillis", "maxIdleSeconds", "queueSize", "requestInQueue", "status",
            "loadedAtStartup", "workerGroups",
        }  # fmt: skip
        assert (model["modelName"], model["modelUrl"], model["status"], model["loadedAtStartup"]) == (
            "one",
            "hub/one",
            "READY",
            True,
        )
        assert (group["minWorkers"], group["maxWorkers"], {*group["device"]}) == (1, 1, {"deviceType", "deviceId"})
        assert worker["status"] == "READY"
        assert worker["startTime"].endswith("Z")

        scaled = await client.put("/models/one", params={"min_worker": "1", "max_worker": "1"})
        told = 'Model "one" worker scaled. New Worker configuration min workers:1 max workers:1'
        assert (scaled.status_code, scaled.json()) == (200, {"status": told})

    serving(store, check)


def test_asynchronous_registration_is_scheduled(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        scheduled = await client.post("/models", params={"url": "slow", "synchronous": "false"})
        early = await client.post("/predictions/slow", content=b"x")
        again = await client.post("/models", params={"url": "slow"})
        ping = await client.get("/ping")

        assert (scheduled.status_code, scheduled.json()) == (202, {"status": 'Model "slow" registration scheduled.'})
        assert (early.status_code, early.json()["message"]) == (503, "model slow is not ready: it is still loading")
        assert (again.status_code, again.json()["message"]) == (409, "Model slow is already registered.")
        assert (ping.status_code, ping.json()["slow"]) == (200, {"status": "PENDING"})  # the others answer all the same
        await until(client, "slow", "READY")
        assert (await client.post("/predictions/slow", content=b"x")).status_code == 200

    serving(store, check)


@pytest.mark.parametrize(
    ("name", "code", "kind", "sentence"),
    [
        ("bad", 400, "BadRequestException", "CheckpointError of bad"),
        ("big", 507, "WlmOutOfMemoryException", "MemoryPlanError of big"),
    ],
)
def test_failed_registration_leaves_all_as_it_was(store: Path, name: str, code: int, kind: str, sentence: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        refused = await client.post("/models", params={"url": name})

        assert (refused.status_code, refused.json()) == (code, {"code": code, "type": kind, "message": sentence})
        assert await states(client) == {"one": "READY"}
        assert (await client.get("/ping")).json() == {"one": {"status": "Healthy"}}
        assert (await client.post("/invocations", content=b"x")).status_code == 200

    serving(store, check)


def test_failed_asynchronous_registration_is_shown_and_harms_nobody(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/models", params={"url": "bad", "synchronous": "false"})
        await until(client, "bad", "FAILED")
        (described,) = (await client.get("/models/bad")).json()
        ping = await client.get("/ping")
        replaced = await client.post("/models", params={"url": "two", "model_name": "bad"})

        assert described["models"][0]["reason"] == "CheckpointError of bad"
        assert (ping.status_code, ping.json()["bad"]) == (200, {"status": "FAILED", "reason": "CheckpointError of bad"})
        assert replaced.status_code == 200

    serving(store, check)


def test_unregistering_lets_running_requests_end(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/predictions/one", content=b"wait0.3") as answer:
            pieces = answer.aiter_text()
            await anext(pieces)
            leaving = asyncio.create_task(client.delete("/models/one"))
            await asyncio.sleep(0.05)
            refused = await client.post("/predictions/one", content=b"x")
            rest = "".join([piece async for piece in pieces])

        assert refused.status_code == 404
        assert '"model_name": "one"' in rest
        assert (await leaving).status_code == 200
        assert (await client.get("/ping")).json() == {}  # no model at all is no fault

    serving(store, check)


def test_model_can_leave_while_it_loads(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        registering = asyncio.create_task(client.post("/models", params={"url": "slow"}))
        await until(client, "slow", "PENDING")
        gone = await client.delete("/models/slow")
        told = await registering

        assert gone.status_code == 200
        assert (told.status_code, told.json()["message"]) == (503, "model slow was unregistered or stopped while it was loading")
        assert await states(client) == {}

    serving(store, check, start="")


def test_server_that_stops_takes_no_model() -> None:
    async def main() -> None:
        models = registry.of_settings(load(None, {"SERVING_LOAD_MODELS": "NONE"}))
        await models.stop(0)
        with pytest.raises(HttpError, match="the server is being stopped"):
            await models.register({"url": "two"}, wait=True)

    asyncio.run(main())


def test_versions_of_a_model_stand_side_by_side(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        second = await client.post("/models", params={"url": "two", "model_name": "one", "model_version": "v2"})
        by_path = (await client.post("/predictions/one/v2", content=b"x")).json()
        by_query = (await client.post("/invocations?model_name=one&model_version=v2", content=b"x")).json()
        by_header = (await client.post("/invocations", content=b"x", headers={"model_name": "one", "model_version": "v2"})).json()
        first = (await client.post("/predictions/one", content=b"x")).json()
        described = (await client.get("/models/one")).json()
        ping = (await client.get("/ping")).json()
        await client.delete("/models/one/v2")

        assert second.status_code == 200
        assert [told["model_id"] for told in (by_path, by_query, by_header, first)] == ["hub/two"] * 3 + ["hub/one"]
        assert [entry.get("version") for entry in described] == [None, "v2"]
        assert [*ping] == ["one", "one:v2"]
        assert (await client.get("/models/one/v2")).status_code == 404
        assert (await client.get("/models/one")).status_code == 200

    serving(store, check)


def test_several_models_of_the_start_must_be_named(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        unnamed = await client.post("/invocations", content=b"x")
        named = [await client.post(path, content=b"x") for path in ("/models/one/invoke", "/invocations?model_name=two")]
        pids = {answer.json()["pid"] for answer in named}

        assert (unnamed.status_code, unnamed.json()["message"]) == (400, "Parameter model_name is required.")
        assert len(pids) == 2

    serving(store, check, start="one two")


def test_pages_of_the_list_follow_each_other(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        first = (await client.get("/models?limit=1")).json()
        second = (await client.get(f"/models?limit=1&next_page_token={first['nextPageToken']}")).json()

        assert [model["modelName"] for model in first["models"] + second["models"]] == ["one", "two"]
        assert "nextPageToken" not in second

    serving(store, check, start="one two")


def test_what_is_wrong_with_a_call_is_told(store: Path) -> None:
    outside = store.parent / "outside"
    (store / "link").symlink_to(outside)
    cases: list[tuple[str, str, dict[str, str], int, str]] = [
        ("POST", "/models", {}, 400, "Parameter url is required."),
        ("POST", "/models", {"url": str(outside)}, 400, "lies outside the model store"),
        ("POST", "/models", {"url": str(outside)}, 400, "allow any url with SERVING_ALLOW_ANY_MODEL_URL=true"),
        ("POST", "/models", {"url": "../outside"}, 400, "lies outside the model store"),
        ("POST", "/models", {"url": "link"}, 400, "lies outside the model store"),
        ("POST", "/models", {"url": "s3://bucket/model"}, 400, "lies outside the model store"),
        ("POST", "/models", {"url": "file:///etc"}, 400, "lies outside the model store"),
        ("POST", "/models", {"url": "missing"}, 400, "url='missing' is not a folder"),
        ("POST", "/models", {"url": "djl://x/y"}, 400, "is known but not built yet"),
        ("POST", "/models", {"url": "a\0b"}, 400, "url='a\\x00b' is no path: embedded null byte"),
        ("POST", "/models", {"url": "x" * 300}, 400, "is no path: File name too long"),
        ("POST", "/models", {"url": "two", "model_name": "a/b"}, 400, "POST /models: model_name='a/b' must be"),
        (
            "POST",
            "/models",
            {"url": "two", "synchronus": "false"},
            400,
            "POST /models: synchronus is unknown; did you mean synchronous?",
        ),
        ("POST", "/models", {"url": "two", "synchronous": "maybe"}, 400, "synchronous='maybe' must be true or false"),
        ("POST", "/models", {"url": "two", "engine": "TensorRT"}, 400, "engine='TensorRT' is not one of ours; use MPI or Python"),
        ("POST", "/models", {"url": "two", "device": "7"}, 400, "device='7' is known but not built yet"),
        ("POST", "/models", {"url": "two", "batch_size": "8"}, 400, "batch_size='8' is known but not built yet"),
        ("POST", "/models", {"url": "two", "min_worker": "2"}, 400, "min_worker='2' is known but not built yet"),
        ("POST", "/models", {"url": "two", "job_queue_size": "x"}, 400, "job_queue_size='x' is refused"),
        ("POST", "/models", {"url": "one"}, 409, "Model one is already registered."),
        ("PUT", "/models/one", {"max_worker": "2"}, 400, "max_worker='2' is known but not built yet; a model has one worker"),
        ("PUT", "/models/one", {"scale": "1"}, 400, "PUT: scale is unknown; there are min_worker, max_worker, synchronous"),
        ("PUT", "/models/other", {}, 404, "Model or workflow not found: other"),
        ("DELETE", "/models/other", {}, 404, "Model or workflow not found: other"),
        ("DELETE", "/models/one/v9", {}, 404, "Model or workflow not found: one"),
        ("GET", "/models", {"limit": "0"}, 400, "limit='0' must be an integer of at least 1 and at most 100"),
        ("GET", "/models", {"limit": "²"}, 400, "limit='²' must be"),
        ("GET", "/models", {"next_page_token": "-1"}, 400, "next_page_token='-1' must be"),
        ("PATCH", "/models/one", {}, 405, "PATCH /models/one: this route takes"),
    ]

    async def check(client: httpx.AsyncClient) -> None:
        for method, path, parameters, code, sentence in cases:
            answer = await client.request(method, path, params=parameters)
            assert (answer.status_code, answer.json()["code"]) == (code, code), (method, path, parameters, answer.text)
            assert sentence in answer.json()["message"]
        assert await states(client) == {"one": "READY"}

    serving(store, check)


def test_any_url_is_taken_where_allowed(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/models", params={"url": str(store.parent / "outside")})

        assert answer.status_code == 200

    serving(store, check, start="", SERVING_ALLOW_ANY_MODEL_URL="true")


def test_models_variables_reach_its_worker_alone(store: Path) -> None:
    with (store / "two" / "serving.properties").open("a") as file:
        file.write("option.env=FROM_OPTION_ENV = a=b , OTHER=1\n")

    async def check(client: httpx.AsyncClient) -> None:
        told = {name: (await client.post(f"/predictions/{name}", content=b"x")).json() for name in ("one", "two")}

        assert (told["one"]["env"], told["two"]["env"]) == (None, "a=b")

    serving(store, check, start="one two", SERVING_ALLOW_ENV="true", PYTHONPATH=str(Path(__file__).parents[1] / "support"))


def test_later_model_leaves_what_the_first_was_promised(store: Path) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        first = (await client.post("/predictions/one", content=b"x")).json()
        await client.post("/models", params={"url": "two"})
        second = (await client.post("/predictions/two", content=b"x")).json()

        assert "reserved_memory_mb" not in first
        assert 2990 < int(second["reserved_memory_mb"]) <= 3000 + 7  # less what the first one has taken since it loaded

    (store / "two" / "serving.properties").write_text("option.model_id=hub/two\nreserved_memory_mb=7\n")
    serving(store, check)
