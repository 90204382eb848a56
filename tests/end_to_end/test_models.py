"""Several models behind one `lmi-dist serve`: one of the start, one registered, each with its own options and worker."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny_models
from running_server import Server, until

GREEDY = {"max_new_tokens": 4, "ignore_eos_token": True}
POOL_MB = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`short` is loaded at the start, `long` is registered: a checkpoint in the store with options of its own."""
    store = tmp_path_factory.mktemp("models") / "store"
    weights = tiny_models.save(tiny_models.build("llama2-gqa"), store / "long")
    (weights / "serving.properties").write_text("option.max_model_len=128\noption.output_formatter=jsonlines\n")
    for name, lines in (
        ("short", f"option.model_id=../long\noption.max_model_len=64\noption.kv_cache_memory_bytes={POOL_MB << 20}\n"),
        ("broken", "option.model_id=/no/such/checkpoint\n"),
    ):
        (store / name).mkdir()
        (store / name / "serving.properties").write_text(lines)
    running = Server(SERVING_MODEL_STORE=str(store), SERVING_LOAD_MODELS=f"{store}/short", OPTION_CPU_THREADS="1")
    try:
        running.wait_until_ready()
        registered = running.post("/models", params={"url": "long"})
        assert (registered.status_code, registered.json()) == (200, {"status": 'Model "long" registered.'})
        yield running
    finally:
        running.end()


def ask(server: Server, model: str, prompt: str = "hello world", form: str = "json") -> httpx.Response:
    return server.post(f"/predictions/{model}", json={"inputs": prompt, "parameters": {**GREEDY, "output_formatter": form}})


def worker_of(server: Server, model: str) -> int:
    (described,) = httpx.get(f"{server.url}/models/{model}").json()
    pid: int = described["models"][0]["workerGroups"][0]["workers"][0]["id"]
    return pid


def test_each_model_has_its_own_options(server: Server) -> None:
    refusals = {name: ask(server, name, "word " * 200).json()["error"] for name in ("short", "long")}
    plain = server.post("/predictions/long", json={"inputs": "hello world"})

    assert ("64" in refusals["short"], "128" in refusals["long"]) == (True, True)
    assert plain.headers["content-type"].startswith("application/jsonlines")


def test_same_checkpoint_says_the_same_in_both(server: Server) -> None:
    texts = {ask(server, name).json()["generated_text"] for name in ("short", "long")}

    assert len(texts) == 1
    assert worker_of(server, "short") != worker_of(server, "long")


def test_later_model_leaves_what_the_first_was_promised(server: Server) -> None:
    plans = [line for line in server.lines if "available memory" in line]
    reserved = re.search(r"beside (\d+) MiB reserved", plans[1])

    assert "reserved" not in plans[0]
    assert reserved is not None, plans
    assert POOL_MB * 0.9 < int(reserved[1]) < POOL_MB * 2


def test_checkpoint_that_cannot_be_loaded_harms_nobody(server: Server) -> None:
    refused = server.post("/models", params={"url": "broken"})

    assert (refused.status_code, refused.json()["code"]) == (400, 400)
    assert "/no/such/checkpoint" in refused.json()["message"]
    assert server.ping().json() == {name: {"status": "Healthy"} for name in ("short", "long")}
    assert ask(server, "short").status_code == 200


def test_killed_worker_leaves_the_other_model_alone(server: Server) -> None:
    os.kill(worker_of(server, "long"), 9)

    assert ask(server, "short").status_code == 200
    until(lambda: ask(server, "long").status_code == 200, 60)
    assert ask(server, "short").status_code == 200


def test_unloaded_model_gives_its_memory_back(server: Server) -> None:
    pid = worker_of(server, "long")

    gone = httpx.delete(f"{server.url}/models/long", timeout=30)

    assert (gone.status_code, gone.json()) == (200, {"status": 'Model or workflow "long" unregistered'})
    assert not Path(f"/proc/{pid}").exists()
    assert [model["modelName"] for model in httpx.get(f"{server.url}/models").json()["models"]] == ["short"]
    assert ask(server, "short").status_code == 200
