"""prefill_attention=flash-attn: what it is asked to do, that this is what our kernels do, and where it is refused."""

import sys
from pathlib import Path
from typing import Any

import driving
import fake_cuda
import fake_flash_attn
import pytest
import tiny_models
import tiny_t5
import torch
from fake_flash_attn import FakeFlashAttn

from lmi_dist import ConfigError, Engine, EngineConfig, Request, SamplingParams, ops
from lmi_dist.batch import build
from lmi_dist.config import BLOCK_SIZE
from lmi_dist.errors import KernelError
from lmi_dist.kv_cache import KVCache, MemoryPlan
from lmi_dist.plan import Chunk, Plan
from lmi_dist.setup import explain

HEADS, KEY_HEADS, SIZE, NUM_BLOCKS = 4, 2, 16, 20
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "soft cap": {"soft_cap": 5.0},
    "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "all": {"window": 40, "soft_cap": 5.0, "alibi": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttn:
    return fake_flash_attn.install(monkeypatch)


@pytest.fixture(autouse=True)
def column():
    """What the engines below have chosen ends with the test."""
    with ops.using("cpu", 1):
        yield


def cache() -> KVCache:
    facts = {"max_model_len": 64, "available_bytes": 0, "weights_bytes": 0, "working_bytes": 0, "block_bytes": 0}
    plan = MemoryPlan(dtype="bf16", cache_dtype=torch.bfloat16, num_blocks=NUM_BLOCKS, arithmetic=(), **facts)
    made = KVCache(plan, 1, KEY_HEADS, SIZE)
    for part in made.layers[0]:
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(len(made.layers))))
    return made


def chunk(num: int, start: int, *table: int) -> Chunk:
    return Chunk(table[-1], (7,) * num, start, table, start + num, 1)


DECODES = (chunk(1, 30, 0, 1), chunk(1, 3, 2))
# a whole prompt, the end of one whose blocks lie apart, one token, and one that has lost a block to the window
PROMPTS = (chunk(37, 0, 3, 4, 5), chunk(18, 33, 9, 6, 8, 7), chunk(1, 0, 10), chunk(5, 40, -1, 11, 12))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("decodes", [(), DECODES], ids=["alone", "among decodes"])
def test_prompts_come_out_as_from_our_kernels(fake: FakeFlashAttn, options: str, decodes: tuple[Chunk, ...]) -> None:
    given = {"scale": SIZE**-0.5, **OPTIONS[options]}
    plan = Plan(0, decodes, PROMPTS if "window" in given and given["window"] == 20 else PROMPTS[:3])
    pool = cache()
    q = torch.randn(plan.num_tokens, HEADS, SIZE, generator=torch.Generator().manual_seed(5)).bfloat16()

    with ops.using("sim", 1, flash_attn=True):
        batch = build(plan, pool)
        lengths = (pool.layers[0].k, pool.layers[0].v, batch.starts, batch.key_lengths, batch.tables)
        out = ops.attention(q, *lengths, prompts=batch.prompts, **given)
        expected = ops.attention(q, *lengths, **given)

    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-7)
    assert torch.equal(out[: len(decodes)], expected[: len(decodes)])
    assert [call["rows"] for call in fake.calls] == [len(q) - len(decodes)]


def test_call_gathers_so_many_keys_and_no_more(fake: FakeFlashAttn, monkeypatch: pytest.MonkeyPatch) -> None:
    """But of one sequence all that it has."""
    monkeypatch.setattr(ops, "GATHERED_KEYS", 52)

    with ops.using("sim", 1, flash_attn=True):
        prompts = build(Plan(0, DECODES, PROMPTS), cache()).prompts

    assert prompts is not None
    assert [len(call.blocks) for call in prompts.calls] == [37, 52, 45]
    assert [(call.rows.start, call.rows.stop) for call in prompts.calls] == [(2, 39), (39, 58), (58, 63)]
    assert [call.max_keys for call in prompts.calls] == [37, 51, 45]
    assert prompts.calls[1].blocks.tolist() == [*[9] * 16, *[6] * 16, *[8] * 16, *[7] * 3, 10]
    assert prompts.calls[1].places.tolist() == [*[*range(BLOCK_SIZE)] * 3, 0, 1, 2, 0]


def test_step_without_prompts_is_ours(fake: FakeFlashAttn) -> None:
    with ops.using("sim", 1, flash_attn=True):
        assert build(Plan(0, DECODES), cache()).prompts is None
    with ops.using("sim", 1):
        assert build(Plan(0, DECODES, PROMPTS), cache()).prompts is None


# ---- the engine ----


def answer(folder: Path, **values: object) -> list[list[int]]:
    config = {"model": str(folder), "dtype": "bf16", "device": "cuda", "max_model_len": 128, "prefill_chunk_tokens": 20}
    engine = Engine(EngineConfig.of({**config, "enforce_eager": True, **values}))
    prompts, ids = [5, 70], dict[str, list[int]]()
    while engine.has_work or prompts:
        if prompts:  # one a step
            params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0)
            engine.add(Request(id=str(len(ids)), prompt=tiny_models.prompt_of(prompts.pop(0)), params=params))
            ids[str(len(ids))] = []
        for output in engine.step():
            assert output.error is None, output.error
            ids[output.request_id] += [token.id for token in output.tokens]
    engine.close()
    return list(ids.values())


@pytest.mark.parametrize("variant", ["llama2-gqa", "mistral-window", "gemma2", "falcon-rw"])
def test_model_is_as_exact_as_with_our_kernels(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build(variant)
    folder, ids = tiny_models.save(model, tmp_path), tiny_models.prompt_of(70)
    exact = tiny_models.teacher_forced(model, ids)
    fake = fake_flash_attn.install(monkeypatch)  # after transformers, which asks for it too

    logits = []
    for way in ("own", "flash-attn"):
        runner = driving.make_runner(folder, "sim", dtype="bf16", prefill_attention=way)
        logits.append(driving.logits_at_every_position(runner, ids))

    ours, theirs = (float((each - exact).abs().max()) for each in logits)
    assert theirs <= 2 * ours
    assert len(fake.calls) == model.config.num_hidden_layers


def test_engine_hands_its_prompts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is none. One prompt comes in chunks, among the other's decodes."""
    tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path)
    fake = fake_flash_attn.install(monkeypatch)
    fake_cuda.install_with_tensors(monkeypatch)

    ids = answer(tmp_path, prefill_attention="flash-attn")

    assert ops.describe().endswith("; prompts: flash-attn 2.8.3")
    assert [len(each) for each in ids] == [6, 6]
    assert all(call["causal"] for call in fake.calls)
    assert max(call["keys"] for call in fake.calls) >= 70
    assert max(call["keys"] - call["rows"] for call in fake.calls) >= 20
    num_calls = len(fake.calls)
    answer(tmp_path)
    assert len(fake.calls) == num_calls


# ---- refusals ----


def refuse(folder: Path, kind: type[Exception], sentence: str, **values: object) -> None:
    config = {"model": str(folder), "device": "cuda", "dtype": "bf16", "prefill_attention": "flash-attn", **values}
    with pytest.raises(kind, match=sentence):
        explain(EngineConfig.of(config))


def test_what_it_cannot_do_is_refused_by_name(fake: FakeFlashAttn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path / "llama")
    t5 = tiny_t5.save(tiny_t5.build("t5"), tmp_path / "t5", "t5")
    start = r"^prefill_attention=flash-attn is refused: it "
    refuse(llama, ConfigError, start + r"runs on GPUs, and this is device=cpu \(device=cpu\); leave it out", device="cpu")
    fake_cuda.install(monkeypatch)

    refuse(t5, ConfigError, start + "has no relative position bias, which T5ForConditionalGeneration needs; leave it out")
    refuse(llama, ConfigError, start + "takes bf16 and fp16, and dtype=auto means fp32 here", dtype="auto")
    refuse(llama, ConfigError, start + "reads keys in bf16 and fp16, and kv_cache_dtype is fp8", kv_cache_dtype="fp8")
    refuse(llama, ConfigError, "^prefill_attention=flash-attn contradicts batch_invariant=true", batch_invariant=True)


@pytest.mark.parametrize("there", [None, object()], ids=["missing", "another"])
def test_missing_package_is_told_with_the_way_out(there: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path)
    fake_cuda.install_with_tensors(monkeypatch)
    monkeypatch.setitem(sys.modules, "flash_attn", there)

    refuse(
        tmp_path, KernelError, r"prefill_attention=flash-attn needs the package flash-attn \(.*pip install 'lmi-dist\[flash-attn\]'"
    )
