"""Whole steps of the engine on Llama-3-8B's shape with random weights: one sequence against the reading of the weights, one and 64
against the GPU's idle time, with CUDA graphs and from Python; and transformers' continuous batching on the same shape. Needs what
the engine needs, pydantic above all."""

import gc
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tiny_tokenizers
import torch
import transformers
from gpu_limits import Limits, Row
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from lmi_dist import Engine, EngineConfig, Output, Request, SamplingParams

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
    num_profiled: int  # of those
    engine: dict[str, Any] = field(default_factory=dict)  # settings
    peer: dict[str, Any] = field(default_factory=dict)  # of transformers' continuous batching

    @property
    def batches(self) -> dict[int, list[list[int]]]:
        """Prompts by number of sequences: a short one alone, and all."""
        return {1: [self.prompts[0][:16]], self.num_sequences: self.prompts}

    @property
    def prompts(self) -> list[list[int]]:
        chance = torch.Generator().manual_seed(0)
        return torch.randint(3, self.model["vocab_size"], (self.num_sequences, self.prompt_tokens), generator=chance).tolist()


FULL = Work(LLAMA_8B, 64, 1024, 128, 48, 16)
TINY = Work(TINY_LLAMA, 2, 20, 24, 4, 2, peer={"num_blocks": 16, "max_batch_tokens": 64})


def make_model(work: Work, device: str) -> Any:
    """Random weights in bf16, drawn on the device."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**work.model), dtype=torch.bfloat16, attn_implementation="sdpa").eval()


@contextmanager
def checkpoint(work: Work, device: str) -> Iterator[tuple[Path, int]]:
    """A folder with a checkpoint, in memory if there is room, and the bytes of weights that a decode step reads: all but the
    embedding."""
    model = make_model(work, device)
    sizes = {name: each.nbytes for name, each in model.named_parameters()}
    shared = Path("/dev/shm")
    has_room = shared.is_dir() and shutil.disk_usage(shared).free > 1.2 * sum(sizes.values())
    with tempfile.TemporaryDirectory(dir=shared if has_room else None) as name:
        model.save_pretrained(name)
        tiny_tokenizers.byte_level().save_pretrained(name)
        del model
        release(device)
        yield Path(name), sum(size for name, size in sizes.items() if "embed_tokens" not in name)


# ---- ours ----

# Settings by name; those of a version that has not all of them are left out.
WAYS: dict[str, dict[str, Any]] = {"as it comes": {}, "batch_invariant": {"batch_invariant": True}}


def open_engine(folder: Path, work: Work) -> Engine:
    values = {"model": str(folder), "dtype": "bf16", "max_batch_size": work.num_sequences}
    return Engine(EngineConfig.of({**values, "max_model_len": work.prompt_tokens + work.new_tokens, **work.engine}))


def decode_together(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[Output]:
    """Steps until all of the sequences, and nothing else, are decoding. Gives what they have said."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
    for number, prompt in enumerate(prompts):
        engine.add(Request(id=str(number), prompt=tuple(prompt), params=params))
    said: list[Output] = []
    while len({output.request_id for output in said if output.tokens}) < len(prompts):
        said += engine.step()
    return said


def end(engine: Engine, prompts: list[list[int]]) -> None:
    """What was begun; the prompts' blocks can be found again, so that the next beginning takes no time."""
    for number in range(len(prompts)):
        engine.abort(str(number))


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
        end(engine, prompts)
    return min(times[1:])


def busy_seconds(engine: Engine, prompts: list[list[int]], work: Work) -> float:
    """Of a step, in which the GPU runs a kernel or a copy, by the profiler, which sees those within a graph too."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    decode_together(engine, prompts, work.new_tokens)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_steps(engine, work.num_profiled)
        torch.cuda.synchronize()
    end(engine, prompts)
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == DeviceType.CUDA)
    busy, upto = 0.0, 0.0
    for first, last in spans:  # they may overlap
        busy += max(0.0, last - max(first, upto))
        upto = max(upto, last)
    return busy / 1e6 / work.num_profiled


def forward_seconds(engine: Engine, prompts: list[list[int]], work: Work) -> float:
    """Of a step, between two events around its forward, graph or not; without the profiler, which slows down what it sees."""
    decode_together(engine, prompts, work.new_tokens)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    plain = engine._runner.forward

    def timed(*arguments: Any) -> Any:
        events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        events[-1][0].record()
        result = plain(*arguments)
        events[-1][1].record()
        return result

    engine._runner.forward = timed  # type: ignore[method-assign]
    run_steps(engine, work.num_steps)
    del engine._runner.forward
    torch.cuda.synchronize()
    end(engine, prompts)
    return sum(first.elapsed_time(last) for first, last in events) / 1e3 / len(events)


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


def peer_rows(work: Work, device: str) -> Iterator[Row]:
    """Its interface changes from version to version: what fails is told, and costs no other row."""
    model = make_model(work, device)
    for num, prompts in work.batches.items():
        name = f"decode step of transformers {transformers.__version__}, batch {num}"
        try:
            yield Row(name, their_seconds(model, prompts, work))
        except Exception as error:
            yield Row(name, note=f"{type(error).__name__}: {error}")


# ---- the table ----


def rows(limits: Limits, work: Work, device: str) -> Iterator[Row]:
    yield limits.row()
    with checkpoint(work, device) as (folder, weight_bytes):
        for way, settings in WAYS.items():
            if set(settings) <= set(EngineConfig.model_fields):
                yield from measured(folder, replace(work, engine=work.engine | settings), way, limits, weight_bytes, device)


def measured(folder: Path, work: Work, way: str, limits: Limits, weight_bytes: int, device: str) -> Iterator[Row]:
    """Rows of one engine, each batch with recorded decode steps, the same without overlap, and from Python."""
    engine = open_engine(folder, work)
    recorded, held_before = engine._runner.decodes, held_by_driver(device)
    for num, prompts in work.batches.items():
        for how, decodes, overlaps in (("recorded", recorded, True), ("no overlap", recorded, False), ("from Python", None, True)):
            engine._runner.decodes, engine._overlaps = decodes, overlaps
            name = f"batch {num}, {len(prompts[0])} prompt tokens, {how}, {way}"
            seconds = our_seconds(engine, prompts, work)
            limit = (weight_bytes / limits.copy / seconds, "weights / copy", 0.85) if num == 1 else ()
            yield Row(f"decode step, {name}", seconds, *limit)
            yield busy_row(f"GPU busy, {name}", engine, prompts, seconds, work, device)
        engine._runner.decodes = recorded
        yield same_row(f"same ids with and without overlap, batch {num}, {way}", engine, prompts, work)
    graphs = (
        f"{(held_by_driver(device) - held_before) / 1e6:.0f} MB beside tensors, for which {engine.memory.graph_bytes / 1e6:.0f}"
    )
    yield Row(f"recordings of {getattr(recorded, 'sizes_recorded', [])} sequences, {way}", note=f"{graphs} MB are planned")
    engine.close()
    del engine, recorded
    release(device)


def held_by_driver(device: str) -> int:
    """Of the GPU's memory in bytes, what is no tensor's."""
    if device != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def same_row(name: str, engine: Engine, prompts: list[list[int]], work: Work) -> Row:
    """Sequences come in a step later where steps overlap: only batch_invariant promises the same ids of all."""
    answers = []
    for engine._overlaps in (True, False):
        said = decode_together(engine, prompts, work.new_tokens)
        said += [output for _ in range(work.num_steps) for output in engine.step()]
        end(engine, prompts)
        answers.append([[t.id for o in said if o.request_id == str(i) for t in o.tokens] for i in range(len(prompts))])
    num_alike = sum(all(x == y for x, y in zip(a, b, strict=False)) for a, b in zip(*answers, strict=True))
    return Row(name, note=f"{num_alike} of {len(prompts)} sequences alike")


def busy_row(name: str, engine: Engine, prompts: list[list[int]], seconds: float, work: Work, device: str) -> Row:
    """By the profiler, as a share of a step's time without it; the forward's own share by events is the least that it can be."""
    if device != "cuda":
        return Row(name, of="wall", goal=0.97, note="there is no GPU")
    try:
        busy, forward = busy_seconds(engine, prompts, work), forward_seconds(engine, prompts, work)
    except Exception as error:
        return Row(name, of="wall", goal=0.97, note=f"{type(error).__name__}: {error}")
    return Row(name, busy, busy / seconds, "wall", 0.97, note=f"forward alone by events {forward * 1e3:.3f} ms")


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
