"""Decode steps without Python: the forward is recorded when a number of sequences comes first, and from then on run by one call.

The plain forward stays for all other steps, for what cannot be recorded, and where `enforce_eager` asks for it; bits are the same.
"""

import logging
from bisect import bisect_left
from collections.abc import Sequence

import torch

from lmi_dist.batch import Chosen
from lmi_dist.config import BLOCK_SIZE, EngineConfig, ModelConfig
from lmi_dist.decode_batch import DecodeBatch, is_decode, recorded_sizes
from lmi_dist.device import Device
from lmi_dist.kv_cache import KVCache, MemoryPlan
from lmi_dist.models import Model
from lmi_dist.ops import Arena, GraphPool, Replayable
from lmi_dist.plan import Chunk

logger = logging.getLogger(__name__)


class RecordedDecodes:
    """A model's decode steps. `sizes`: numbers of sequences that are recorded, ascending; a step takes the next larger one. What is
    larger than all of them, or no decode, is not for here. `memory`: of what the forwards make. Not for several threads."""

    def __init__(self, model: Model, header: DecodeBatch, sizes: Sequence[int], memory: Arena | GraphPool) -> None:
        self._model, self._header, self._sizes, self._memory = model, header, sizes, memory
        self._recordings: dict[int, Replayable] = {}
        self.obstacle = ""  # why nothing more is recorded
        self.num_replayed = 0

    @property
    def sizes_recorded(self) -> list[int]:
        return sorted(self._recordings)

    def forward(self, chunks: Sequence[Chunk], chosen: Chosen | None = None) -> torch.Tensor | None:
        """Logits as of Runner.forward, good until the next call; None if the plain forward is to run."""
        if self.obstacle or not 0 < len(chunks) <= self._sizes[-1] or not is_decode(chunks):
            return None
        size = self._sizes[bisect_left(self._sizes, len(chunks))]
        self._header.fill(chunks, size, chosen)
        recording = self._recordings.get(size)
        if recording is None:
            return self._record(size)[: len(chunks)]
        self.num_replayed += 1
        return recording.replay()[: len(chunks)]

    def _record(self, size: int) -> torch.Tensor:
        batch = self._header.batch(size)
        logits, recording, self.obstacle = self._memory.record(lambda: self._model(batch), size)
        if recording is not None:
            self._recordings[size] = recording
        if self.obstacle:
            logger.info("decode steps run from Python: %s", self.obstacle)
        return logits


def recorded_decodes(
    model: Model, cache: KVCache, config: EngineConfig, facts: ModelConfig, memory: MemoryPlan, device: Device
) -> RecordedDecodes | None:
    """Those of a runner's model, on its device and the column in use; None where none are recorded."""
    sizes = recorded_sizes(config, device)
    if not sizes:
        return None
    header = DecodeBatch(sizes[-1], -(-memory.max_model_len // BLOCK_SIZE), cache, has_cross=facts.is_encoder_decoder)
    return RecordedDecodes(model, header, sizes, GraphPool() if device.type == "cuda" else Arena(sizes[-1]))
