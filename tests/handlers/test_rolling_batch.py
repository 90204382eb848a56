"""handlers/lmi_dist_handler/rolling_batch.py: position is identity; what was answered with last is gone; over a fake engine."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_engine import FakeEngine
from lmi_dist_handler import rolling_batch
from lmi_dist_handler.dialects import V27, V28, V29, LmiDialect
from lmi_dist_handler.rolling_batch import RollingBatch
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.streaming import EngineThread, Streams
from lmi_dist_handler.wire import Codec, Input, PairList

from lmi_dist import EngineConfig

Item = dict[str, str]


class Host:
    """The host's list: each request is a body until it has been sent once."""

    def __init__(self, batch: RollingBatch, engine: FakeEngine) -> None:
        self.batch, self.engine = batch, engine
        self.texts: list[str] = []
        self.active: list[int] = []  # places in texts
        self.ended: dict[int, Item] = {}  # by place, the item with last
        self.new: list[tuple[str, str]] = []
        self.content_types: list[str | None] = []

    def add(self, prompt: str, form: str = "json", **parameters: Any) -> None:
        body = {"inputs": prompt, "parameters": {"output_formatter": form, **parameters}}
        self.new.append((json.dumps(body), str(-len(self.texts) - len(self.new) - 1)))

    async def step(self, *, reset: bool = False) -> list[Item]:
        content = PairList([(f"batch_{place:03d}.data", b"") for place in range(len(self.active))])
        for body, seed in self.new:
            place = len(self.active)
            content.add(f"batch_{place:03d}.data", body.encode())
            content.add(f"batch_{place:03d}.seed", seed.encode())
            self.active.append(len(self.texts))
            self.texts.append("")
        self.new = []
        return await self.send(content, {"reset_rollingbatch": "true"} if reset else {})

    async def send(self, content: PairList, properties: dict[str, str]) -> list[Item]:
        output = await self.batch.step(Input({"batch_size": str(len(self.active)), **properties}, content))
        assert output.code == 200
        items = [Codec().decode_map(value) for value in output.content.get_values()]
        assert output.content.get_keys() == [f"batch_{place}.data" for place in range(len(self.active))]
        self.content_types = [output.get_property(f"batch_{place}_Content-Type") for place in range(len(items))]
        for place, item in zip(self.active, items, strict=True):
            self.texts[place] += item["data"]
            if item["last"] == "True":
                self.ended[place] = item
        self.active = [place for place in self.active if place not in self.ended]
        return items

    async def finish(self) -> list[str]:
        while self.active or self.new:
            await self.step()
        return self.texts


def run(test: Callable[[Host], Awaitable[None]], dialect: LmiDialect = V29) -> None:
    async def main() -> None:
        engine = FakeEngine()
        thread = EngineThread(lambda: engine)  # type: ignore[arg-type, return-value]  # a fake
        config = HandlerConfig(engine=EngineConfig(model="fake"), model_name="fake", dialect=dialect)
        streams = Streams(thread, await thread.start(), config)
        await test(Host(RollingBatch(streams, dialect), engine))

    asyncio.run(main())


def test_new_requests_join_behind_the_known_ones() -> None:
    async def check(host: Host) -> None:
        host.engine.gate.clear()
        host.add("abcdef")
        await host.step()
        host.add("xyz", "jsonlines")
        items = await host.step()
        host.engine.gate.set()

        assert [item["last"] for item in items] == ["False", "False"]
        assert host.content_types == ["application/json", "application/jsonlines"]
        first, second = await host.finish()
        assert first == '{"generated_text": "abcdef"}'
        assert [json.loads(line)["token"]["text"] for line in second.splitlines()] == ["x", "y", "z"]
        assert host.batch.is_empty

    run(check)


def test_nine_hundred_ninety_nine_requests_keep_their_places() -> None:
    async def check(host: Host) -> None:
        for number in range(999):
            host.add(f"{number:03d}"[: 1 + number % 3])

        texts = await host.finish()

        assert texts == [json.dumps({"generated_text": f"{number:03d}"[: 1 + number % 3]}) for number in range(999)]

    run(check)


def test_host_that_is_slow_gets_several_tokens_at_once() -> None:
    async def check(host: Host) -> None:
        host.engine.gate.clear()
        host.add("abcdefgh", "jsonlines")
        await host.step()
        host.engine.gate.set()
        while host.engine.has_work:
            await asyncio.sleep(0.001)
        (item,) = await host.step()

        assert len(item["data"].splitlines()) > 1
        assert item["last"] == "True"

    run(check)


def test_waiting_engine_gives_an_empty_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling_batch, "HOLD_S", 0.01)

    async def check(host: Host) -> None:
        host.engine.gate.clear()
        host.add("abc")

        assert await host.step() == [{"data": "", "last": "False"}]
        assert host.content_types == ["application/json"]
        host.engine.gate.set()
        assert await host.finish() == ['{"generated_text": "abc"}']

    run(check)


@pytest.mark.parametrize(
    ("prompt", "code", "error"),
    [("bad", "424", "prompt=bad is refused"), ("full", "503", "no room"), ("", "424", f"{V29.parse_error}inputs=")],
)
def test_refused_request_leaves_the_others_in_place(prompt: str, code: str, error: str) -> None:
    async def check(host: Host) -> None:
        for text in ("abc", prompt, "xyz"):
            host.add(text)
        first, _, last = await host.finish()  # whichever ends first: the refusal comes from another thread

        assert (first, last) == ('{"generated_text": "abc"}', '{"generated_text": "xyz"}')
        refusal = host.ended[1]
        assert refusal["code"] == code
        assert refusal["error"].startswith(error)
        assert list(refusal)[:2] == ["data", "last"]

    run(check)


def test_failed_step_is_told_in_the_words_of_the_version() -> None:
    async def last_items(host: Host) -> None:
        host.add("broken", "jsonlines")
        host.add("broken")
        items: list[Item] = []
        while host.active or host.new:
            items += [item for item in await host.step() if item["last"] == "True"]
        found.append(items)

    found: list[list[Item]] = []
    for dialect in (V27, V28, V29):
        run(last_items, dialect)

    assert [[item.get("code") for item in items] for items in found] == [["424", "424"], [None, None], ["424", "424"]]
    lines, whole = found[1]
    assert json.loads(lines["data"].splitlines()[-1])["details"] == {"finish_reason": "error"}
    assert whole["data"].endswith('", "details": {"finish_reason": "error"}}')


def test_reset_drops_all_that_was_known() -> None:
    async def check(host: Host) -> None:
        host.engine.gate.clear()
        host.add("abc" * 50_000)  # not done before the host comes again
        host.add("def" * 50_000)
        await host.step()
        host.active, host.texts = [], []  # the host has failed them
        host.add("xy")
        host.engine.gate.set()
        await host.step(reset=True)

        assert await host.finish() == ['{"generated_text": "xy"}']
        assert len(host.engine.aborted) == 2

    run(check)


@pytest.mark.parametrize("num_new", [1, 2, 3])
def test_list_cleared_without_telling_is_noticed(num_new: int) -> None:
    async def check(host: Host) -> None:
        host.engine.gate.clear()
        host.add("abc" * 50_000)  # not done before the host comes again
        host.add("def" * 50_000)
        await host.step()
        host.active, host.texts = [], []
        for number in range(num_new):
            host.add(f"x{number}")
        host.engine.gate.set()

        assert await host.finish() == [json.dumps({"generated_text": f"x{number}"}) for number in range(num_new)]
        assert len(host.engine.aborted) == 2

    run(check)


def test_body_that_is_sent_again_is_no_new_request() -> None:
    async def check(host: Host) -> None:
        host.engine.gate.clear()
        host.add("abcdef")
        (body, seed), *_ = host.new
        await host.step()
        host.engine.gate.set()
        await host.send(PairList([("batch_000.data", body.encode()), ("batch_000.seed", seed.encode())]), {})

        assert await host.finish() == ['{"generated_text": "abcdef"}']
        assert host.engine.aborted == []

    run(check)


def test_known_place_without_a_request_is_an_error_of_its_own() -> None:
    async def check(host: Host) -> None:
        host.active, host.texts = [0], [""]

        (item,) = await host.send(PairList([("batch_000.data", b"")]), {})

        assert (item["code"], item["last"]) == ("424", "True")
        assert "the body is empty" in item["error"]

    run(check)


def test_last_item_is_never_silent_where_it_must_not_be() -> None:
    async def check(host: Host) -> None:
        host.add("abc_", "none")
        host.add("_", "none")
        while host.active or host.new:
            assert all(item["data"] for item in await host.step() if item["last"] == "True")

        assert host.texts == ["abc", rolling_batch.NOTHING]

    run(check)


def test_seed_of_the_host_holds_where_the_client_has_none() -> None:
    async def check(host: Host) -> None:
        seen: list[Any] = []
        add = host.engine.add
        host.engine.add = lambda request: (seen.append(request.params.seed), add(request))[1]  # type: ignore[method-assign]
        host.add("abc")
        host.add("def", seed=7)
        await host.finish()

        assert seen == [-1, 7]

    run(check)


def test_large_pieces_stay_below_the_hosts_limit() -> None:
    async def check(host: Host) -> None:
        host.add("h", "none")
        sizes = []
        while host.active or host.new:
            sizes += [len(item["data"]) for item in await host.step()]

        assert max(sizes) <= rolling_batch.MAX_PIECE + 1
        assert len(host.texts[0]) == 5_000_000

    run(check)
