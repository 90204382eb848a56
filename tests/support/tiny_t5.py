"""Tiny random T5 checkpoints of every version, and what transformers says about them."""

from pathlib import Path
from typing import Any

import tiny_models
import torch
from tiny_models import NUM_STEPS, VOCABULARY, Reference
from transformers import T5Config, T5ForConditionalGeneration

START = 0
PROMPT_LENGTHS = (11, 75)  # within the distances that have a bucket each, and far beyond
BASE = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 112,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_max_distance": 40,
    "decoder_start_token_id": START,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

# What differs from BASE. tie_word_embeddings is also whether the head's input is scaled.
VARIANTS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "relu"},
    "t5-11b": {"feed_forward_proj": "relu", "num_heads": 8, "d_kv": 32, "relative_attention_max_distance": 128},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 3, "num_decoder_layers": 1},
    "flan": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "relative_attention_num_buckets": 12},
    "ul2": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False, "d_kv": 256, "num_heads": 1, "num_decoder_layers": 3},
    "lm-adapt": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 1, "layer_norm_epsilon": 1e-5},
    "gated-tied": {"feed_forward_proj": "gated-relu", "d_model": 72, "d_ff": 99, "num_heads": 3, "d_kv": 24},
    "odd-start": {"feed_forward_proj": "gelu", "decoder_start_token_id": 7},
}  # fmt: skip


def build(variant: str, seed: int = 0, **values: Any) -> T5ForConditionalGeneration:
    """A transformers model with random weights; norms too, which would begin at 1, and an untied head, which transformers ties."""
    settings = {**BASE, **VARIANTS[variant], **values}
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + torch.randn_like(parameter) * 0.2)
            if name == "decoder.final_layer_norm.weight":
                parameter.copy_(torch.randn_like(parameter))  # or a tied head would say the last token again
            if "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
            if name.endswith((".q.weight", ".k.weight")):
                parameter.mul_(1.5)  # attention that looks somewhere
    if not settings.get("tie_word_embeddings", True):
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    model.generation_config.eos_token_id = None
    return model


def save(model: T5ForConditionalGeneration, folder: Path, variant: str) -> Path:
    """As a checkpoint whose config.json has the keys of transformers 4, which the published ones have."""
    tiny_models.save(model, folder)
    tied = VARIANTS[variant].get("tie_word_embeddings", True)
    tiny_models.rewrite_config(folder, tie_word_embeddings=tied, scale_decoder_outputs=None)
    return folder


def refer(model: T5ForConditionalGeneration, prompt: tuple[int, ...], num_steps: int = NUM_STEPS) -> Reference:
    """What transformers' generate says, greedily, when the encoder has read the prompt."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_steps,
            do_sample=False,
            use_cache=model.config.num_decoder_layers <= model.config.num_layers,  # whose cache has but so many layers
            output_logits=True,
            return_dict_in_generate=True,
        )
    return Reference(prompt, tuple(out.sequences[0, 1:].tolist()), torch.cat(out.logits).float())


def settled(variant: str) -> tuple[T5ForConditionalGeneration, list[Reference]]:
    """The model of the first seed whose greedy continuations have no near tie, with them."""
    for seed in range(50):
        model = build(variant, seed)
        references = [refer(model, tiny_models.prompt_of(length)) for length in PROMPT_LENGTHS]
        if min(float(tiny_models.gap(each.logits).min()) for each in references) >= tiny_models.LEAST_GAP:
            return model, references
    raise AssertionError(f"no seed of 50 leaves {tiny_models.LEAST_GAP} between the two best logits of {variant}")


def teacher_forced(model: T5ForConditionalGeneration, reference: Reference) -> torch.Tensor:
    """fp32 [T,V] logits at every position of the decoder, which is given the reference's ids."""
    with torch.inference_mode():
        tokens = torch.tensor([(model.config.decoder_start_token_id, *reference.ids)])
        logits: torch.Tensor = model(torch.tensor([reference.prompt]), decoder_input_ids=tokens).logits[0].float()
    return logits
