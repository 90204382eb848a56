"""Decode steps are recorded by number of sequences, and replayed with the plain forward's bits; what cannot be runs plainly."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import driving
import pytest
import tiny_models
import torch

from lmi_dist import ops
from lmi_dist.config import BLOCK_SIZE
from lmi_dist.decode_batch import DecodeBatch
from lmi_dist.plan import Chunk, Plan
from lmi_dist.recorded import RecordedDecodes
from lmi_dist.runner import Runner

PROMPT = tiny_models.prompt_of(40)


@pytest.fixture(autouse=True)
def _column_as_before() -> Iterator[None]:
    """A runner chooses for the whole process; what comes after these tests finds what was before."""
    with ops.using("cpu", 1):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path_factory.mktemp("tiny"))


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
    return RecordedDecodes(runner.model, DecodeBatch(sizes[-1], 16, runner.cache, has_cross=False), sizes)


@pytest.mark.parametrize("kernels", ["cpu", "sim"])
def test_first_step_of_a_size_records_and_later_ones_replay(folder: Path, kernels: str) -> None:
    runner, chunks = ready(folder, 3, kernels)
    plain = decode(ready(folder, 3, kernels, enforce_eager=True)[0], chunks)
    assert runner.decodes is not None

    first, again, fewer = decode(runner, chunks), decode(runner, chunks), decode(runner, chunks[1:])

    assert runner.decodes.num_replayed == 1
    assert torch.equal(first, plain)
    assert torch.equal(again, plain)
    assert torch.equal(fewer, plain[1:])


@pytest.mark.parametrize("kernels", ["cpu", "sim"])
def test_padding_rows_change_nothing(folder: Path, kernels: str) -> None:
    runner, chunks = ready(folder, 5, kernels)
    plain = decode(ready(folder, 5, kernels, enforce_eager=True)[0], chunks)
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
    """Neither torch nor our own kernels' places: the result lies where it lay."""
    runner, chunks = ready(folder, 3)
    assert runner.decodes is not None
    first = runner.forward(Plan(1, tuple(chunks)))
    sizes = [runner.decodes.arena.num_bytes]

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        again = runner.forward(Plan(2, tuple(chunks)))

    assert again.data_ptr() == first.data_ptr()
    assert [runner.decodes.arena.num_bytes] == sizes
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


def test_what_cannot_be_recorded_is_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmi_dist")
    runner, chunks = ready(folder, 2, "torch")
    assert runner.decodes is not None

    logits = [decode(runner, chunks), decode(runner, chunks)]

    assert torch.equal(*logits)
    assert runner.decodes.num_replayed == 0
    told = [message for message in caplog.messages if "decode steps run from Python" in message]
    assert told == ["decode steps run from Python: the torch column has no calls"]
