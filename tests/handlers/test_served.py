"""handlers/lmi_dist_handler/served.py, ranks.py and whole_batch.py over a fake engine: what shape asks for what, and replies that
other ranks repeat."""

import asyncio
import json
import queue
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fake_engine import FakeEngine
from lmi_dist_handler.dialects import V29
from lmi_dist_handler.ranks import Following, Sharing
from lmi_dist_handler.served import LINES, WAY, WHOLE, Answer, Leading
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.streaming import EngineThread, Streams
from lmi_dist_handler.wire import Codec, Input, Output, PairList

from lmi_dist import EngineConfig


class FakeLink:
    """Rank 0's replies, in order."""

    def __init__(self) -> None:
        self.replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def publish_reply(self, reply: bytes) -> None:
        self.replies.put(reply)

    def await_reply(self) -> bytes:
        return self.replies.get(timeout=10)


def run(test: Callable[[Leading], Awaitable[None]], **options: Any) -> None:
    merges = options.pop("merges", False)

    async def main() -> None:
        thread = EngineThread(lambda: FakeEngine())  # type: ignore[arg-type, return-value]  # a fake
        config = HandlerConfig(engine=EngineConfig(model="fake"), model_name="fake", dialect=V29, **options)
        await test(Leading(Streams(thread, await thread.start(), config), config, merges=merges))

    asyncio.run(main())


def request(prompt: str, **properties: str) -> Input:
    return Input(properties, PairList([("data", json.dumps({"inputs": prompt}).encode())]))


def batch(*prompts: str, seed: bytes = b"") -> Input:
    pairs: list[tuple[str | None, bytes]] = []
    for place, prompt in enumerate(prompts):
        pairs.append((f"batch_{place:03d}.data", json.dumps({"inputs": prompt}).encode()))
        pairs += [(f"batch_{place:03d}.seed", seed)] if seed else []
    return Input({"batch_size": str(len(prompts))}, PairList(pairs))


def whole(answer: Answer) -> list[bytes]:
    assert isinstance(answer, Output)
    return answer.content.get_values()


async def texts(answer: Answer) -> list[str]:
    assert isinstance(answer, tuple)
    return [text async for text in answer[1]]


def test_shape_tells_the_way() -> None:
    async def check(leading: Leading) -> None:
        step = whole(await leading.answer(batch("abc", seed=b"1"), is_async=False))
        merged = whole(await leading.answer(batch("abc", "d"), is_async=False))
        single = whole(await leading.answer(request("abc"), is_async=False))
        frames = await leading.answer(request("abc", request_tracking_id="t"), is_async=True)
        asked_whole = whole(await leading.answer(request("abc", **{WAY: WHOLE}), is_async=True))

        assert Codec().decode_map(step[0])["last"] in ("True", "False")
        assert merged == [b'[{"generated_text": "abc"}]', b'[{"generated_text": "d"}]']
        assert single == asked_whole == merged[:1]
        assert isinstance(frames, AsyncIterator)

    run(check, merges=True)


def test_batches_roll_unless_the_host_merges() -> None:
    async def check(leading: Leading) -> None:
        (item,) = whole(await leading.answer(batch("abc"), is_async=False))

        assert "data" in Codec().decode_map(item)

    run(check)


def test_streamed_answer_comes_in_lines_or_as_one_error() -> None:
    async def check(leading: Leading) -> None:
        answer = await leading.answer(request("abc"), is_async=False)
        assert [json.loads(line)["outputs"] for line in "".join(await texts(answer)).splitlines()] == [["a"], ["b"], ["c"]]

        frames = await leading.answer(request("abc", **{WAY: LINES}), is_async=True)
        assert isinstance(frames, AsyncIterator)
        items = [Codec().decode_map(frame.content.value_at(0)) async for frame in frames]
        assert "".join(item["data"] for item in items) == '{"outputs": ["a"]}\n{"outputs": ["b"]}\n{"outputs": ["c"]}\n'

        refused = await leading.answer(request(""), is_async=False)
        assert isinstance(refused, Output)
        assert (refused.code, refused.message) == (424, "prediction failure")

    run(check, rolling_batch="disable", enable_streaming="true")


def test_other_ranks_repeat_what_rank_0_said() -> None:
    async def check(leading: Leading) -> None:
        link: Any = FakeLink()
        sharing, following = Sharing(leading, link, "prediction failure"), Following(link)

        said = await sharing.answer(batch("abc", "d", seed=b"1"), is_async=False)
        repeated = await following.answer(batch("abc", "d", seed=b"1"), is_async=False)
        assert isinstance(said, Output)
        assert isinstance(repeated, Output)
        assert [list(Codec().encode_response(one)) for one in (said,)] == [list(Codec().encode_response(repeated))]

        failed = await sharing.answer(Input({"batch_size": "x"}, PairList([("data", b"")])), is_async=False)
        again = await following.answer(Input(), is_async=False)
        assert isinstance(failed, Output)
        assert isinstance(again, Output)
        assert (again.code, again.message, again.content) == (424, "prediction failure", failed.content)

    run(check)


def test_other_ranks_repeat_a_stream() -> None:
    async def check(leading: Leading) -> None:
        link: Any = FakeLink()
        said = await texts(await Sharing(leading, link, "").answer(request("abc"), is_async=False))

        following = Following(link)
        assert await texts(await following.answer(request("abc"), is_async=False)) == said
        assert len("".join(said).splitlines()) == 3
        assert not following.abort("t")
        assert following.stats() == {}

    run(check, rolling_batch="disable", enable_streaming="huggingface")
