"""The KV pool of GPUs, from what loading and the largest step have left of their memory. All ranks come to the same plan."""

import logging
from dataclasses import replace

import torch

from lmi_dist.config import BLOCK_SIZE
from lmi_dist.kv_cache import GpuMemory, Measured, MemoryPlan, plan_memory
from lmi_dist.link import Link
from lmi_dist.plan import MAX_PROMPT_ROWS, Chunk, Encode, Plan
from lmi_dist.runner import Runner
from lmi_dist.setup import Explanation
from lmi_dist.weights import Checkpoint

logger = logging.getLogger(__name__)

UNIT = 1 << 20  # in which the ranks tell each other: in fp32, exact up to 16 TiB


def is_measured(setup: Explanation) -> bool:
    """Whether the pool's size waits for the weights: on GPUs, unless kv_cache_memory_bytes says it."""
    return setup.device.type == "cuda" and setup.config.kv_cache_memory_bytes is None


def before_fitting(setup: Explanation) -> MemoryPlan:
    """The plan to load with: a pool of one sequence of max_model_len where the real one is still to be measured."""
    if not is_measured(setup):
        return setup.memory
    per_end = -(-setup.memory.max_model_len // BLOCK_SIZE)
    return replace(setup.memory, num_blocks=per_end * (2 if setup.model.is_encoder_decoder else 1))


def largest_plan(setup: Explanation) -> Plan:
    """A step with as many prompt tokens and rows of logits as one may have. Its sequences share their blocks: nobody looks at what
    comes out."""
    config, length = setup.config, setup.memory.max_model_len
    num_blocks = -(-length // BLOCK_SIZE)
    table = tuple(range(num_blocks))
    cross: dict[str, tuple[int, ...] | int] = {}
    encodes: tuple[Encode, ...] = ()
    if setup.model.is_encoder_decoder:
        cross = {"cross_table": tuple(range(num_blocks, 2 * num_blocks)), "cross_length": length}
        encodes = (Encode(0, (0,) * length, tuple(range(num_blocks, 2 * num_blocks))),)
    chunks: list[Chunk] = []
    tokens = min(config.max_prefill_tokens, length * config.max_batch_size)
    rows = min(tokens, config.max_batch_size + MAX_PROMPT_ROWS)
    while tokens > 0:
        size = min(length, tokens)
        outputs = min(size, rows)
        chunks.append(Chunk(len(chunks), (0,) * size, 0, table[: -(-size // BLOCK_SIZE)], size, outputs, **cross))  # type: ignore[arg-type]
        tokens, rows = tokens - size, rows - outputs
    return Plan(step=0, chunks=tuple(chunks), encodes=encodes)


def fit_pool(setup: Explanation, runner: Runner, plan: Plan, link: Link) -> MemoryPlan:
    """Run the plan, which has begun on all ranks, measure, and give the runner the pool that fits on each of them. Raises
    MemoryPlanError with the arithmetic."""
    device = setup.device
    loaded = runner.free_before - device.free_bytes() - runner.cache.size_bytes
    working = device.peak_bytes(lambda: runner.forward(plan))
    found = _agreed(link, [runner.free_before, loaded, working + _sampler_bytes(setup)], device.place)
    gpu = GpuMemory(device.total_bytes(), min(row[0] for row in found))
    measured = Measured(max(row[1] for row in found), max(row[2] for row in found))
    memory = plan_memory(setup.config, setup.model, Checkpoint(setup.model.folder), gpu.free_bytes, gpu=gpu, measured=measured)
    runner.allocate(memory)
    for line in memory.arithmetic:
        logger.info("%s", line)
    return memory


def _sampler_bytes(setup: Explanation) -> int:
    """A copy of a full batch's logits, for log probabilities."""
    return setup.config.max_batch_size * setup.model.vocab_size * 4


def _agreed(link: Link, figures: list[int], place: torch.device) -> list[list[int]]:
    """Every rank's figures, in bytes, on every rank."""
    table = torch.zeros((link.ranks.size, len(figures)), dtype=torch.float32, device=place)
    table[link.ranks.rank] = torch.tensor([-(-figure // UNIT) for figure in figures], dtype=torch.float32)
    return [[int(units) * UNIT for units in row] for row in link.all_reduce(table).tolist()]
