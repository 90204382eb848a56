"""Trains the demo's model: a tiny Llama in Hugging Face format, in about a minute on two cores. A program of its own, so that torch
and the training's memory leave with it: `python -m lmi_dist_handler.demo_model FOLDER`.

The folder appears when everything in it is complete, so a training that was interrupted leaves nothing to be taken for a model.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from lmi_dist_handler.cache import complete_folder, leave
from lmi_dist_handler.demo_text import BOS, CHAT_TEMPLATE, EOS, bigram_loss, documents, encode, split, train_tokenizer


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the outcome, together with Python's own text."""

    vocab_size: int = 1024
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    context: int = 256  # tokens a window, and positions of the model
    num_windows: int = 4  # windows a step
    num_steps: int = 480
    matrix_rate: float = 0.02
    vector_rate: float = 0.003
    seed: int = 0
    num_bytes: int | None = None  # of text; None: all there is


class Muon:
    """Keller Jordan's optimizer for matrices (2024): momentum whose update is made orthogonal, so that no direction of a matrix
    waits for the others. Half the tokens of AdamW for the same loss here."""

    def __init__(self, matrices: list[torch.nn.Parameter]) -> None:
        self.momenta = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for matrix, momentum in self.momenta:
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 0.05)
            update = matrix.grad.lerp(momentum, 0.95)
            matrix.add_(orthogonal(update), alpha=-rate * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values moved to about 1, by five steps of Newton and Schulz with Jordan's coefficients."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: torch.Tensor = matrix / torch.linalg.matrix_norm(matrix).clamp(min=1e-7)
    x = x.T if is_tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x


def make(folder: Path, recipe: Recipe) -> dict[str, float]:
    """Train by the recipe and put the checkpoint at `folder`. Returns what is also in its training.json."""
    start = time.monotonic()
    with complete_folder(folder) as unfinished:
        _say("reading the docstrings of Python's library, learning a tokenizer from them")
        learned_documents, held_out_documents = split(documents(recipe.num_bytes), recipe.seed)
        tokenizer = train_tokenizer((document.text for document in learned_documents), recipe.vocab_size)
        learned, held_out = encode(tokenizer, learned_documents), encode(tokenizer, held_out_documents)
        model = train(recipe, tokenizer, learned)
        windows = _windows(held_out, recipe.context)
        report = {
            "held_out_loss": loss_of(model, windows),
            "bigram_loss": bigram_loss(learned, held_out[: windows[:, 1:].numel() + 1], recipe.vocab_size),
            "num_held_out_tokens": windows[:, 1:].numel(),
            "num_learned_tokens": len(learned),
            "seconds": round(time.monotonic() - start, 1),
        }
        _save(unfinished, model, tokenizer, recipe, report)
    return report


def train(recipe: Recipe, tokenizer: Tokenizer, learned: torch.Tensor) -> LlamaForCausalLM:
    """A Llama that has seen num_steps x num_windows windows of `learned`: int64 [T]. The same recipe and text give the same model
    on the same machine."""
    torch.manual_seed(recipe.seed)
    model: LlamaForCausalLM = LlamaForCausalLM(_llama_config(recipe, tokenizer))
    model.train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    batches = _batches(learned, recipe)
    for step in _steps(recipe.num_steps):
        _loss(model, next(batches), "mean").backward()
        speed = min(1.0, (step + 1) / 20, (recipe.num_steps - step) / (0.6 * recipe.num_steps))  # warm up, stay, cool down
        adam.param_groups[0]["lr"] = recipe.vector_rate * speed
        adam.step()
        muon.step(recipe.matrix_rate * speed)
        model.zero_grad()
    model.eval()
    return model


@torch.inference_mode()
def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Nats a token over windows: int64 [B, context + 1], each read from its own beginning."""
    total = sum(_loss(model, part, "sum").item() for part in windows.split(16))
    return total / windows[:, 1:].numel()


def _loss(model: LlamaForCausalLM, windows: torch.Tensor, reduction: str) -> torch.Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def _windows(ids: torch.Tensor, context: int, offset: int = 0) -> torch.Tensor:
    """Every window of context + 1 tokens from `offset`, each beginning with the last token of the one before: [B, context + 1]."""
    return ids[offset:].unfold(0, context + 1, context)


def _batches(learned: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Windows in random order, cut at other places in every epoch."""
    random = torch.Generator().manual_seed(recipe.seed)
    while True:
        offset = int(torch.randint(recipe.context, (1,), generator=random))
        windows = _windows(learned, recipe.context, offset)
        yield from windows[torch.randperm(len(windows), generator=random)].split(recipe.num_windows)


def _steps(num_steps: int) -> Iterator[int]:
    """0 .. num_steps - 1 with a progress bar on a terminal, ten lines elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(range(num_steps), desc="training the demo model", unit="step")
        return
    for step in range(num_steps):
        if step * 10 // num_steps != (step - 1) * 10 // num_steps:
            _say(f"training the demo model: step {step} of {num_steps}")
        yield step


def _llama_config(recipe: Recipe, tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=None,
    )


def _save(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe, report: dict[str, float]) -> None:
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": recipe.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "training.json").write_text(json.dumps({**report, "recipe": asdict(recipe)}, indent=2) + "\n")


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, leave)
    transformers_logging.disable_progress_bar()  # saving takes no time
    parser = argparse.ArgumentParser(description="train the demo's model")
    parser.add_argument("folder", type=Path, help="where the checkpoint goes; must not exist")
    parser.add_argument("--recipe", type=json.loads, default={}, help="JSON object: fields of Recipe that differ")
    arguments = parser.parse_args()
    report = make(arguments.folder, Recipe(**arguments.recipe))
    _say(f"trained in {report['seconds']} s on {report['num_learned_tokens']:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
