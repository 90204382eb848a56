"""The engine with device=cuda on a GPU that is none (support/fake_gpu.py), whose kernels the stand-in runs: each tensor is brought
to the device before it meets another, or torch says so, as it does with CUDA; and what comes out is what comes out on the CPU."""

from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import ranks
import tiny_llava
import tiny_models
import tiny_t5
import torch

from lmi_dist import Engine, EngineConfig, Follower, ImagePart, Request, SamplingParams, ops
from lmi_dist.staging import Parcel

NUM_TOKENS = 8
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    {"seed": 5, "top_k": 20, "repetition_penalty": 1.2, "logit_bias": {7: 2.0}},
    {"seed": 6, "top_p": 0.9, "frequency_penalty": 0.3, "n": 2},
)
# between them every layer, every rotary scaling that works differently, and every way to tell positions
VARIANTS = ["llama2-gqa", "both-biases-tied", "gemma2", "falcon-rw", "mixtral", "gpt2", "phi3-longrope", "dynamic"]


@pytest.fixture(autouse=True)
def column():
    """What the engines below have chosen ends with the test."""
    with ops.using("cpu", 1):
        yield


def answers(folder: Path, prompts: list[Any], link: Any = None, **values: object) -> dict[str, list[tuple[Any, ...]]]:
    config = {"model": str(folder), "dtype": "fp32", "cpu_threads": 1, "max_model_len": 160, "prefill_chunk_tokens": 20}
    engine = Engine(EngineConfig.of({**config, "enforce_eager": True, **values}), link)  # graphs need a real one
    for index, prompt in enumerate(prompts):
        params = SamplingParams(**{"max_tokens": NUM_TOKENS, "seed": 1, "ignore_eos": True, **WAYS[index % len(WAYS)]})
        engine.add(Request(id=str(index), prompt=prompt, params=params))
    told: dict[str, list[tuple[Any, ...]]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            told.setdefault(f"{output.request_id}.{output.index}", []).extend(_plain(token) for token in output.tokens)
    engine.close()
    return told


def _plain(token: Any) -> tuple[Any, ...]:
    return token.id, tuple(each.id for each in token.top) if token.top else ()


def check(folder: Path, prompts: list[Any], patch: pytest.MonkeyPatch, **values: object) -> None:
    expected = answers(folder, prompts, device="cpu", kernels="sim", **values)
    fake = fake_cuda.install_with_tensors(patch)

    told = answers(folder, prompts, device="cuda", **values)

    assert told == expected
    assert fake.used


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_answers_as_on_the_cpu(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models.save(tiny_models.build(variant), tmp_path)

    check(tmp_path, [list(tiny_models.prompt_of(length, seed=length)) for length in (70, 5, 9)], monkeypatch)


def test_ranks_on_gpus_answer_as_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And measure their pools together: the rank with less memory decides."""
    tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path)
    prompts = [list(tiny_models.prompt_of(length, seed=length)) for length in (70, 5, 9)]

    def answer(link: Any) -> Any:
        with ops.using("cpu", 1):
            if link.ranks.rank == 0:
                return answers(tmp_path, prompts, link, device="cpu", kernels="sim", tensor_parallel_degree=2)
            return Follower(link).run()

    with ranks.Group(2, answer) as group:
        expected = group.results()[0]
    fake = fake_cuda.install_with_tensors(monkeypatch)
    fake.num_gpus = 2

    def answer_on_gpu(link: Any) -> Any:
        with ops.using("cpu", 1):
            if link.ranks.rank == 0:
                return answers(tmp_path, prompts, link, device="cuda", tensor_parallel_degree=2)
            fake.free_bytes = fake.peak_bytes + 10_000_000  # less than all sequences need
            follower = Follower(link)
            follower.run()
            return [device.index for device in fake.used], follower._runner.cache.size_bytes

    with ranks.Group(2, answer_on_gpu) as group:
        told, (used, pool_bytes) = group.results()
    assert told == expected
    assert set(used) == {1}
    assert 0 < pool_bytes < 10_000_000


def test_encoder_decoder_answers_as_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_t5.save(tiny_t5.build("flan"), tmp_path, "flan")

    check(tmp_path, [list(tiny_models.prompt_of(length, seed=length)) for length in (30, 5)], monkeypatch)


def test_vision_model_answers_as_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llava.save(tiny_llava.build("1.6"), tmp_path, "1.6")

    check(tmp_path, [("look: ", ImagePart(tiny_llava.png(60, 33))), "no picture"], monkeypatch)


@pytest.mark.parametrize("way", [*WAYS, {"temperature": 0.0}])
def test_step_waits_for_the_device_once(way: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All copies go their way by themselves, but for the one that the step's tokens come back by."""
    tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path)
    fake_cuda.install_with_tensors(monkeypatch)
    import fake_gpu

    config = {"model": str(tmp_path), "dtype": "fp32", "device": "cuda", "enforce_eager": True, "max_model_len": 160}
    engine, opened, open = Engine(EngineConfig.of(config)), [], Parcel.open
    monkeypatch.setattr(Parcel, "open", lambda parcel: (opened.append(parcel), open(parcel))[1])
    for id in "abc":
        engine.add(Request(id=id, prompt="The quick", params=SamplingParams(**{"max_tokens": 20, "ignore_eos": True, **way})))
    while len({output.request_id for output in engine.step()}) < 3:
        pass
    fake_gpu.waits.clear()
    opened.clear()

    outputs = [engine.step() for _ in range(5)]

    assert fake_gpu.waits == []
    assert len(opened) == 5
    assert all({output.request_id for output in each} == set("abc") for each in outputs)


def test_wait_for_the_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own test."""
    import fake_gpu

    there = torch.ones(2, device=fake_gpu.FAKE_GPU)
    for wait in (
        lambda: there.tolist(), lambda: there.to("cpu"), lambda: there[0].item(), lambda: torch.ones(2).to(fake_gpu.FAKE_GPU),
        lambda: there[torch.tensor([1])], lambda: (there < 0).nonzero(), lambda: torch.ones(2).copy_(there),
    ):  # fmt: skip
        fake_gpu.waits.clear()
        wait()
        assert len(fake_gpu.waits) == 1
    fake_gpu.waits.clear()
    torch.ones(2).to(fake_gpu.FAKE_GPU, non_blocking=True)
    torch.ones(2).copy_(there, non_blocking=True)

    assert fake_gpu.waits == []


def test_forgotten_device_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own test: one table that stays on the CPU."""
    tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path)
    fake_cuda.install_with_tensors(monkeypatch)
    monkeypatch.setattr("lmi_dist.layers.rotary.Angles.to", lambda angles, _: angles)
    engine = Engine(EngineConfig(model=str(tmp_path), device="cuda", dtype="fp32", kv_cache_memory_bytes=1 << 24))
    engine.add(Request(id="a", prompt="x", params=SamplingParams(max_tokens=1)))

    (output,) = engine.step()

    assert "which this column cannot take" in str(output.error)


def test_torch_calls_it_another_device() -> None:
    import fake_gpu

    there = torch.ones(2, device=fake_gpu.FAKE_GPU)

    assert (there + there).to("cpu").tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        there + torch.ones(2)
