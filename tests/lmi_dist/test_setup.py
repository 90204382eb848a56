"""What is worked out before the weights are read: choices, memory, tokenizer, CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import tiny_tokenizers
import torch
from transformers import AutoTokenizer

from lmi_dist import ops
from lmi_dist.config import EngineConfig
from lmi_dist.errors import CheckpointError
from lmi_dist.ops import column
from lmi_dist.setup import explain, load_tokenizer, usable_cpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path_factory.mktemp("llama"))


def copy_of(folder: Path, target: Path, *, without: str) -> Path:
    for file in folder.iterdir():
        if without not in file.name:
            (target / file.name).symlink_to(file)
    return target


def test_every_choice_is_made(folder):
    told = explain(EngineConfig(model=str(folder), dtype="auto"))

    assert told.config.dtype in ("fp32", "bf16")
    assert told.config.kernels in ("cpu", "torch")
    assert told.config.device == "cpu"
    assert (told.config.max_model_len, told.config.prefill_chunk_tokens, told.config.max_decode_slowdown) == (256, 512, 3.0)
    assert told.config.cpu_threads == usable_cpus()
    assert told.config.kv_cache_memory_bytes == told.memory.num_blocks * told.memory.block_bytes


def test_made_choices_lead_to_the_same_plan(folder):
    told = explain(EngineConfig(model=str(folder)), available_bytes=1 << 30)

    again = explain(told.config, available_bytes=1 << 30)

    assert again.config == told.config
    assert again.memory.num_blocks == told.memory.num_blocks


@pytest.mark.parametrize("values", [{}, {"enable_chunked_prefill": False}, {"max_decode_slowdown": 0}])
def test_made_choices_can_be_told_to_other_ranks(folder, values):
    told = explain(EngineConfig(model=str(folder), **values)).config

    assert EngineConfig.of(told.model_dump(mode="json")) == told


def test_plan_follows_the_free_memory(folder):
    config = EngineConfig(model=str(folder), dtype="fp32", max_batch_size=64)

    little, much = explain(config, available_bytes=20_000_000), explain(config, available_bytes=80_000_000)

    assert little.memory.available_bytes == 20_000_000
    assert little.memory.num_blocks < much.memory.num_blocks
    assert little.lines == explain(config, available_bytes=20_000_000).lines


def test_lines_tell_model_memory_and_kernels(folder):
    told = explain(EngineConfig(model=str(folder)))

    assert "LlamaForCausalLM" in told.lines[0]
    assert set(told.memory.arithmetic) < set(told.lines)
    assert told.lines[-2:] == (f"kernels {told.kernels}", f"decode steps {told.decodes}")


@pytest.mark.parametrize(
    ("values", "decodes"),
    [
        ({"kernels": "cpu"}, "of up to 64 sequences are recorded and replayed"),
        ({"kernels": "cpu", "max_batch_size": 5}, "of up to 5 sequences are recorded and replayed"),
        ({"kernels": "cpu", "enforce_eager": True}, "run from Python: enforce_eager=true"),
        ({"kernels": "torch"}, "run from Python: torch's operations are not recorded"),
        ({"kernels": "sim"}, "run from Python: torch's operations are not recorded"),
        ({"kernels": "sim", "batch_invariant": True}, "of up to 64 sequences are recorded and replayed"),
    ],
)
def test_explanation_tells_how_decode_steps_run(folder, values, decodes):
    with ops.using("cpu", 1):
        assert explain(EngineConfig(model=str(folder), **values), available_bytes=1 << 30).decodes == decodes


@pytest.mark.parametrize(
    ("values", "product"),
    [
        ({"kernels": "sim"}, "; dense linears: torch's product, cuBLAS on a GPU"),
        ({"kernels": "sim", "batch_invariant": True}, "; dense linears: our kernels, batch_invariant=true"),
        ({"kernels": "cpu"}, ", 1 threads"),  # where a row's bits never depend on its batch
    ],
)
def test_explanation_tells_which_product_dense_linears_take(folder, values, product):
    with ops.using("cpu", 1):
        assert explain(EngineConfig(model=str(folder), cpu_threads=1, **values)).kernels.endswith(product)


def test_old_torch_leaves_dense_linears_to_our_kernels(folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    monkeypatch.setattr(column, "MULTIPLIES_TO_FP32", False)

    with ops.using("cpu", 1):
        told = explain(EngineConfig(model=str(folder), kernels="sim"), available_bytes=1 << 30)

    assert told.kernels.endswith("; dense linears: our kernels, since torch 2.7.1 multiplies bf16 to no fp32 (2.8 does)")


def test_explaining_reads_no_tensor(folder, monkeypatch):
    monkeypatch.setattr("lmi_dist.weights.Checkpoint.read", lambda *args: pytest.fail("a tensor was read"))

    assert explain(EngineConfig(model=str(folder))).memory.weights_bytes > 0


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt_neox", "falcon"])
@pytest.mark.parametrize("named", ["TokenizersBackend", "PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPTNeoXTokenizer", None])
@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
def test_tokenizer_is_the_one_that_transformers_would_choose(tmp_path, kind, named, model_type):
    tiny_tokenizers.KINDS[kind]().save_pretrained(tmp_path)
    own = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in own.items() if value}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))

    chosen, expected = load_tokenizer(EngineConfig(model=str(tmp_path)), tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    assert type(chosen) is type(expected)
    assert [chosen(text).input_ids for text in tiny_tokenizers.TEXTS] == [
        expected(text).input_ids for text in tiny_tokenizers.TEXTS
    ]


def test_tokenizer_loads_without_what_it_does_not_need(folder):
    """Half of a worker's start, else."""
    call = "load_tokenizer(EngineConfig(model=sys.argv[1]), Path(sys.argv[1]))"
    imports = "import sys; from pathlib import Path; from lmi_dist import EngineConfig; from lmi_dist.setup import load_tokenizer"
    check = "print([name for name in ('sympy', 'torch._dynamo', 'accelerate') if name in sys.modules])"

    done = subprocess.run(
        [sys.executable, "-c", f"{imports}; {call}; {check}", str(folder)], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"


def test_missing_tokenizer_is_told(folder, tmp_path):
    copy_of(folder, tmp_path, without="tokenizer")

    with pytest.raises(CheckpointError, match=r"tokenizer=.* cannot be loaded"):
        load_tokenizer(EngineConfig(model=str(tmp_path)), tmp_path)


def test_corrupt_tokenizer_is_told(folder, tmp_path):
    copy_of(folder, tmp_path, without="tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")

    with pytest.raises(CheckpointError, match=r"tokenizer=.* cannot be loaded"):
        load_tokenizer(EngineConfig(model=str(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, 10**6),
        ({"cpu.max": "max 100000\n"}, 10**6),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 10**6),
        ({"cpu/cpu.cfs_quota_us": "90000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_quota_of_a_container_counts(tmp_path, files, most):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    assert usable_cpus(tmp_path) == min(most, len(os.sched_getaffinity(0)))
