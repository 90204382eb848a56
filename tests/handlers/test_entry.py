"""handlers/lmi_dist_handler/__init__.py: what a host calls, with our classes and with djl_python's."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lmi_dist_handler
import pytest
from fake_engine import FakeEngine
from lmi_dist_handler import abort, drain, handle, stats
from lmi_dist_handler.formatter import UnavailableError
from lmi_dist_handler.wire import Input, Output, PairList

import lmi_dist
from lmi_dist import MemoryPlanError

INIT = {"handler": "handle", "model_id": "fake", "engine": "MPI", "rolling_batch": "lmi-dist", "model_dir": "."}
REQUEST = Input({"request_tracking_id": "t"}, PairList([("data", b'{"inputs": "abc"}')]))


class DjlOutput(Output):
    """Stands for djl_python.outputs.Output."""


class DjlInput:
    """Stands for djl_python.inputs.Input: another class with the same members."""

    def __init__(self, inputs: Input) -> None:
        self._inputs = inputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inputs, name)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No model is loaded yet; what stands for djl_python goes with the test."""
    monkeypatch.setattr(lmi_dist_handler, "_served", None)
    for name in ("defuse", "end_with_parent"):  # this process is no worker
        monkeypatch.setattr(lmi_dist_handler, name, lambda *_: None)
    monkeypatch.setattr(lmi_dist, "Engine", lambda config, link: FakeEngine(), raising=False)
    yield
    for name in [name for name in sys.modules if name == "model" or name.partition(".")[0] == "djl_python"]:
        del sys.modules[name]


async def answer(inputs: Any) -> list[Output]:
    frames = await handle(inputs)
    assert frames is not None
    assert not isinstance(frames, Output)
    return [frame async for frame in frames]


def test_first_call_loads_and_later_ones_answer() -> None:
    async def main() -> None:
        with pytest.raises(UnavailableError, match="the model is not loaded yet"):
            await handle(REQUEST)
        assert (await stats(Input())).content.value_at(0) == b"{}"

        assert await handle(Input(INIT)) is None
        (frame,) = await answer(REQUEST)

        assert b'{"generated_text": "abc"}' in frame.content.value_at(0)
        assert b"num_steps" in (await stats(Input())).content.value_at(0)
        assert b"false" in (await abort(Input({"abort_tracking_id": "t"}))).content.value_at(0)
        await drain(Input())

    asyncio.run(main())


def test_djl_gets_replies_of_its_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = ModuleType("djl_python.outputs")
    outputs.Output = DjlOutput  # type: ignore[attr-defined]
    package = ModuleType("djl_python")
    package.__version__ = "0.36.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "djl_python", package)
    monkeypatch.setitem(sys.modules, "djl_python.outputs", outputs)

    async def main() -> None:
        await handle(DjlInput(Input(INIT)))  # type: ignore[misc, arg-type]  # another class with the same members
        frames = await answer(DjlInput(REQUEST))

        assert {type(frame) for frame in frames} == {DjlOutput}

    asyncio.run(main())


def test_failure_to_load_is_a_reply_with_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: object, link: object) -> None:
        raise MemoryPlanError("weights 8 GB and 4 GB are free")

    monkeypatch.setattr(lmi_dist, "Engine", refuse, raising=False)

    reply = handle(Input(INIT))

    assert isinstance(reply, Output)
    assert (reply.code, reply.message, reply.get_property("error_type")) == (
        507,
        "weights 8 GB and 4 GB are free",
        "MemoryPlanError",
    )


def test_bad_option_is_a_reply_with_the_sentence() -> None:
    reply = handle(Input({**INIT, "max_model_len": "x"}))

    assert isinstance(reply, Output)
    assert (reply.code, reply.get_property("error_type")) == (424, "ConfigError")
    assert "max_model_len='x' is refused" in reply.message


MODEL_PY = """
from djl_python.output_formatter import TextGenerationOutput, output_formatter

@output_formatter
def shout(output: TextGenerationOutput) -> str:
    token, _, is_last = output.sequences[output.best_sequence_index].get_next_token()
    return token.text.upper() + "!" * is_last
"""


def test_models_own_formatter_answers_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(MODEL_PY)
    monkeypatch.setattr(FakeEngine, "tokenizer", lambda engine, text, verbose: {"input_ids": [1]}, raising=False)

    async def main() -> None:
        refused = await handle(Input({**INIT, "model_dir": str(tmp_path)}))
        assert isinstance(refused, Output)
        assert "model.py has formatters of its own; run it with option.allow_model_py=true" in refused.message

        assert await handle(Input({**INIT, "model_dir": str(tmp_path), "allow_model_py": "true"})) is None
        frames = await answer(Input({}, PairList([("data", b'{"inputs": "abc"}')])))

        values = b"".join(frame.content.value_at(0) for frame in frames)
        assert [letter in values for letter in (b"A", b"B", b"C!")] == [True] * 3
        assert {frame.get_property("Content-Type") for frame in frames} == {None}

    asyncio.run(main())
