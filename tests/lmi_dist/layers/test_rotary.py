"""Every scaling's angles equal transformers' at the same moment of a generation."""

from dataclasses import replace
from typing import Any

import driving
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lmi_dist.batch import ForwardBatch, build
from lmi_dist.config import ConfigKeys, RopeConfig
from lmi_dist.errors import ConfigError
from lmi_dist.layers.rotary import Rotary, rotary
from lmi_dist.plan import Chunk, Plan

HEAD_DIM = 64
POSITIONS = 600
FACTORS = {"short_factor": [1 + i / 9 for i in range(32)], "long_factor": [1.5 + i for i in range(32)]}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.7},
    "yarn-mscale": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "mscale": 1.0,
                    "mscale_all_dim": 0.5, "beta_fast": 20.0, "beta_slow": 3.0},
    "yarn-untruncated": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 50, **FACTORS},
    "longrope-factor": {"rope_type": "longrope", "original_max_position_embeddings": 50, "factor": 8.0, **FACTORS},
    "longrope-attention": {"rope_type": "longrope", "original_max_position_embeddings": 50, "attention_factor": 1.2, **FACTORS},
}  # fmt: skip
MAX_POSITION = 128  # in config.json; dynamic scaling begins there


def ours(scaling: dict[str, Any]) -> Rotary:
    rope = RopeConfig.read(ConfigKeys({"rope_parameters": scaling}, "config.json"), MAX_POSITION)
    return rotary(rope, HEAD_DIM, POSITIONS)


def theirs(scaling: dict[str, Any]) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=MAX_POSITION, rope_parameters={"rope_theta": 1e4, **scaling}
    )
    return LlamaRotaryEmbedding(config)


def batch_of(chunks: list[Chunk]) -> ForwardBatch:
    return build(Plan(step=0, chunks=tuple(chunks)), driving.make_cache())


def chunk(prompt_length: int, start: int, end: int) -> Chunk:
    return Chunk(0, (0,) * (end - start), start, tuple(range(POSITIONS // 16 + 1)), prompt_length, 1)


def angles(made: Rotary, batch: ForwardBatch) -> torch.Tensor:
    """cos and sin side by side, a row a token."""
    rope = made(batch).rope
    assert rope is not None
    return torch.cat((rope.cos[rope.rows], rope.sin[rope.rows]), 1)


def expected(reference: LlamaRotaryEmbedding, start: int, end: int) -> torch.Tensor:
    cos, sin = reference(torch.zeros(1), torch.arange(start, end)[None])
    return torch.cat((cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]), 1)


@pytest.mark.parametrize("prompt_length", [5, 50, 51, 127, 129, 300])
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_equal_transformers_through_a_generation(name: str, prompt_length: int) -> None:
    made, reference = ours(SCALINGS[name]), theirs(SCALINGS[name])

    prompt = angles(made, batch_of([chunk(prompt_length, 0, prompt_length)]))
    torch.testing.assert_close(prompt, expected(reference, 0, prompt_length), atol=5e-5, rtol=0)

    for position in range(prompt_length, prompt_length + 100, 9):
        token = angles(made, batch_of([chunk(prompt_length, position, position + 1)]))
        torch.testing.assert_close(token, expected(reference, position, position + 1), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_have_equal_bits_in_any_chunk(name: str) -> None:
    made = ours(SCALINGS[name])
    chunks = [chunk(200, start, min(start + 7, 200)) for start in range(0, 200, 7)]

    whole = angles(made, batch_of([chunk(200, 0, 200)]))

    assert torch.equal(torch.cat([angles(made, batch_of([each])) for each in chunks]), whole)
    assert torch.equal(angles(made, batch_of([chunk(333, 0, 300), *chunks]))[300:], whole)


@pytest.mark.parametrize("name", SCALINGS)
def test_tokens_behind_their_prompt_need_no_length(name: str) -> None:
    """That of each is its position + 1, in the bits, too: of the token behind a short prompt, and of the last of a long one."""
    made = ours(SCALINGS[name])
    batch = batch_of([chunk(5, position, position + 1) for position in range(45, 140)] + [chunk(300, 299, 300)])

    assert torch.equal(angles(made, replace(batch, rope_lengths=None)), angles(made, batch))


def test_partial_rotation_turns_fewer_pairs() -> None:
    rope = replace(RopeConfig(), partial=0.25)

    made = rotary(rope, HEAD_DIM, POSITIONS)(batch_of([chunk(3, 0, 3)])).rope

    assert made is not None
    assert made.cos.shape[1] == HEAD_DIM // 8


def test_wrong_number_of_factors_is_refused() -> None:
    scaling = {**SCALINGS["longrope"], "long_factor": [1.0, 2.0]}

    with pytest.raises(ConfigError, match="must have 32 entries, found 2"):
        ours(scaling)
