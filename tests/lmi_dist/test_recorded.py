"""Decode steps are recorded by number of sequences, and replayed with the plain forward's bits; what cannot be runs plainly."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import driving
import pytest
import tiny_models
import torch

from lmi_dist import ops
from lmi_dist.config import BLOCK_SIZE, GRAPH_SIZES, EngineConfig
from lmi_dist.decode_batch import DecodeBatch, recorded_sizes
from lmi_dist.device import Device
from lmi_dist.plan import Chunk, Plan
from lmi_dist.recorded import RecordedDecodes
from lmi_dist.runner import Runner

PROMPT = tiny_models.prompt_of(40)
GPU = Device("cuda", torch.device("cuda", 0))
pytestmark = pytest.mark.usefixtures("column_as_before")


def ready(folder: Path, num: int, kernels: str = "cpu", **values: Any) -> tuple[Runner, list[Chunk]]:
    """A runner with `num` prompts of different lengths in its cache, and their next tokens."""
    runner = driving.make_runner(folder, kernels, **values)
    lengths = [10 + 5 * i for i in range(num)]
    tables = [tuple(range(3 * i, 3 * i + 3)) for i in range(num)]
    runner.forward(Plan(0, chunks=tuple(Chunk(i, PROMPT[:n], 0, tables[i], n, 1) for i, n in enumerate(lengths))))
    return runner, [Chunk(i, (PROMPT[n],), n, tables[i], n, 1) for i, n in enumerate(lengths)]


def decode(runner: Runner, chunks: list[Chunk]) -> torch.Tensor:
    return runner.forward(Plan(1, tuple(chunks))).clone()


def padded(runner: Runner, *sizes: int) -> RecordedDecodes:
    return RecordedDecodes(runner.model, DecodeBatch(sizes[-1], 16, runner.cache, has_cross=False), sizes, ops.Arena(sizes[-1]))


@pytest.mark.parametrize("kernels", ["cpu", "sim"])
def test_first_step_of_a_size_records_and_later_ones_replay(folder: Path, kernels: str) -> None:
    runner, chunks = ready(folder, 3, kernels, batch_invariant=True)
    plain = decode(ready(folder, 3, kernels, batch_invariant=True, enforce_eager=True)[0], chunks)
    assert runner.decodes is not None

    first, again, fewer = decode(runner, chunks), decode(runner, chunks), decode(runner, chunks[1:])

    assert runner.decodes.num_replayed == 1
    assert torch.equal(first, plain)
    assert torch.equal(again, plain)
    assert torch.equal(fewer, plain[1:])


@pytest.mark.parametrize("kernels", ["cpu", "sim"])
def test_padding_rows_change_nothing(folder: Path, kernels: str) -> None:
    runner, chunks = ready(folder, 5, kernels, batch_invariant=True)
    plain = decode(ready(folder, 5, kernels, batch_invariant=True, enforce_eager=True)[0], chunks)
    runner.decodes = padded(runner, 1, 2, 4, 8)
    before = [part.clone() for layer in runner.cache.layers for part in layer]
    decode(runner, chunks)
    written = [part.clone() for layer in runner.cache.layers for part in layer]

    steps = [decode(runner, chunks[:num]) for num in (5, 3, 1, 3, 4, 2)]

    assert all(torch.equal(step, plain[: len(step)]) for step in steps)
    assert runner.decodes.sizes_recorded == [1, 2, 4, 8]
    assert all(torch.equal(a, layer) for a, layer in zip(written, [p for layer in runner.cache.layers for p in layer], strict=True))
    changed = sum(int((a != b).sum()) for a, b in zip(before, written, strict=True))
    assert changed == 5 * sum(part.numel() // (part.shape[0] * BLOCK_SIZE) for part in before)  # five tokens' keys and values


def test_replay_makes_no_tensor(folder: Path) -> None:
    runner, chunks = ready(folder, 3)
    assert runner.decodes is not None
    first = runner.forward(Plan(1, tuple(chunks)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        again = runner.forward(Plan(2, tuple(chunks)))

    assert again.data_ptr() == first.data_ptr()
    assert not [event.key for event in profile.key_averages() if "empty" in event.key]


@pytest.mark.parametrize("change", ["more than the largest", "prompt", "no logits"])
def test_other_steps_run_plainly(folder: Path, change: str) -> None:
    runner, chunks = ready(folder, 3)
    runner.decodes = padded(runner, 1, 2)
    plan = {
        "more than the largest": Plan(1, tuple(chunks)),
        "prompt": Plan(1, (chunks[0],), (Chunk(9, PROMPT[:4], 0, (20,), 4, 1),)),
        "no logits": Plan(1, (chunks[0],), (Chunk(9, PROMPT[:1], 0, (20,), 4, 0),)),
    }[change]

    logits = runner.forward(plan)

    assert len(logits) == sum(chunk.num_outputs for chunk in plan.rows)
    assert runner.decodes.sizes_recorded == []


def test_enforce_eager_records_nothing(folder: Path) -> None:
    assert driving.make_runner(folder, enforce_eager=True).decodes is None


def test_torch_column_records_nothing(folder: Path) -> None:
    assert driving.make_runner(folder, "torch").decodes is None


@pytest.mark.parametrize(("most", "sizes"), [(1, (1,)), (6, (1, 2, 4, 6)), (64, (1, 2, 4, 8, 16, 32, 64)), (9999, GRAPH_SIZES)])
def test_graphs_are_of_a_few_sizes(most: int, sizes: tuple[int, ...]) -> None:
    assert recorded_sizes(EngineConfig(model="m", max_batch_size=most), GPU) == sizes


def test_what_cannot_be_recorded_is_told_once(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "lmi_dist")
    runner, chunks = ready(folder, 2)
    assert runner.decodes is not None
    plain = runner.model.score
    monkeypatch.setattr(runner.model, "score", lambda x, batch: plain(x, batch) * 2.0)

    logits = [decode(runner, chunks), decode(runner, chunks)]

    assert torch.equal(*logits)
    assert runner.decodes.num_replayed == 0
    told = [message for message in caplog.messages if "decode steps run from Python" in message]
    assert told == ["decode steps run from Python: torch's aten.mul.Tensor"]


class FakeGraph:
    """torch.cuda.CUDAGraph without a GPU: what is called while it captures is not run, but at each replay."""

    def __init__(self) -> None:
        self.captured: list[Any] = []

    def replay(self) -> None:
        for call in self.captured:
            call()


def test_graph_runs_once_as_it_is_then_by_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of torch's calls, which is all that can be told without a GPU: plain, captured in the model's pool, replayed."""
    x, calls, graphs = torch.zeros(2), [], []

    @contextmanager
    def capture(graph: FakeGraph, pool: object) -> Iterator[None]:
        calls.append(pool)
        graphs.append(graph)
        yield
        graphs.pop()

    def forward() -> torch.Tensor:
        if graphs:
            graphs[-1].captured.append(lambda: x.add_(1))
        else:
            x.add_(1)
        return x

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    pool = ops.GraphPool()

    recorded = [pool.record(forward, size) for size in (2, 4)]

    assert x.tolist() == [2, 2]
    assert calls == [(0, 7)] * 2
    assert all(each.recording is not None and each.recording.replay() is x for each in recorded)
    assert x.tolist() == [4, 4]


def test_what_a_capture_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refuse(graph: FakeGraph, pool: object) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))

    recorded = ops.GraphPool().record(lambda: torch.ones(1), 4)

    assert recorded.result.tolist() == [1]
    assert recorded.recording is None
    assert recorded.obstacle == "4 rows cannot be captured: operation not permitted when stream is capturing"
