"""The KV pool: how much memory it gets, told with the arithmetic, and the tensors themselves.

`plan_memory` is a function of its arguments: given the same number of available bytes, `explain` and a server plan the same.
"""

import logging
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from lmi_dist.config import BLOCK_SIZE, EngineConfig, ModelConfig
from lmi_dist.errors import MemoryPlanError
from lmi_dist.images import VisionConfig
from lmi_dist.pages import PagesAhead
from lmi_dist.parallel import Heads, Ranks
from lmi_dist.plan import MAX_PROMPT_ROWS
from lmi_dist.weights import Checkpoint

logger = logging.getLogger(__name__)

Dtype = Literal["fp32", "fp16", "bf16"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BF16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))  # the last one is arm64's
GIGA = 1e9
DEFAULT_SHARE = 4  # the pool takes at most one part in four of the memory when nothing is asked for
NO_CGROUP_LIMIT = 1 << 60  # cgroup v1 says "no limit" with a number near 2**63
HUGE_PAGE, CACHE_LINE = 2 << 20, 64  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the memory is for. All figures but num_blocks and max_model_len are in bytes; `arithmetic` is for people."""

    dtype: Dtype
    cache_dtype: torch.dtype
    max_model_len: int
    available_bytes: int
    weights_bytes: int
    working_bytes: int
    block_bytes: int
    graph_bytes: int = 0  # of recorded decode steps on a GPU, which keep their tensors
    num_blocks: int
    arithmetic: tuple[str, ...]

    @property
    def pool_bytes(self) -> int:
        return self.block_bytes * self.num_blocks

    @property
    def planned_bytes(self) -> int:
        """All that the model takes once its pool is in full use."""
        return self.weights_bytes + self.working_bytes + self.graph_bytes + self.pool_bytes

    @property
    def left_bytes(self) -> int:
        """What the model leaves to others, without what it was told to reserve."""
        return self.available_bytes - self.planned_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens that fit into the pool, of all sequences together."""
        return self.num_blocks * BLOCK_SIZE

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a GPU's memory was found to hold once the weights were there and the largest step had run, in bytes."""

    weights_bytes: int
    working_bytes: int


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """A GPU's memory in bytes, and what of it nobody held before this process took any."""

    total_bytes: int
    free_bytes: int

    def share(self, utilization: float) -> int:
        """What this process may take."""
        return min(int(self.total_bytes * utilization), self.free_bytes)


class LayerCache(NamedTuple):
    """One layer's keys and values, each [N,K,P,D]."""

    k: torch.Tensor
    v: torch.Tensor


class KVCache:
    """The pool's tensors, one LayerCache a layer. Slot s of the plan is block s // P, place s % P. Who may write a block is the
    block pool's business (blocks.py); here are only the bytes, which the system hands out when they are first written."""

    def __init__(
        self, memory: MemoryPlan, num_layers: int, num_kv_heads: int, head_dim: int, device: torch.device | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        is_host = self.device.type == "cpu"
        num, shape, dtype = 2 * num_layers, (memory.num_blocks, num_kv_heads, BLOCK_SIZE, head_dim), memory.cache_dtype
        parts = _host_zeros(num, shape, dtype) if is_host else _device_zeros(num, shape, dtype, self.device)
        self.layers = [LayerCache(k, v) for k, v in zip(parts[::2], parts[1::2], strict=True)]
        self.pages = PagesAhead(parts if is_host and parts[0].nbytes > HUGE_PAGE else ())

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer)


def _device_zeros(num: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num)]


def _host_zeros(num: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """By numpy, which takes zeros from the system as they are, in huge pages if it can; torch would write them all. Large tensors
    each begin at another place of a page: a step writes the same blocks in all, and would wait for a page of each at once."""
    size = prod(shape) * dtype.itemsize
    stride = -(-size // CACHE_LINE) * CACHE_LINE
    if size > 16 * HUGE_PAGE:
        stride = -(-size // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE // num // CACHE_LINE * CACHE_LINE
    pool = torch.from_numpy(np.zeros(num * stride + CACHE_LINE, np.uint8))
    firsts = range(-pool.data_ptr() % CACHE_LINE, len(pool) - stride + 1, stride)
    return [pool[first : first + size].view(dtype).view(shape) for first in firsts]


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    checkpoint: Checkpoint,
    available_bytes: int,
    *,
    cpu_flags: frozenset[str] | None = None,
    gpu: GpuMemory | None = None,
    measured: Measured | None = None,
) -> MemoryPlan:
    """Divide this rank's part of `available_bytes`, less reserved_memory_mb, among weights, KV pool and working memory. With
    `gpu` it is that GPU's share by gpu_memory_utilization, and `measured` tells what is estimated else. An unset pool is the
    smaller of a quarter of it (on a GPU: all that is left) and what max_batch_size sequences of max_model_len tokens need, but
    room for one such sequence at least. Raises MemoryPlanError with the arithmetic, ConfigError when max_model_len is more than
    the model can do or the ranks cannot share its heads."""
    cpu_flags = read_cpu_flags() if cpu_flags is None else cpu_flags
    dtype = resolve_dtype(config.dtype, model.dtype, cpu_flags) if gpu is None else gpu_dtype(config.dtype, model.dtype)
    length = model.model_len(config.max_model_len)
    num_sharing = config.tensor_parallel_degree if gpu is None else 1
    share = available_bytes if gpu is None else gpu.share(config.gpu_memory_utilization)
    available_bytes = max(0, share - (config.reserved_memory_mb << 20)) // num_sharing
    demand = _Demand(config, model, checkpoint, dtype, length, available_bytes, gpu, measured)
    plan = MemoryPlan(
        dtype=dtype,
        cache_dtype=demand.cache_dtype,
        max_model_len=length,
        available_bytes=available_bytes,
        weights_bytes=demand.weights_bytes,
        working_bytes=demand.working_bytes,
        graph_bytes=demand.graph_bytes,
        block_bytes=demand.block_bytes,
        num_blocks=demand.num_blocks,
        arithmetic=demand.lines(),
    )
    demand.check()
    return plan


class _Demand:
    """The arithmetic of one plan, each figure under its name."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        checkpoint: Checkpoint,
        dtype: Dtype,
        length: int,
        available_bytes: int,
        gpu: GpuMemory | None,
        measured: Measured | None,
    ) -> None:
        self.gpu, self.measured = gpu, measured
        self.config, self.model, self.dtype, self.length, self.available_bytes = config, model, dtype, length, available_bytes
        self.item_bytes = TORCH_DTYPES[dtype].itemsize
        self.packs_weights = gpu is None or config.batch_invariant  # else a GPU's products take them as they are
        self.cache_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else TORCH_DTYPES[dtype]
        self.num_ranks = config.tensor_parallel_degree
        self.heads = Heads.share(Ranks(0, self.num_ranks), model.num_heads, model.num_kv_heads, model.head_dim)
        self.weights_bytes = measured.weights_bytes if measured else self.item_bytes * self._num_weights(checkpoint)
        self.working_bytes = (measured.working_bytes if measured else self._working_bytes()) + self._vision_bytes()
        self.graph_bytes = self._graph_bytes() if gpu else 0
        self.block_bytes = 2 * model.num_layers * len(self.heads.key) * BLOCK_SIZE * model.head_dim * self.cache_dtype.itemsize
        self.blocks_of_one = -(-length // BLOCK_SIZE) * (2 if model.is_encoder_decoder else 1)  # each end may be so long
        self.num_blocks = self._num_blocks()

    def _num_weights(self, checkpoint: Checkpoint) -> int:
        """Elements of this rank's weights: its share of the matrices, all of the rest. A tied embedding counts twice where the
        head holds a packed copy of it; key heads that several ranks hold count on each."""
        model, num_ranks = self.model, self.num_ranks
        tied = model.vocab_size * model.hidden_size if model.tied_embeddings and self.packs_weights else 0
        matrices = tied + sum(info.num_elements for info in checkpoint.tensors.values() if len(info.shape) > 1)
        rest = sum(info.num_elements for info in checkpoint.tensors.values() if len(info.shape) <= 1)
        num_repeated = len(self.heads.key) * num_ranks - model.num_kv_heads
        repeated = 2 * model.num_layers * num_repeated * model.head_dim * model.hidden_size
        return -(-(matrices + repeated) // num_ranks) + rest

    def _working_bytes(self) -> int:
        """The tensors of a step: of one layer at the longest prompt chunk, and the logits of a full batch and of prompts."""
        tokens = min(self.config.max_prefill_tokens, self.length * self.config.max_batch_size)
        tokens = max(tokens, self.length) if self.model.is_encoder_decoder else tokens  # an encoder's input is not cut
        return self._step_bytes(tokens, self.config.max_batch_size + min(MAX_PROMPT_ROWS, tokens))

    def _step_bytes(self, tokens: int, rows: int) -> int:
        """Of so many tokens, and so many rows of logits."""
        model = self.model
        feed_forward = model.keys.integer("intermediate_size", default=4 * model.hidden_size)
        feed_forward *= model.keys.integer("num_experts_per_tok", default=1)
        feed_forward *= 1 if self.packs_weights else 3  # gate and up are there before what comes of them
        heads = 2 * (len(self.heads.query) + len(self.heads.key)) * model.head_dim
        per_token = (4 * model.hidden_size + heads + feed_forward // self.num_ranks) * self.item_bytes
        return tokens * per_token + rows * model.vocab_size * 4

    def _graph_bytes(self) -> int:
        """Tensors of CUDA graphs: a step's, whose memory they share, and the logits of each, which it keeps."""
        sizes = self.config.graph_sizes
        return self._step_bytes(max(sizes, default=0), sum(sizes))

    def _vision_bytes(self) -> int:
        """An image's pixels, what the vision tower makes of one tile in a layer, and of all tiles in those that are looked at,
        twice the features of an image while they are put together, and those of a prompt's other images."""
        vision = VisionConfig.read(self.model.keys)
        if vision is None:
            return 0
        keys = self.model.keys.section("vision_config")
        hidden, heads = keys.integer("hidden_size", default=1024), keys.integer("num_attention_heads", default=16)
        feed_forward, patches = keys.integer("intermediate_size", default=4096), vision.side**2 + 1
        depths = len(self.model.keys.integers("vision_feature_layer") or (-2,))
        pixels = vision.max_tiles * 3 * vision.tile**2 * 4
        layer = patches * (6 * hidden + feed_forward) + heads * patches**2
        features = (self.config.max_images + 1) * vision.max_tokens * self.model.hidden_size
        seen = vision.max_tiles * patches * (depths * hidden + 2 * self.model.hidden_size)
        return pixels + (layer + seen + features) * self.item_bytes

    def _num_blocks(self) -> int:
        if self.config.kv_cache_memory_bytes is not None:
            return self.config.kv_cache_memory_bytes // self.block_bytes
        free = self.available_bytes - self.weights_bytes - self.working_bytes - self.graph_bytes
        usual = free if self.gpu else self.available_bytes // DEFAULT_SHARE
        most = self.config.max_batch_size * self.blocks_of_one
        return max(self.blocks_of_one, min(usual // self.block_bytes, free // self.block_bytes, most))

    def lines(self) -> tuple[str, ...]:
        pool = self.num_blocks * self.block_bytes
        rest = self.available_bytes - self.weights_bytes - self.working_bytes - self.graph_bytes - pool
        found = "measured" if self.measured else "estimated"
        model, reserved = self.model, self.config.reserved_memory_mb
        return (
            f"available memory {_gb(self.available_bytes)}"
            + (" a rank" if self.num_ranks > 1 else "")
            + self._of_gpu()
            + (f" beside {reserved} MiB reserved" if reserved else ""),
            f"weights {_gb(self.weights_bytes)} in {self.dtype}" + (f", {found}" if self.gpu else ""),
            f"working memory {_gb(self.working_bytes)} for {self.config.max_prefill_tokens} prompt tokens a step"
            + (f", {found}" if self.gpu else "")
            + (f", {_gb(vision)} of it for images" if (vision := self._vision_bytes()) else ""),
            *([f"recorded decode steps {_gb(self.graph_bytes)}"] if self.gpu else []),
            f"block {self.block_bytes} bytes = 2 x {model.num_layers} layers x {len(self.heads.key)} heads x {BLOCK_SIZE} tokens"
            f" x {model.head_dim} x {self.cache_dtype.itemsize} bytes" + (" in fp8" if self.config.kv_cache_dtype == "fp8" else ""),
            f"KV pool {_gb(pool)} = {self.num_blocks} blocks = {self.num_blocks * BLOCK_SIZE} tokens"
            f" = {self.num_blocks // self.blocks_of_one} sequences of max_model_len={self.length}",
            f"left {_gb(rest)}",
        )

    def _of_gpu(self) -> str:
        if self.gpu is None:
            return ""
        share = self.config.gpu_memory_utilization
        return f" of a GPU's {_gb(self.gpu.total_bytes)}, {_gb(self.gpu.free_bytes)} free, gpu_memory_utilization={share:g}"

    def check(self) -> None:
        told = "; ".join(self.lines())
        if self.num_blocks < self.blocks_of_one:
            raise MemoryPlanError(
                f"kv_cache_memory_bytes={self.config.kv_cache_memory_bytes} does not hold one sequence of "
                f"max_model_len={self.length}, which needs {self.blocks_of_one * self.block_bytes} bytes; "
                f"raise it or lower max_model_len ({told})"
            )
        planned = self.weights_bytes + self.working_bytes + self.graph_bytes + self.num_blocks * self.block_bytes
        if planned > self.available_bytes:
            of_gpu = "raise gpu_memory_utilization or tensor_parallel_degree, " if self.gpu else ""
            raise MemoryPlanError(
                f"the model does not fit the memory; lower max_model_len, kv_cache_memory_bytes or max_prefill_tokens, {of_gpu}"
                f"set dtype=bf16 or take a machine with more memory ({told})"
            )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GIGA:.3f} GB"


# ---- what the machine is ----


def resolve_dtype(wanted: Literal["auto", "fp32", "fp16", "bf16"], checkpoint: Dtype, cpu_flags: frozenset[str]) -> Dtype:
    """The dtype to run in on a CPU: what is wanted, else bf16 where the CPU multiplies it, else fp32. Says so if it differs
    from the checkpoint's."""
    dtype: Dtype = wanted if wanted != "auto" else "bf16" if cpu_flags & BF16_FLAGS else "fp32"
    if dtype != checkpoint:
        logger.info("the checkpoint is %s, the model runs in %s (dtype=%s)", checkpoint, dtype, wanted)
    return dtype


def gpu_dtype(wanted: Literal["auto", "fp32", "fp16", "bf16"], checkpoint: Dtype) -> Dtype:
    """The dtype to run in on a GPU: what is wanted, else the checkpoint's."""
    return checkpoint if wanted == "auto" else wanted


def read_cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The first CPU's features as the kernel names them; none where that file does not exist."""
    if not cpuinfo.exists():
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the system has free and, in a container, what its limit leaves."""
    meminfo = (root / "proc/meminfo").read_text(encoding="utf-8")
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo, re.MULTILINE)
    if match is None:
        raise MemoryPlanError("/proc/meminfo has no MemAvailable; set kv_cache_memory_bytes")
    return min(int(match[1]) * 1024, *_cgroup_rests(root / "sys/fs/cgroup"), NO_CGROUP_LIMIT)


def _cgroup_rests(root: Path) -> list[int]:
    """What each version's limit leaves, if there is one. Cached file pages do not count as used: they are given back on demand."""
    rests = []
    for folder, limit, used, cached in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).exists() and (folder / used).exists():
            maximum = _number(folder / limit)
            if maximum < NO_CGROUP_LIMIT:
                rests.append(max(0, maximum - _number(folder / used) + _stat(folder / "memory.stat", cached)))
    return rests


def _number(file: Path) -> int:
    text = file.read_text(encoding="utf-8").strip()
    return int(text) if text.isdecimal() else NO_CGROUP_LIMIT  # "max"


def _stat(file: Path, name: str) -> int:
    if not file.exists():
        return 0
    match = re.search(rf"^{name} (\d+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return int(match[1]) if match else 0
