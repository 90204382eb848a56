"""Runner: builds the model from its checkpoint, owns the KV pool, and turns a Plan into logits. The same on every rank."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch

from lmi_dist import ops, quant
from lmi_dist.batch import Chosen, build, build_encoder
from lmi_dist.config import EngineConfig, ModelConfig
from lmi_dist.device import CPU, Device
from lmi_dist.kv_cache import KVCache, MemoryPlan
from lmi_dist.link import Link
from lmi_dist.models import EncoderDecoder, Model, VisionModel, model_class
from lmi_dist.pages import keep_freed_memory
from lmi_dist.parallel import Heads, Ranks
from lmi_dist.plan import Plan
from lmi_dist.recorded import recorded_decodes
from lmi_dist.weights import Checkpoint, Inventory, Progress, Weights

logger = logging.getLogger(__name__)


class Runner:
    """One rank's model with its cache."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        memory: MemoryPlan,
        link: Link | None = None,
        device: Device = CPU,
        *,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        """Load the weights to `device`. meanwhile: called now and then; what it raises ends the loading. Raises CheckpointError
        before the first byte is read if the files are not what `model` promises, ConfigError on what is not supported,
        KernelError if the wanted column of operations is not there."""
        self._link = link = link or Link()
        self.device = device
        device.use()
        self.free_before = device.free_bytes() if device.type == "cuda" else 0  # of this rank's GPU, in bytes
        take_cpus(link.ranks)
        self._num_threads = config.cpu_threads or len(os.sched_getaffinity(0))
        self._features: dict[bytes, torch.Tensor] = {}  # [tokens,E] of images, by digest
        column = device.column if config.kernels == "auto" else config.kernels
        kernels = ops.select(column, config.cpu_threads, batch_invariant=config.batch_invariant, flash_attn=config.wants_flash_attn)
        _share_cpus(kernels, self._num_threads)
        checkpoint = Checkpoint(model.folder)
        kind = quant.format_of(model, config.quantize)
        inventory = Inventory(checkpoint, memory.torch_dtype, link, kind, device=device.place)
        inventory.verify(model_class(model.architecture)(model, inventory, memory.max_model_len).ignored)
        self.model = _load(model, checkpoint, memory, link, kind, inventory.num_bytes, device, meanwhile)
        if device.type == "cpu":
            keep_freed_memory()  # not before: buffers of weights would be kept, too
        heads = Heads.share(link.ranks, model.num_heads, model.num_kv_heads, model.head_dim)
        self.window = model.window  # for the scheduler: older keys are not looked at
        self._settings = config, model
        self._cache_shape = model.num_layers, len(heads.key), model.head_dim
        self.allocate(memory)

    def allocate(self, memory: MemoryPlan) -> None:
        """Take a pool of memory.num_blocks blocks in place of the one there is."""
        vars(self).pop("cache", None)  # the old one goes first
        self.cache = KVCache(memory, *self._cache_shape, self.device.place)
        self.decodes = recorded_decodes(self.model, self.cache, *self._settings, memory, self.device)

    @torch.inference_mode()
    def forward(self, plan: Plan, chosen: Chosen | None = None) -> torch.Tensor:
        """fp32 logits [R,V] on rank 0, good until the next forward: of each of plan.rows in order the last `num_outputs` tokens.
        Keys and values go to the cache. `chosen`: where the plan's PENDING tokens are; a GPU has not chosen them yet when this
        returns, nor run anything else. If it fails, it fails on all ranks, on the others with RankError."""
        try:
            self._encode(plan)
            self.cache.pages.reach(max([chunk.table[-1] for chunk in plan.rows], default=0))
            logits = None if self.decodes is None else self.decodes.forward(plan.rows, chosen)
            return logits if logits is not None else self.model(build(plan, self.cache, self._features, chosen))
        except Exception as error:
            self._link.drop(error)
            raise

    def _encode(self, plan: Plan) -> None:
        """Run the plan's encoder inputs. Of images' features only those are kept that the plan names."""
        self._features = {digest: self._features[digest] for digest in plan.features}
        texts = [encode for encode in plan.encodes if encode.image is None]
        images = [encode.image for encode in plan.encodes if encode.image is not None]
        if texts:
            cast(EncoderDecoder, self.model).encode(build_encoder(texts, self.cache))
        if images:
            with _torch_threads(self._num_threads):
                self._features |= {image.digest: cast(VisionModel, self.model).see(image) for image in images}

    def cache_regime(self, prompt_length: int) -> str:
        """To be mixed into a sequence's salt for the prefix cache: keys are alike only within one regime."""
        return self.model.cache_regime(prompt_length)


def _load(
    model: ModelConfig,
    checkpoint: Checkpoint,
    memory: MemoryPlan,
    link: Link,
    kind: str,
    num_bytes: int,
    device: Device,
    meanwhile: Callable[[], object],
) -> Model:
    started = time.monotonic()
    with Progress(f"loading {model.folder.name}", num_bytes) as progress, torch.inference_mode():

        def advance(num_read: int) -> None:
            progress.advance(num_read)
            meanwhile()

        weights = Weights(checkpoint, memory.torch_dtype, link, kind, device=device.place, advance=advance)
        built = model_class(model.architecture)(model, weights, memory.max_model_len)
    seconds = time.monotonic() - started
    logger.info("%s: %.2f GB in %.1f s as %s", model.architecture, checkpoint.size_bytes / 1e9, seconds, memory.dtype)
    return built


def take_cpus(ranks: Ranks) -> None:
    """Keep this thread, and those that it starts, to this rank's share of the CPUs: two ranks that wait for each other on one CPU
    would be half as fast. All ranks are taken to be allowed the same CPUs, as mpirun does with --bind-to none."""
    cpus = sorted(os.sched_getaffinity(0))
    if 1 < ranks.size <= len(cpus):
        os.sched_setaffinity(0, cpus[ranks.slice(len(cpus), "CPUs")])
    elif ranks.size > 1:
        os.sched_setaffinity(0, {cpus[ranks.rank % len(cpus)]})


def _share_cpus(column: str, num_threads: int) -> None:
    """Our kernels have threads of their own. Torch's would spin on the same CPUs for a while after each small operation that is
    still torch's, so torch gets one; on the torch column it does the work itself and gets them all."""
    torch.set_num_threads(num_threads if column.startswith("torch") else 1)


@contextmanager
def _torch_threads(num_threads: int) -> Iterator[None]:
    """All threads for what is torch's alone, a vision tower."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
