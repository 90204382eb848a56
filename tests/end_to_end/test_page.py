"""The page at `/` as a person meets it: a real server, a real browser, what is typed, what is read. Run by `make test-page`."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_models
import torch
from chromium import Chromium
from PIL import Image
from running_server import Server, until

pytestmark = pytest.mark.page

KEY = "open <b>sesame</b>"
PROMPT = "hello world <script>document.title = 'broken'</script>"
READY = "document.querySelector('#state').innerText === 'serving'"
BUSY = "document.querySelector('#answer').getAttribute('aria-busy') === 'true'"
RATE = "document.querySelector('#rate').innerText"
LENGTH = "document.querySelector('#answer').textContent.length"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "tiny <i>llama"
    model = tiny_models.build("llama2-gqa", max_position_embeddings=8192)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0  # never the best of 512: a greedy answer ends by its length
    tiny_models.save(model, folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    server = Server(OPTION_MODEL_ID=str(checkpoint), SERVING_API_KEY=KEY)
    server.wait_until_ready()
    yield server
    server.end()


@pytest.fixture(scope="module")
def browser(server: Server) -> Iterator[Chromium]:
    """The page of the server, whose key has been given."""
    with Chromium() as browser:
        browser.open(f"{server.url}/")
        browser.until("!document.querySelector('#door').hidden")
        browser.write("#key", "wrong")
        browser.press("Enter")
        browser.until("document.querySelector('#closed').innerText === 'That key was refused.'")
        browser.write("#key", KEY)
        browser.press("Enter")
        browser.until(READY)
        yield browser


def ask(browser: Chromium, prompt: str, most: int, heat: float = 0) -> None:
    browser.write("#prompt", prompt)
    browser.write("#most", str(most))
    browser.write("#heat", str(heat))
    browser.click("#go")


def answer(server: Server, path: str, **body: Any) -> Any:
    given = {"model": "model", "temperature": 0, **body}
    return httpx.post(f"{server.url}{path}", json=given, headers={"authorization": f"Bearer {KEY}"}, timeout=30).json()["choices"][
        0
    ]


def num_running(server: Server) -> int:
    status = httpx.get(f"{server.url}/status.json", headers={"authorization": f"Bearer {KEY}"}).json()
    return int(status["models"][0]["figures"]["running"])


def is_drawn(image: bytes) -> bool:
    """Whether there is text on a picture: many shades, and more than a speck that is not ground."""
    colours = Image.open(io.BytesIO(image)).convert("L").getcolors(256) or []
    ground = max(count for count, _ in colours)
    return len(colours) > 40 and sum(count for count, _ in colours) - ground > 10_000


def test_answer_streams_in(browser: Chromium, server: Server, tmp_path: Path) -> None:
    ask(browser, PROMPT, 6000)
    lengths = [browser.until(f"{BUSY} && {LENGTH}")]
    lengths.append(browser.until(f"{BUSY} && {LENGTH} > {lengths[0]} && {LENGTH}"))
    browser.until(f"{BUSY} && document.querySelector('#running').innerText === '1' && parseFloat({RATE}) > 0")
    image = browser.screenshot(tmp_path / "streaming.png")
    browser.until(f"!({BUSY})", 60)

    whole = answer(server, "/v1/completions", prompt=PROMPT, max_tokens=6000)
    assert 0 < lengths[0] < lengths[1] < len(whole["text"])
    assert browser.evaluate("document.querySelector('#answer').textContent") == whole["text"]
    assert is_drawn(image)
    assert browser.evaluate("document.title") == "model · serving · lmi-dist"
    assert " tokens · first after " in browser.text("#told")


def test_stop_ends_the_request(browser: Chromium, server: Server) -> None:
    ask(browser, PROMPT, 8000)  # greedy: a drawn token may be the end-of-text one, and the request over too soon
    browser.until(f"{BUSY} && {LENGTH}")
    assert num_running(server) == 1
    browser.click("#stop")
    browser.until(f"!({BUSY})")

    assert browser.text("#told").endswith("stopped")
    until(lambda: num_running(server) == 0)


def test_chat_is_answered_by_keys_alone(browser: Chromium, server: Server) -> None:
    browser.click("input[value=chat]")
    browser.write("#most", "9")
    browser.write("#prompt", "hello")
    browser.press("Enter", control=True)
    browser.until(f"!({BUSY}) && {LENGTH}")
    browser.click("input[value=text]")

    whole = answer(server, "/v1/chat/completions", messages=[{"role": "user", "content": "hello"}], max_tokens=9, temperature=0)
    assert whole["message"]["content"] != ""
    assert browser.text("#wrong") == ""


def test_refused_prompt_is_told(browser: Chromium) -> None:
    ask(browser, "word " * 9000, 8)

    sentence = browser.until("document.querySelector('#wrong').innerText")

    assert "8192" in sentence
    assert browser.evaluate(f"{LENGTH} === 0 && !document.querySelector('#go').disabled")


def test_page_shows_options_with_origin_and_no_secret(browser: Chromium, checkpoint: Path) -> None:
    rows = browser.evaluate("[...document.querySelectorAll('#given tr')].map(row => [...row.cells].map(cell => cell.innerText))")

    assert ["option.model_id", str(checkpoint), "OPTION_MODEL_ID"] in rows  # its name has a tag in it
    assert ["SERVING_API_KEY", "***", "SERVING_API_KEY"] in rows
    assert browser.evaluate("document.querySelectorAll('#defaults tr').length") > 10


def test_page_shows_figures(browser: Chromium) -> None:
    browser.until("document.querySelector('#first').innerText.endsWith('s')")

    assert browser.text("#running") in "01"
    assert browser.text("#kv").endswith(" %")
    assert browser.text("#reused").endswith(" %")
    assert float(browser.text("#rate").replace(",", "")) >= 0


def test_nothing_that_is_shown_is_run(browser: Chromium) -> None:
    assert browser.evaluate("document.querySelectorAll('main i, main b, main script').length") == 0
    refused = [message for message in browser.messages if message.get("entry", {}).get("source") != "network"]
    assert refused == []  # neither a script that failed nor one that the page's headers kept from running


def test_several_models_can_be_chosen_from(browser: Chromium) -> None:
    one = "{health: 'serving', reason: '', figures: {}, options: [], model_id: 'id of '"
    status = f"{{options: [], models: ['a', 'b'].map(name => ({one} + name, name, label: name}}))}}"
    shown = "[document.querySelector('#models').hidden, document.querySelector('#model').innerText]"

    assert browser.evaluate(f"(show({status}), {shown})") == [False, "id of a"]


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1100, True)], ids=["phone", "dark"])
def test_page_fits_and_is_readable(server: Server, tmp_path: Path, width: int, dark: bool) -> None:
    with Chromium(width, 900, dark=dark) as browser:
        browser.open(f"{server.url}/")
        browser.evaluate(f"sessionStorage.setItem('key', {KEY!r})")
        browser.open(f"{server.url}/")
        browser.until(READY)

        assert is_drawn(browser.screenshot(tmp_path / "page.png"))
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (max(ground) < 60) is dark


def test_model_that_cannot_be_loaded_tells_why(checkpoint: Path) -> None:
    with Chromium() as browser:
        server = Server(OPTION_MODEL_ID=str(checkpoint), OPTION_KV_CACHE_MEMORY_BYTES="100")  # ends by itself
        browser.open(f"{server.url}/")

        browser.until("document.querySelector('#state').innerText === 'loading'")
        assert browser.evaluate("document.querySelector('#go').disabled")
        browser.until("document.querySelector('#note').innerText.includes('kv_cache_memory_bytes=100')", 60)
        assert server.process.wait(20) == 2
        browser.until("document.querySelector('#state').innerText === 'not answering'")
        assert "kv_cache_memory_bytes=100" in browser.text("#note")
