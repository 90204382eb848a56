"""Rotary position embedding with every scaling that transformers knows for decoders.

A scaling that looks at a length (dynamic, longrope) goes by the token's rope length, max(prompt_length, position + 1). That is what
transformers' generate does (a prompt is rotated by its whole length, each later token by its own), told without a history: a
key does not depend on how a prompt was cut, batched or computed again. Behind a prompt, and in a short one, the position alone
tells the angles: every scaling has a table whose row p is for position p, and a decode step needs nothing else.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from lmi_dist.batch import ForwardBatch, Rope
from lmi_dist.config import BLOCK_SIZE, RopeConfig
from lmi_dist.errors import ConfigError

CPU = torch.device("cpu")


class Rotary(Protocol):
    """Gives a batch its angles, once a step. `regime` names prompts whose cached keys are alike: keys of equal tokens at equal
    positions may be shared only within one regime."""

    def __call__(self, batch: ForwardBatch) -> ForwardBatch: ...

    def regime(self, prompt_length: int) -> str: ...


class Angles(NamedTuple):
    """Rows of cos and sin, fp32 [rows,dim/2]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def to(self, device: torch.device) -> "Angles":
        return Angles(self.cos.to(device), self.sin.to(device))


def rotary(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device = CPU) -> Rotary:
    """The rotary embedding that config.json asks for, for positions below `num_positions` of batches on the device. Angles are
    worked out on the CPU, so that their bits are the same everywhere."""
    dim = int(head_dim * rope.partial)
    if rope.type == "dynamic":
        return DynamicRotary(rope, dim, num_positions, device)
    if rope.type == "longrope":
        return LongRotary(rope, dim, num_positions, device)
    scale = yarn_scale(rope) if rope.type == "yarn" else 1.0
    return StaticRotary(angles(torch.arange(num_positions), FREQUENCIES[rope.type](rope, dim), scale).to(device))


class StaticRotary:
    """Angles that depend on the position alone: one table, row p for position p."""

    def __init__(self, table: Angles) -> None:
        self.table = table

    def __call__(self, batch: ForwardBatch) -> ForwardBatch:
        return replace(batch, rope=Rope(*self.table, batch.positions))

    def regime(self, prompt_length: int) -> str:
        return ""


class LongRotary:
    """Two sets of frequencies, for lengths up to the original maximum and above. Row p is the short ones' within the maximum and
    the long ones' beyond; behind them all come the long ones' within it, which a long prompt begins with."""

    def __init__(self, rope: RopeConfig, dim: int, num_positions: int, device: torch.device) -> None:
        self.original, self.num_positions = rope.original_max_position, num_positions
        scale = longrope_scale(rope)
        short = angles(torch.arange(min(self.original, num_positions)), longrope(rope, dim, rope.short_factor), scale)
        long = angles(torch.arange(num_positions), longrope(rope, dim, rope.long_factor), scale)
        rows = [torch.cat((a, b[len(a) :], b[: len(a)])) for a, b in zip(short, long, strict=True)]
        self.table = Angles(*rows).to(device)

    def __call__(self, batch: ForwardBatch) -> ForwardBatch:
        rows = batch.positions
        if batch.rope_lengths is not None:
            begins_long = (batch.rope_lengths > self.original) & (rows < self.original)
            rows = rows + self.num_positions * begins_long.int()
        return replace(batch, rope=Rope(*self.table, rows))

    def regime(self, prompt_length: int) -> str:
        return "long" if prompt_length > self.original else ""


class DynamicRotary:
    """Frequencies that fall with the rope length beyond the original maximum. Row p is for the length p + 1, or the maximum; those
    of a longer prompt are made for the step, in tiles of BLOCK_SIZE positions that begin at a multiple of it, so that a row's bits
    do not depend on which others were asked for."""

    def __init__(self, rope: RopeConfig, dim: int, num_positions: int, device: torch.device) -> None:
        self.rope, self.dim = rope, dim
        self.original = rope.original_max_position
        positions = torch.arange(num_positions)
        self.table = angles(positions, dynamic(rope, dim, (positions + 1).clamp(min=self.original)[:, None])).to(device)
        self.tile = lru_cache(maxsize=1024)(self._tile)  # chunks of a prompt share theirs

    def __call__(self, batch: ForwardBatch) -> ForwardBatch:
        if batch.rope_lengths is None:
            return replace(batch, rope=Rope(*self.table, batch.positions))
        return replace(batch, rope=self._rope(batch.positions, batch.rope_lengths))

    def _rope(self, positions: torch.Tensor, lengths: torch.Tensor) -> Rope:
        stretched = torch.nonzero(lengths > (positions + 1).clamp(min=self.original))[:, 0]  # tokens of a longer prompt
        if not len(stretched):
            return Rope(*self.table, positions)
        tile_keys = torch.stack((lengths[stretched], positions[stretched] // BLOCK_SIZE), 1)
        tile_keys, tile_of_token = torch.unique(tile_keys, dim=0, return_inverse=True)
        rows = tile_of_token * BLOCK_SIZE + positions[stretched] % BLOCK_SIZE
        tiles = [self.tile(length, block) for length, block in tile_keys.tolist()]
        made = Angles(*[part.index_select(0, positions) for part in self.table])
        for part, parts in zip(made, zip(*tiles, strict=True), strict=True):
            part[stretched] = torch.cat(parts).to(part.device)[rows]
        return Rope(*made, torch.arange(len(positions), dtype=torch.int32).to(positions.device))

    def regime(self, prompt_length: int) -> str:
        return f"dynamic {prompt_length}" if prompt_length > self.original else ""

    def _tile(self, length: int, block: int) -> Angles:
        positions = torch.arange(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        return angles(positions, dynamic(self.rope, self.dim, torch.tensor(length)))


# ---- frequencies: each gives inv_freq, fp32 [dim/2] ----


def angles(positions: torch.Tensor, inv_freq: torch.Tensor, scale: float = 1.0) -> Angles:
    """cos and sin of position * inv_freq, times the attention factor; fp32 [positions,dim/2]."""
    freqs = positions.float()[:, None] * inv_freq
    return Angles(freqs.cos() * scale, freqs.sin() * scale)


def unscaled(rope: RopeConfig, dim: int) -> torch.Tensor:
    return default(rope.theta, dim)


def default(theta: float | torch.Tensor, dim: int) -> torch.Tensor:
    """theta^(-2i/dim) (Su et al. 2021, section 3.4.2)."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2).float() / dim))


def linear(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Positions divided by the factor (Chen et al. 2023)."""
    return default(rope.theta, dim) / rope.factor


def dynamic(rope: RopeConfig, dim: int, length: torch.Tensor) -> torch.Tensor:
    """NTK-aware: theta grows with the length (transformers: _compute_dynamic_ntk_parameters, in fp32 as there). length: one, or a
    column of them [n,1], which gives [n,dim/2]."""
    stretch = rope.factor * length.float() / rope.original_max_position - (rope.factor - 1)
    return default(rope.theta * stretch ** (dim / (dim - 2)), dim)


def llama3(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Low frequencies divided by the factor, high ones kept, between them a straight line (Llama 3.1's apply_scaling)."""
    inv_freq = default(rope.theta, dim)
    turns = rope.original_max_position * inv_freq / (2 * math.pi)  # of each frequency within the original maximum
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * inv_freq / rope.factor + kept * inv_freq


def yarn(rope: RopeConfig, dim: int) -> torch.Tensor:
    """NTK-by-parts (Peng et al. 2023, section 3.2): few turns within the original maximum: divided; many: kept; a ramp between."""
    inv_freq = default(rope.theta, dim)
    low, high = _turning_dim(rope, dim, rope.beta_fast), _turning_dim(rope, dim, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    divided = ((torch.arange(dim // 2).float() - low) / width).clamp(0, 1)
    return inv_freq / rope.factor * divided + inv_freq * (1 - divided)


FREQUENCIES = {"default": unscaled, "linear": linear, "llama3": llama3, "yarn": yarn}


def _turning_dim(rope: RopeConfig, dim: int, turns: float) -> float:
    """The (fractional) index of the frequency that turns so often within the original maximum."""
    return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def yarn_scale(rope: RopeConfig) -> float:
    """The attention factor: 0.1 ln(factor) + 1 (section 3.4), or the quotient of DeepSeek's two mscales."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope(rope: RopeConfig, dim: int, divisors: tuple[float, ...]) -> torch.Tensor:
    """Each frequency divided by its own number (Ding et al. 2024). Raises ConfigError on a wrong number of them."""
    if len(divisors) != dim // 2:
        raise ConfigError(f"rope_scaling: short_factor and long_factor must have {dim // 2} entries, found {len(divisors)}")
    return 1.0 / (torch.tensor(divisors) * rope.theta ** (torch.arange(0, dim, 2).float() / dim))


def longrope_scale(rope: RopeConfig) -> float:
    """The attention factor: sqrt(1 + ln(factor) / ln(original maximum))."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position)) if rope.factor > 1 else 1.0
