"""Whole steps of the engine on Llama-3-8B's shape with random weights: one sequence against the reading of the weights, 64 against
the GPU's idle time, both against transformers' continuous batching. Needs what the engine needs, pydantic above all."""

import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_tokenizers
import torch
import transformers
from gpu_limits import Limits, Row, Sizes, measure_limits
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from lmi_dist import Engine, EngineConfig, Request, SamplingParams

LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
TINY_LLAMA = {
    **LLAMA_8B, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    model: dict[str, Any]
    num_sequences: int
    prompt_tokens: int
    new_tokens: int
    num_steps: int  # of those tokens, whose time is taken
    engine: dict[str, Any] = field(default_factory=dict)  # settings
    peer: dict[str, Any] = field(default_factory=dict)  # of transformers' continuous batching

    @property
    def prompts(self) -> list[list[int]]:
        chance = torch.Generator().manual_seed(0)
        return torch.randint(3, self.model["vocab_size"], (self.num_sequences, self.prompt_tokens), generator=chance).tolist()


FULL = Work(LLAMA_8B, 64, 1024, 128, 48)
TINY = Work(TINY_LLAMA, 2, 20, 24, 4, peer={"num_blocks": 16, "max_batch_tokens": 64})


def write(folder: Path, work: Work, device: str) -> int:
    """A checkpoint in bf16, drawn on the device; the bytes of weights that a decode step reads (all but the embedding)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**work.model), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizers.byte_level().save_pretrained(folder)
    return sum(2 * each.numel() for name, each in model.named_parameters() if "embed_tokens" not in name)


# ---- ours ----


def open_engine(folder: Path, work: Work) -> Engine:
    values = {"model": str(folder), "dtype": "bf16", "max_batch_size": work.num_sequences, "enable_prefix_caching": False}
    return Engine(EngineConfig.of({**values, "max_model_len": work.prompt_tokens + work.new_tokens, **work.engine}))


def decode_together(engine: Engine, prompts: list[list[int]], num_tokens: int) -> None:
    """Steps until all of the sequences, and nothing else, are decoding."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
    for number, prompt in enumerate(prompts):
        engine.add(Request(id=str(number), prompt=tuple(prompt), params=params))
    seen: set[str] = set()
    while len(seen) < len(prompts):
        seen |= {output.request_id for output in engine.step() if output.tokens}


def run_steps(engine: Engine, num: int) -> float:
    """Seconds that so many steps take."""
    start = time.perf_counter()
    for _ in range(num):
        engine.step()
    return time.perf_counter() - start


def our_seconds(engine: Engine, prompts: list[list[int]], work: Work) -> float:
    """Of a step, best of two runs after one that does not count."""
    times = []
    for _ in range(3):
        decode_together(engine, prompts, work.new_tokens)
        times.append(run_steps(engine, work.num_steps) / work.num_steps)
        engine.reset()
    return min(times[1:])


def busy_share(engine: Engine, prompts: list[list[int]], work: Work) -> float:
    """Share of the wall time of decode steps in which the GPU runs a kernel or a copy."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    decode_together(engine, prompts, work.new_tokens)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        wall = run_steps(engine, work.num_steps)
    engine.reset()
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == DeviceType.CUDA)
    busy, upto = 0.0, 0.0
    for first, last in spans:  # they may overlap
        busy += max(0.0, last - max(first, upto))
        upto = max(upto, last)
    return busy / 1e6 / wall


# ---- theirs ----


def their_seconds(model: Any, prompts: list[list[int]], work: Work) -> float:
    """Of a step in which all sequences decode: between the last one's first token and the first one's last."""
    config = GenerationConfig(max_new_tokens=work.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    given = {"continuous_batching_config": transformers.ContinuousBatchingConfig(**work.peer)} if work.peer else {}
    outputs = model.generate_batch(inputs=prompts, generation_config=config, record_timestamps=True, **given)
    times = [output.timestamps for output in outputs.values()]
    first, last = max(each[0] for each in times), min(each[-1] for each in times)
    steps = [when for when in times[0] if first <= when <= last]
    return (steps[-1] - steps[0]) / (len(steps) - 1)


def peer_seconds(folder: Path, prompts: dict[int, list[list[int]]], work: Work, device: str) -> tuple[dict[int, float], str]:
    """By batch size, or why there are none: its interface changes from version to version; our figures count without it, too."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(device).eval()
        return {num: their_seconds(model, each, work) for num, each in prompts.items()}, ""
    except Exception as error:
        return {}, f"transformers {transformers.__version__}: {type(error).__name__}: {error}"


# ---- the table ----


def rows(sizes: Sizes, work: Work, device: str) -> Iterator[Row]:
    limits = measure_limits(sizes, device)
    yield Row(f"limits: copy {limits.copy / 1e9:.0f} GB/s, bf16 product {limits.product / 1e12:.3f} TFLOP/s")
    with tempfile.TemporaryDirectory() as name:
        weight_bytes = write(Path(name), work, device)
        release(device)
        yield from measured(Path(name), work, limits, weight_bytes, device)


def measured(folder: Path, work: Work, limits: Limits, weight_bytes: int, device: str) -> Iterator[Row]:
    prompts = {1: [work.prompts[0][:16]], work.num_sequences: work.prompts}
    engine = open_engine(folder, work)
    seconds = {num: our_seconds(engine, each, work) for num, each in prompts.items()}
    busy = busy_share(engine, work.prompts, work) if device == "cuda" else None
    del engine
    release(device)
    peers, note = peer_seconds(folder, prompts, work, device)
    for num, each in seconds.items():
        name = f"decode step, batch {num}, {len(prompts[num][0])} prompt tokens"
        share = weight_bytes / limits.copy / each if num == 1 else None
        of, goal = ("weights / copy", 0.85) if num == 1 else ("", None)
        yield Row(name, each, share, of, goal, "transformers", peers.get(num), note)
    yield Row(
        f"GPU busy, batch {work.num_sequences}",
        share=busy,
        of="wall",
        goal=0.97,
        note="" if device == "cuda" else "there is no GPU",
    )


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
