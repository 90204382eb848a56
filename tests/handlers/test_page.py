"""The page's text and headers, and the figures it asks for; tests/end_to_end/test_page.py meets it in a browser."""

import asyncio
import base64
import hashlib
import re
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from lmi_dist_handler import page
from lmi_dist_handler.http import Api
from lmi_dist_handler.metrics import Metrics
from lmi_dist_handler.settings import ServerSettings

STATS = {
    "num_running": 1, "num_waiting": 2, "num_blocks": 10, "num_free_blocks": 4, "num_prompt_tokens": 30, "num_generated_tokens": 20,
    "num_prefix_query_tokens": 40, "num_prefix_hit_tokens": 10,
    "first_token_s": {"bounds": [0.1, 1.0], "counts": [3, 1, 1], "sum": 4.5},
}  # fmt: skip
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


class FakeHost:
    """A model that stands as it is told to."""

    name, num_in_flight, num_restarts, state = "test:2", 3, 1, "ready"

    def __init__(self, stats: dict[str, Any], health: tuple[str, str]) -> None:
        self._stats = stats
        self.health = health

    async def stats(self) -> dict[str, Any]:
        return self._stats


def get(
    path: str, stats: dict[str, Any] = STATS, health: tuple[str, str] = ("serving", ""), key: str | None = None, **headers: str
) -> httpx.Response:
    options = (("option.model_id", "hub/test", "OPTION_MODEL_ID"),)
    served = SimpleNamespace(name="test", host=FakeHost(stats, health), model_id="hub/test", options=options)
    models: Any = SimpleNamespace(all=lambda: [served])

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(Api(models, ServerSettings(api_key=key), Metrics()).app())
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(main())


def test_browser_gets_the_page_and_clients_json() -> None:
    found = get("/", **BROWSER)

    assert (found.status_code, found.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert found.text == page.HTML
    assert found.headers["vary"] == "accept"
    for accept in ("*/*", "application/json"):
        assert get("/", accept=accept).json()["models"] == {"test:2": "ready"}


def test_page_needs_no_key_and_its_figures_do() -> None:
    assert get("/", key="secret", **BROWSER).status_code == 200
    assert get("/status.json", key="secret").status_code == 401
    assert get("/status.json", key="secret", authorization="Bearer secret").status_code == 200


@pytest.mark.parametrize("tag", ["script", "style"])
def test_only_the_pages_own_script_and_style_run(tag: str) -> None:
    _, _, rest = page.HTML.partition(f"<{tag}>")
    digest = base64.b64encode(hashlib.sha256(rest.partition(f"</{tag}>")[0].encode()).digest()).decode()

    policy = get("/", **BROWSER).headers["content-security-policy"]

    assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")


def test_page_asks_nobody_else_and_writes_no_markup() -> None:
    assert re.findall(r"(?i)https?:|//\w+\.\w|\bsrc=|@import|url\(|import\(", page.HTML) == []
    assert re.findall(r"(?i)innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\bstyle=|\bon\w+=", page.HTML) == []


def test_status_tells_state_figures_and_options() -> None:
    (model,) = get("/status.json").json()["models"]

    assert model == {
        "name": "test", "label": "test:2", "model_id": "hub/test", "health": "serving", "reason": "", "requests_in_flight": 3,
        "worker_restarts": 1, "options": [{"option": "option.model_id", "value": "hub/test", "origin": "OPTION_MODEL_ID"}],
        "figures": {
            "running": 1, "waiting": 2, "kv_usage": 0.6, "prompt_tokens": 30, "generated_tokens": 20, "looked_up_tokens": 40,
            "reused_tokens": 10, "first_tokens": 5, "first_token_seconds": 4.5,
        },
    }  # fmt: skip


def test_status_of_a_model_without_worker_has_the_reason() -> None:
    (model,) = get("/status.json", stats={}, health=("dead", "no room")).json()["models"]

    assert (model["health"], model["reason"], model["figures"]) == ("dead", "no room", {})


def test_status_shows_no_secret() -> None:
    options = get("/status.json", key="open sesame", authorization="Bearer open sesame").json()["options"]

    (shown,) = [row for row in options if row["option"] == "SERVING_API_KEY"]
    assert shown["value"] == "***"
    assert "sesame" not in str(options)
