"""The engine on the CUDA column, which the stand-in runs on a CPU: it says what it says on the CPU column, and with torch's product
in place of its own what transformers says."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import driving
import pytest
import tiny_models
import tiny_t5
import torch
from transformers import AutoModelForCausalLM

from lmi_dist import Engine, EngineConfig, Request, SamplingParams, ops

NUM_TOKENS = 16
# between them all that llama-like models ask of attention, and the other operations of the header that a model calls
VARIANTS = [
    "llama2-gqa",
    "mqa",
    "wide-heads",
    "both-biases-tied",
    "mistral-window",
    "gemma2",
    "falcon-rw",
    "gptj",
    "mixtral",
    "phi4-mini",
]
# of ways of their own with residuals
OTHERS = ["gpt2", "bloom", "neox-no-attention-bias", "falcon-7b", "falcon-40b", "falcon-shared-key-in-a-row", "mpt", "opt-no-bias"]
WAYS = (
    {"temperature": 0.0},
    {"seed": 5, "top_k": 20, "repetition_penalty": 1.2},
    {"seed": 6, "top_p": 0.9, "frequency_penalty": 0.3},
)


@pytest.fixture(autouse=True)
def column():
    """What the engines below have chosen ends with the test."""
    with ops.using("cpu", 1):
        yield


def generate(folder: Path, indices: Iterable[int] = range(3), **values: object) -> list[list[int]]:
    """Ids of a long prompt, which comes in chunks among the others' decodes, and of short ones, each drawn in its way."""
    config = {"model": str(folder), "cpu_threads": 1, "max_model_len": 128, "prefill_chunk_tokens": 20}
    engine = Engine(EngineConfig.of({**config, **values}))
    for index in indices:
        params = SamplingParams(**{"max_tokens": NUM_TOKENS, "seed": 1, "ignore_eos": True, **WAYS[index]})
        engine.add(Request(id=str(index), prompt=list(tiny_models.prompt_of(70 if index == 0 else 5, seed=index)), params=params))
    ids: dict[str, list[int]] = {str(index): [] for index in indices}
    while engine.has_work:
        for output in engine.step():
            ids[output.request_id] += [token.id for token in output.tokens]
    return list(ids.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_column_generates_the_cpu_columns_ids(variant: str, tmp_path: Path) -> None:
    tiny_models.save(tiny_models.build(variant), tmp_path)

    ids = generate(tmp_path, kernels="sim", dtype="fp32", batch_invariant=True)

    assert [len(each) for each in ids] == [NUM_TOKENS] * len(WAYS)
    assert ids == generate(tmp_path, kernels="cpu", dtype="fp32")


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_cores_generate_the_same_alone_and_together(variant: str, tmp_path: Path) -> None:
    """In bf16, where the columns round in different places, so that a near tie may part them."""
    tiny_models.save(tiny_models.build(variant), tmp_path)

    values = {"kernels": "sim", "dtype": "bf16", "batch_invariant": True}
    together = generate(tmp_path, **values)

    alone = [generate(tmp_path, [index], prefill_chunk_tokens=128, **values) for index in range(len(WAYS))]
    assert together == [ids for (ids,) in alone]


# ---- torch's product ----


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_tied_head_has_a_copy_only_where_weights_are_packed(batch_invariant: bool, tmp_path: Path) -> None:
    tiny_models.save(tiny_models.build("both-biases-tied"), tmp_path)

    model: Any = driving.make_runner(tmp_path, "sim", batch_invariant=batch_invariant).model

    shares = model.head.linear.weight.packed.data.data_ptr() == model.tokens.table.data_ptr()
    assert shares != batch_invariant


def test_torchs_product_generates_what_transformers_t5_does(tmp_path: Path) -> None:
    model = tiny_t5.build("flan")
    prompt, steps = tiny_models.prompt_of(30), 8
    reference = tiny_t5.refer(model, prompt, steps)
    runner = driving.make_runner(tiny_t5.save(model, tmp_path, "flan"), "sim")

    courses = driving.run(runner, driving.make_scheduler(runner), {0: prompt}, steps, start=tiny_t5.START)

    assert tuple(courses[0].ids) == reference.ids


@pytest.mark.parametrize("variant", [*VARIANTS, *OTHERS])
def test_torchs_product_generates_transformers_ids(variant: str, tmp_path: Path) -> None:
    model, references = tiny_models.settled(variant)
    runner = driving.make_runner(tiny_models.save(model, tmp_path), "sim")

    courses = driving.run(runner, driving.make_scheduler(runner), {i: each.prompt for i, each in enumerate(references)}, NUM_TOKENS)

    assert "dense linears: torch's product" in ops.describe()
    assert [tuple(course.ids) for course in courses.values()] == [each.ids[:NUM_TOKENS] for each in references]


@pytest.mark.parametrize("variant", ["llama2-gqa", "both-biases-tied", "gptj", "gpt2"])
def test_torchs_product_is_as_exact_as_transformers_in_bf16(variant: str, tmp_path: Path) -> None:
    model = tiny_models.build(variant)
    folder, ids = tiny_models.save(model, tmp_path), tiny_models.prompt_of(60)
    exact = tiny_models.teacher_forced(model, ids)
    theirs = tiny_models.teacher_forced(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), ids)

    ours = driving.logits_at_every_position(driving.make_runner(folder, "sim", dtype="bf16"), ids)

    assert float((ours - exact).abs().max()) <= 2 * float((theirs - exact).abs().max())
