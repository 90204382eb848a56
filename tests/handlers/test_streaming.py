"""handlers/lmi_dist_handler/streaming.py: the engine's thread and one generator a request, over a fake engine."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fake_engine import FakeEngine
from lmi_dist_handler import streaming
from lmi_dist_handler.settings import HandlerConfig
from lmi_dist_handler.streaming import MAX_PIECE, EngineThread, Streams
from lmi_dist_handler.wire import Codec, Input, Output, PairList

from lmi_dist import EngineConfig, StepError

CONFIG = HandlerConfig(engine=EngineConfig(model="fake"), model_name="fake")


class Bench:
    """Streams over a fake engine."""

    def __init__(self, thread: EngineThread, engine: FakeEngine) -> None:
        self.engine = engine
        self.streams = Streams(thread, engine, CONFIG)  # type: ignore[arg-type]  # a fake

    def frames(self, prompt: str, tracking_id: str = "t", stream: bool = True, **more: Any) -> AsyncIterator[Output]:
        body = json.dumps({"inputs": prompt, "stream": stream, **more}).encode()
        inputs = Input({"request_tracking_id": tracking_id, "content-type": "application/json"}, PairList([("data", body)]))
        return self.streams.answer(inputs)

    async def answer(self, prompt: str, tracking_id: str = "t", stream: bool = True, **more: Any) -> list[dict[str, str]]:
        return [values(frame) async for frame in self.frames(prompt, tracking_id, stream, **more)]

    async def until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 5
        while not is_true():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)


def values(frame: Output) -> dict[str, str]:
    assert frame.code == 200
    return Codec().decode_map(frame.content.value_at(0))


def run(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        engine = FakeEngine()
        thread = EngineThread(lambda: engine)  # type: ignore[arg-type, return-value]  # a fake
        await thread.start()
        await test(Bench(thread, engine))

    asyncio.run(main())


def told(frames: list[dict[str, str]]) -> tuple[str, str]:
    """Code and sentence of the last frame."""
    assert frames[-1]["last"] == "True"
    return frames[-1]["code"], frames[-1]["error"]


def test_stream_comes_piece_by_piece() -> None:
    async def check(bench: Bench) -> None:
        frames = [frame async for frame in bench.frames("abc")]

        assert {frame.get_property("Content-Type") for frame in frames} == {"application/jsonlines"}
        lines = "".join(values(frame)["data"] for frame in frames).splitlines()
        assert [json.loads(line)["token"]["text"] for line in lines] == ["a", "b", "c"]
        assert [values(frame)["last"] for frame in frames][-1] == "True"
        assert bench.streams.stats()["num_streams"] == 0

    run(check)


def test_whole_answer_is_one_frame() -> None:
    async def check(bench: Bench) -> None:
        frames = await bench.answer("abc", stream=False)

        assert frames == [{"data": '{"generated_text": "abc"}', "last": "True"}]

    run(check)


@pytest.mark.parametrize(
    ("prompt", "code", "sentence"),
    [
        ("bad", "424", "prompt=bad is refused"),
        ("full", "503", "no room"),
        ("bug", "424", "internal error: ZeroDivisionError: by zero"),
    ],
)
def test_refused_request_is_told_alone(prompt: str, code: str, sentence: str) -> None:
    async def check(bench: Bench) -> None:
        refused, other = await asyncio.gather(bench.answer(prompt, "one"), bench.answer("abc", "two", stream=False))

        assert told(refused) == (code, sentence)
        assert sentence in refused[-1]["data"]
        assert other[-1]["data"] == '{"generated_text": "abc"}'

    run(check)


def test_broken_body_is_told_alone() -> None:
    async def check(bench: Bench) -> None:
        inputs = Input({}, PairList([("data", b"{")]))
        frames = [frame async for frame in bench.streams.answer(inputs)]

        assert [frame.get_property("Content-Type") for frame in frames] == ["application/json"]
        assert values(frames[0])["code"] == "424"
        assert "not JSON" in values(frames[0])["error"]

    run(check)


def test_failure_in_mid_stream_ends_it_in_its_form() -> None:
    async def check(bench: Bench) -> None:
        frames, other = await asyncio.gather(bench.answer("broken", "one"), bench.answer("abcdefgh", "two", stream=False))

        assert told(frames) == ("424", "internal error: RuntimeError: a broken step")
        lines = [json.loads(line) for frame in frames for line in frame["data"].splitlines()]
        assert "".join(line["token"]["text"] for line in lines) == "bro"
        assert lines[-1]["details"]["finish_reason"] == "error"
        assert other[-1]["data"] == '{"generated_text": "abcdefgh"}'

    run(check)


def test_exception_out_of_a_step_starts_the_engine_anew() -> None:
    async def check(bench: Bench) -> None:
        bench.engine.gate.clear()
        answers = asyncio.gather(bench.answer("crash", "one"), bench.answer("abcdef", "two", stream=False))
        await bench.until(lambda: bench.streams.stats()["num_streams"] == 2)
        bench.engine.gate.set()

        assert [told(frames) for frames in await answers] == [("424", "internal error: RuntimeError: a crash")] * 2
        assert bench.engine.resets == 1
        assert await bench.answer("xy", stream=False) == [{"data": '{"generated_text": "xy"}', "last": "True"}]

    run(check)


def test_engine_that_cannot_go_on_says_so() -> None:
    async def check(bench: Bench) -> None:
        assert told(await bench.answer("doom")) == ("424", "internal error: RuntimeError: doomed")

        with pytest.raises(StepError, match="the engine has ended: doomed"):
            bench.streams.stats()
        assert told(await bench.answer("abc")) == ("424", "the engine has ended: doomed")

    run(check)


def test_lost_gpu_ends_the_process_once_everybody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LAST_WORDS_S", 1.0)
    ends: list[int] = []

    async def main() -> None:
        engine = FakeEngine()
        thread = EngineThread(lambda: engine, lambda: ends.append(1))  # type: ignore[arg-type, return-value]  # a fake
        await thread.start()
        bench = Bench(thread, engine)

        engine.gate.clear()
        answers = asyncio.gather(bench.answer("lost", "one"), bench.answer("abcdef", "two", stream=False))
        await bench.until(lambda: bench.streams.stats()["num_streams"] == 2)
        engine.gate.set()

        assert [told(frames) for frames in await answers] == [("424", "the GPU is lost")] * 2
        assert ends == []
        await bench.until(lambda: bool(ends))
        with pytest.raises(StepError, match="the engine has ended: the GPU is lost"):
            bench.streams.stats()

    asyncio.run(main())


def test_abort_frees_before_the_next_step() -> None:
    async def check(bench: Bench) -> None:
        bench.engine.gate.clear()
        answer = asyncio.create_task(bench.answer("abc" * 1000, "gone"))
        await bench.until(lambda: bench.engine.has_work)

        assert bench.streams.abort("gone")
        assert told(await answer)[0] == "499"
        bench.engine.gate.set()
        await bench.until(lambda: not bench.engine.has_work)

        assert bench.engine.steps == 1  # the one that was under way
        assert not bench.streams.abort("gone")

    run(check)


def test_closed_generator_aborts_its_request() -> None:
    async def check(bench: Bench) -> None:
        frames = bench.frames("abc" * 1000)
        await anext(frames)

        await frames.aclose()  # type: ignore[attr-defined]  # an async generator
        await bench.until(lambda: len(bench.engine.aborted) == 1)

        assert bench.streams.stats()["num_streams"] == 0

    run(check)


def test_drain_waits_and_refuses() -> None:
    async def check(bench: Bench) -> None:
        bench.engine.gate.clear()
        running = asyncio.create_task(bench.answer("abc", "one"))
        await bench.until(lambda: bench.engine.has_work)
        drain = asyncio.create_task(bench.streams.drain())
        await asyncio.sleep(0)

        refused = await bench.answer("xyz", "two")
        assert told(refused) == ("503", "the model is being stopped; try again later")
        assert not drain.done()
        bench.engine.gate.set()
        await drain
        assert running.done() or (await running)[-1]["last"] == "True"

    run(check)


def test_idle_engine_is_not_stepped() -> None:
    async def check(bench: Bench) -> None:
        await bench.answer("abc")
        await asyncio.sleep(0.02)

        assert bench.engine.steps == 3
        assert bench.streams.stats()["busy_s"] == 0.0

    run(check)


def test_stats_tell_how_long_a_step_takes() -> None:
    async def check(bench: Bench) -> None:
        bench.engine.gate.clear()
        answer = asyncio.create_task(bench.answer("ab"))
        await bench.until(lambda: bench.streams.stats()["busy_s"] > 0.02)
        bench.engine.gate.set()
        await answer

        stats = bench.streams.stats()
        assert (stats["num_running"], stats["num_blocks"]) == (0, 10)
        assert sum(stats["first_token_s"]["counts"]) == 1

    run(check)


def test_long_text_is_cut_into_frames() -> None:
    async def check(bench: Bench) -> None:
        frames = await bench.answer("h", stream=False, parameters={"output_formatter": "none"})

        assert [len(frame["data"]) for frame in frames] == [MAX_PIECE, 5_000_000 - MAX_PIECE]
        assert [frame["last"] for frame in frames] == ["False", "True"]

    run(check)


def test_large_body_is_parsed_beside_the_loop() -> None:
    async def check(bench: Bench) -> None:
        bench.engine.gate.clear()
        answer = asyncio.create_task(bench.answer("x" * 100_000, "large"))
        await bench.until(lambda: bench.engine.has_work)
        bench.streams.abort("large")

        assert told(await answer)[0] == "499"

    run(check)


def test_failure_to_build_is_raised_at_start() -> None:
    async def main() -> None:
        def build() -> Any:
            raise MemoryError("no room")

        with pytest.raises(MemoryError, match="no room"):
            await EngineThread(build).start()

    asyncio.run(main())
