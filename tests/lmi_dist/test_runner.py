"""The runner loads one model with its cache and turns plans into logits."""

import logging
from pathlib import Path

import driving
import pytest
import tiny_models
import torch

from lmi_dist.errors import CheckpointError
from lmi_dist.plan import Chunk, Plan

PROMPT = tiny_models.prompt_of(9)
pytestmark = pytest.mark.usefixtures("column_as_before")


def chunk(*, num_outputs: int, start: int = 0, end: int = 9, table: tuple[int, ...] = (0,)) -> Chunk:
    return Chunk(0, PROMPT[start:end], start, table, len(PROMPT), num_outputs)


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_logits_are_of_the_wanted_rows(folder: Path, kernels: str) -> None:
    runner = driving.make_runner(folder, kernels, dtype="bf16")

    logits = runner.forward(Plan(step=0, chunks=(chunk(num_outputs=2), chunk(num_outputs=9, table=(1,)))))

    assert (logits.shape, logits.dtype) == ((11, tiny_models.VOCABULARY), torch.float32)
    assert torch.equal(logits[:2], logits[-2:])


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_chunk_without_outputs_gives_no_rows(folder: Path, kernels: str) -> None:
    runner = driving.make_runner(folder, kernels)

    none = runner.forward(Plan(step=0, chunks=(chunk(num_outputs=0, end=5),)))
    rest = runner.forward(Plan(step=1, chunks=(chunk(num_outputs=1, start=5),)))
    whole = runner.forward(Plan(step=2, chunks=(chunk(num_outputs=1, table=(1,)),)))

    assert none.shape == (0, tiny_models.VOCABULARY)
    torch.testing.assert_close(rest, whole)


def test_torch_leaves_the_cpus_to_our_kernels(folder: Path) -> None:
    driving.make_runner(folder, "torch", cpu_threads=2)
    assert torch.get_num_threads() == 2

    driving.make_runner(folder, "cpu", cpu_threads=2)
    assert torch.get_num_threads() == 1


def test_load_is_told_with_numbers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmi_dist")

    driving.make_runner(folder)

    assert any("LlamaForCausalLM" in message and "as fp32" in message for message in caplog.messages)


def test_wrong_checkpoint_is_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path)
    tiny_models.rewrite_config(tmp_path, vocab_size=100)
    monkeypatch.setattr("lmi_dist.weights.Checkpoint.read", lambda *_: pytest.fail("a tensor was read"))

    with pytest.raises(CheckpointError, match=r"2 of a wrong shape \(model\.embed_tokens\.weight"):
        driving.make_runner(tmp_path)


@pytest.mark.parametrize(
    ("variant", "length", "regime"),
    [
        ("llama2-gqa", 100, ""),
        ("yarn", 100, ""),
        ("longrope", 40, ""),
        ("longrope", 41, "long"),
        ("dynamic", 40, ""),
        ("dynamic", 41, "dynamic 41"),
    ],
)
def test_regime_names_prompts_with_keys_alike(tmp_path: Path, variant: str, length: int, regime: str) -> None:
    folder = tiny_models.save(tiny_models.build(variant), tmp_path)

    assert driving.make_runner(folder).cache_regime(length) == regime
