"""What a configuration comes to on this machine, worked out before any weight is read. The engine and `explain` share it, so that
with the same free memory the one does what the other says.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmi_dist import ops
from lmi_dist.collector import uncollected
from lmi_dist.config import EngineConfig, ModelConfig
from lmi_dist.decode_batch import recorded_sizes
from lmi_dist.device import Device, choose_device
from lmi_dist.errors import CheckpointError, ConfigError
from lmi_dist.kv_cache import GpuMemory, MemoryPlan, available_memory, gpu_dtype, plan_memory
from lmi_dist.models import read_config
from lmi_dist.parallel import Heads, Ranks
from lmi_dist.weights import Checkpoint, fetch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

PREFILL_CHUNK_TOKENS = {"cpu": 512, "cuda": 2048}
# On GPUs any prompt token makes a step three times as long, for it runs from Python then: small chunks would only multiply that.
MAX_DECODE_SLOWDOWN = {"cpu": 3.0, "cuda": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """`config` with every choice made, the model's facts, the memory plan with its arithmetic, and the kernels."""

    config: EngineConfig
    model: ModelConfig
    memory: MemoryPlan
    device: Device
    kernels: str
    decodes: str
    available_bytes: int  # that the plan was made from, on the whole machine; or of a GPU's memory

    @property
    def lines(self) -> tuple[str, ...]:
        """The same for people, the options left out."""
        model = self.model
        return (
            f"model {model.architecture} in {model.folder}: {model.num_layers} layers, hidden {model.hidden_size}, "
            f"{model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} key heads, vocabulary {model.vocab_size}, "
            f"{model.max_position} positions, checkpoint in {model.dtype}",
            *self._ranks,
            *self.memory.arithmetic,
            f"device {self.device.type} ({self.device.reason})",
            f"kernels {self.kernels}",
            f"decode steps {self.decodes}",
        )

    @property
    def _ranks(self) -> tuple[str, ...]:
        degree, model = self.config.tensor_parallel_degree, self.model
        if degree == 1:
            return ()
        heads = Heads.share(Ranks(0, degree), model.num_heads, model.num_kv_heads, model.head_dim)
        return (f"{degree} ranks, each with {len(heads.query)} heads, {len(heads.key)} key heads, and what follows",)


def explain(config: EngineConfig, *, available_bytes: int | None = None, rank: int = 0) -> Explanation:
    """What an engine of this configuration would do, given so much free memory (unset: what is free now). Reads config.json and
    the headers of the weights, loads none. Raises ConfigError, CheckpointError or MemoryPlanError, as the engine would."""
    folder = fetch(config.model, config.revision)
    device = choose_device(config, rank)
    device.use()
    model = read_config(folder)
    threads = config.cpu_threads or max(1, usable_cpus() // config.tensor_parallel_degree)
    column = device.column if config.kernels == "auto" else config.kernels
    if config.wants_flash_attn:
        _check_flash_attn(config, model, device)
    kernels = ops.select(column, threads, batch_invariant=config.batch_invariant, flash_attn=config.wants_flash_attn)
    if available_bytes is None:
        available_bytes = available_memory() if device.type == "cpu" else device.free_bytes()
    gpu = GpuMemory(device.total_bytes(), available_bytes) if device.type == "cuda" else None
    memory = plan_memory(config, model, Checkpoint(folder), available_bytes, gpu=gpu)
    pool_bytes = memory.pool_bytes if gpu is None else config.kv_cache_memory_bytes  # of a GPU's, what is left is measured
    chunk, slowdown = config.prefill_chunk_tokens, config.max_decode_slowdown
    if chunk is None and config.enable_chunked_prefill:
        chunk = PREFILL_CHUNK_TOKENS[device.type]
    choices = {
        "dtype": memory.dtype,
        "device": device.type,
        "kernels": ops.chosen().name,
        "cpu_threads": threads,
        "max_model_len": memory.max_model_len,
        "prefill_chunk_tokens": chunk,
        "max_decode_slowdown": MAX_DECODE_SLOWDOWN[device.type] if slowdown is None else slowdown,
        "kv_cache_memory_bytes": pool_bytes,
    }
    chosen = config.model_copy(update=choices)
    return Explanation(
        config=chosen,
        model=model,
        memory=memory,
        device=device,
        kernels=kernels,
        decodes=_decodes(config, device),
        available_bytes=available_bytes,
    )


def _check_flash_attn(config: EngineConfig, model: ModelConfig, device: Device) -> None:
    """Raises ConfigError if it cannot do the model's prompts."""
    obstacle = ""
    if device.type != "cuda":
        obstacle = f"runs on GPUs, and this is device={device.type} ({device.reason})"
    elif model.is_encoder_decoder:
        obstacle = f"has no relative position bias, which {model.architecture} needs"
    elif gpu_dtype(config.dtype, model.dtype) == "fp32":
        obstacle = f"takes bf16 and fp16, and dtype={config.dtype} means fp32 here"
    elif config.kv_cache_dtype == "fp8":
        obstacle = "reads keys in bf16 and fp16, and kv_cache_dtype is fp8"
    if obstacle:
        raise ConfigError(f"prefill_attention=flash-attn is refused: it {obstacle}; leave it out, and our kernels do prompts")


def _decodes(config: EngineConfig, device: Device) -> str:
    sizes = recorded_sizes(config, device)
    if not sizes:
        return "run from Python: " + ("enforce_eager=true" if config.enforce_eager else "torch's operations are not recorded")
    if isinstance(sizes, range):
        return f"of up to {sizes[-1]} sequences are recorded and replayed"
    return f"are CUDA graphs of {', '.join(map(str, sizes))} sequences"


@uncollected()
def load_tokenizer(config: EngineConfig, folder: Path) -> "PreTrainedTokenizerBase":
    """The model's tokenizer or the one that `tokenizer` names. Raises CheckpointError if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    place = folder if config.tokenizer is None else fetch(config.tokenizer, None)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, config=_plain_config(place), trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # transformers and tokenizers raise what they like, bare Exception among it
        raise CheckpointError(
            f"tokenizer={place} cannot be loaded: {error}; the folder must hold tokenizer.json or what its tokenizer class reads"
        ) from error
    return tokenizer


def _plain_config(folder: Path) -> "PreTrainedConfig | None":
    """config.json as it stands, where it and tokenizer_config.json say all that AutoTokenizer asks; else None, and it looks itself.

    That makes the model's own kind of configuration, and to import this takes torch's compiler and sympy: half of a worker's start.
    """
    from transformers import PreTrainedConfig

    try:
        values, own = (json.loads((folder / name).read_text("utf-8")) for name in ("config.json", "tokenizer_config.json"))
        is_plain = isinstance(own["tokenizer_class"], str) and isinstance(values["model_type"], str)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if not is_plain or "auto_map" in own or "auto_map" in values:
        return None
    config: PreTrainedConfig = PreTrainedConfig.from_dict(values)
    config.name_or_path = str(folder)
    return config


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may run on, or fewer if a container's quota gives less time than they have."""
    allowed = len(os.sched_getaffinity(0))
    quota, period = _cpu_quota(cgroup)
    return min(allowed, -(-quota // period)) if quota > 0 else allowed


def _cpu_quota(cgroup: Path) -> tuple[int, int]:
    """Microseconds of CPU time in a period of so many; quota 0: no limit. Version 2's file, else version 1's two."""
    if (cgroup / "cpu.max").exists():
        words = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
    elif (cgroup / "cpu/cpu.cfs_quota_us").exists():
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [(cgroup / "cpu" / name).read_text(encoding="utf-8").strip() for name in names]
    else:
        words = ["max", "1"]
    quota, period = words
    return (int(quota) if quota.isdecimal() else 0), int(period)
