"""Runs prompts greedily through the real Scheduler and Runner, without an engine, and keeps each step's logits."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lmi_dist.config import BLOCK_SIZE, EngineConfig
from lmi_dist.kv_cache import KVCache, MemoryPlan, plan_memory
from lmi_dist.link import Link
from lmi_dist.models import read_config
from lmi_dist.plan import Chunk, Plan
from lmi_dist.runner import Runner
from lmi_dist.scheduler import Scheduler, wants_token
from lmi_dist.sequence import Sequence
from lmi_dist.weights import Checkpoint

AVAILABLE_BYTES = 1 << 30


@dataclass
class Course:
    """What became of one prompt: its new ids and the logits they were chosen from."""

    ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def rows(self) -> torch.Tensor:
        return torch.stack(self.logits)


def make_cache(num_blocks: int = 1) -> KVCache:
    """A small pool for tests of what only needs to be given one."""
    facts = {"max_model_len": 64, "available_bytes": 0, "weights_bytes": 0, "working_bytes": 0, "block_bytes": 0}
    return KVCache(MemoryPlan(dtype="fp32", cache_dtype=torch.float32, num_blocks=num_blocks, arithmetic=(), **facts), 1, 1, 8)


def make_runner(folder: Path, kernels: str = "cpu", link: Link | None = None, **values: Any) -> Runner:
    config = EngineConfig.of(
        {"model": str(folder), "kernels": kernels, "dtype": "fp32", "cpu_threads": 1, "max_batch_size": 32, **values}
    )
    model = read_config(folder)
    return Runner(config, model, plan_memory(config, model, Checkpoint(folder), AVAILABLE_BYTES), link)


def make_scheduler(runner: Runner, **values: Any) -> Scheduler:
    num_blocks = len(runner.cache.layers[0].k)
    defaults = {"max_batch_size": 32, "max_prefill_tokens": 4096, "prefill_chunk_tokens": 4096, "prefix_caching": False}
    sizes = {"num_blocks": num_blocks, "block_size": BLOCK_SIZE, "window": runner.window}
    return Scheduler(**{**sizes, **defaults, **values})


def run(
    runner: Runner, scheduler: Scheduler, prompts: dict[int, tuple[int, ...]], num_steps: int = 64, *, start: int | None = None
) -> dict[int, Course]:
    """Continue each prompt by num_steps tokens, the most probable ones. `start`: the token that a decoder begins with whose encoder
    reads the prompts."""
    courses = {number: Course() for number in prompts}
    for number, prompt in prompts.items():
        tokens, encoder_ids = (prompt, ()) if start is None else ((start,), prompt)
        scheduler.add(
            Sequence(
                id=number,
                token_ids=list(tokens),
                prompt_length=len(tokens),
                max_tokens=num_steps,
                salt=runner.cache_regime(len(tokens)),
                encoder_ids=encoder_ids,
            )
        )
    while scheduler.has_work:
        plan = scheduler.plan()
        logits = iter(runner.forward(plan))
        tokens = {chunk.sequence: _choose(chunk, logits, courses) for chunk in plan.rows if chunk.num_outputs}
        scheduler.commit(plan, tokens)
    return courses


def _choose(chunk: Chunk, logits: Any, courses: dict[int, Course]) -> list[int]:
    assert wants_token(chunk)
    assert chunk.num_outputs == 1
    row = next(logits)
    courses[chunk.sequence].logits.append(row.clone())  # the next step may overwrite it
    courses[chunk.sequence].ids.append(int(row.argmax()))
    return courses[chunk.sequence].ids[-1:]


def logits_at_every_position(runner: Runner, ids: tuple[int, ...]) -> torch.Tensor:
    table = tuple(range(-(-len(ids) // BLOCK_SIZE)))
    return runner.forward(Plan(step=0, chunks=(Chunk(0, ids, 0, table, len(ids), len(ids)),)))
