"""Tiny random checkpoints, written by transformers, and what transformers says about them: the reference of the model tests."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tiny_tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tiny_variants import BASES, KINDS, LLAMA_BASE, VARIANTS, VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

NUM_STEPS = 64
TOLERANCE = 1e-4  # of the largest logit: fp32 sums in another order
LEAST_GAP = 1e-4  # between the two best logits; below it fp32 may choose either
PROMPT_LENGTHS = (11, 53)


@dataclass(frozen=True)
class Reference:
    """Transformers' greedy continuation of one prompt and the logits at each step: fp32 [NUM_STEPS,V]."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logits: torch.Tensor


class Settled(NamedTuple):
    """A variant's checkpoint folder, transformers' model, and its continuations of both prompts."""

    folder: Path
    model: PreTrainedModel
    references: list[Reference]


def build(variant: str, seed: int = 0, **values: Any) -> PreTrainedModel:
    """A transformers model with random weights, norms and biases too, which transformers would begin at 1 and 0."""
    kind, differs = VARIANTS[variant]
    torch.manual_seed(seed)
    config_class, model_class = (getattr(transformers, name) for name in KINDS[kind])
    model = model_class(config_class(**{**BASES.get(kind, LLAMA_BASE), **differs, **values})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                is_norm = re.search(r"(norm|ln)\w*\.weight$", name)
                parameter.copy_(torch.randn_like(parameter) * 0.2 + bool(is_norm))
    model.generation_config.eos_token_id = None
    return model


def save(model: PreTrainedModel, folder: Path, **values: Any) -> Path:
    """As a checkpoint with a byte-level BPE tokenizer; `values` go to save_pretrained."""
    model.save_pretrained(folder, **values)
    tiny_tokenizers.byte_level().save_pretrained(folder)
    return folder


def rewrite_config(folder: Path, **values: Any) -> None:
    """Set keys of config.json, or take them out where the value is None."""
    path = folder / "config.json"
    keys = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in keys.items() if value is not None}))


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids, no special ones."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(4, VOCABULARY, (length,), generator=generator).tolist())


def refer(model: PreTrainedModel, prompt: tuple[int, ...], num_steps: int = NUM_STEPS) -> Reference:
    """What transformers' generate says, greedily. On a copy: a dynamic scaling remembers the longest sequence it has seen."""
    model = copy.deepcopy(model)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_steps,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return Reference(prompt, tuple(out.sequences[0, len(prompt) :].tolist()), torch.cat(out.logits).float())


def gap(logits: torch.Tensor) -> torch.Tensor:
    """Distance of the two best logits of each row."""
    best = logits.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The worst position's max|difference| / max|reference|."""
    return float(((ours - reference).abs().amax(1) / reference.abs().amax(1)).max())


def settled(variant: str, **values: Any) -> tuple[PreTrainedModel, list[Reference]]:
    """The model of the first seed whose greedy continuations have no near tie, with them."""
    for seed in range(50):
        model = build(variant, seed, **values)
        references = []
        for length in PROMPT_LENGTHS:
            references.append(refer(model, prompt_of(length)))
            if gap(references[-1].logits).min() < LEAST_GAP:
                break
        else:
            return model, references
    raise AssertionError(f"no seed of 50 leaves {LEAST_GAP} between the two best logits of {variant}")


def teacher_forced(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    """fp32 [T,V] logits at every position of one forward. On a copy, as above."""
    model = copy.deepcopy(model)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


def old_style(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of transformers 4 in place of rope_parameters and dtype."""
    rope = dict(config["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"type": kind, **rope}
    return {"rope_parameters": None, "dtype": None, "torch_dtype": config["dtype"], "rope_theta": theta, "rope_scaling": scaling}


def write_big(folder: Path, num_layers: int, dtype: torch.dtype = torch.bfloat16, file: str = "model.safetensors") -> Path:
    """A Llama checkpoint of 66 + 6.4 * num_layers MB in bf16, made quickly: all numbers alike, a vocabulary of 32000."""
    hidden, feed_forward, vocabulary = 512, 1408, 32000
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in LlamaForCausalLM(config).state_dict().items()}
    tensors = {name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()}
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    return folder
