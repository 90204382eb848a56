"""Every architecture at the 160M size against transformers' generate on the same batch: python tests/benchmarks/models.py --help

Random weights, the same checkpoint for both, greedy, all of the answer's tokens; the two take turns, and the best of each counts. A
row is new tokens a second over all the time of a batch, its prompts included. The machine must be otherwise idle.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lmi_dist import Engine, EngineConfig, Request, SamplingParams

sys.path.append(str(Path(__file__).parents[1] / "support"))
import tiny_tokenizers
from tiny_variants import KINDS

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY, POSITIONS = 768, 3072, 12, 12, 32000, 2048
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = {
    **COMMON, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "max_position_embeddings": POSITIONS,
}  # fmt: skip
GPT2 = {**COMMON, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
# by kind of tests/support/tiny_variants.py; an expert of mixtral is a quarter of a feed-forward block
SIZES: dict[str, dict[str, Any]] = {
    "bloom": {**COMMON, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "falcon": {key: value for key, value in LLAMA.items() if key not in ("intermediate_size", "num_key_value_heads")},
    "gemma": {**LLAMA, "head_dim": 64},
    "gemma2": {**LLAMA, "head_dim": 64},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "gptj": {**GPT2, "rotary_dim": 64},
    "mixtral": {**LLAMA, "num_key_value_heads": 4, "intermediate_size": INNER // 4},
    "mistral": {**LLAMA, "num_key_value_heads": 4},
    "mpt": {**COMMON, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS},
    "opt": {**LLAMA, "word_embed_proj_dim": HIDDEN, "ffn_dim": INNER},
    "qwen3": {**LLAMA, "head_dim": 64},
}


def write(kind: str, folder: Path) -> int:
    """A checkpoint of this kind in bf16; its number of parameters."""
    config_class, model_class = (getattr(transformers, name) for name in KINDS[kind])
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES.get(kind, LLAMA))).to(torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizers.byte_level().save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def ours(folder: Path, prompts: torch.Tensor, options: argparse.Namespace) -> Callable[[], int]:
    """A batch through our engine; gives the number of new tokens."""
    values = {"model": str(folder), "dtype": options.dtype, "cpu_threads": options.threads, "enable_prefix_caching": False}
    engine = Engine(EngineConfig.of({**values, "max_batch_size": len(prompts), "max_model_len": POSITIONS}))
    params = SamplingParams(max_tokens=options.new_tokens, ignore_eos=True, temperature=0.0)

    def work() -> int:
        for number, prompt in enumerate(prompts.tolist()):
            engine.add(Request(id=str(number), prompt=tuple(prompt), params=params))
        num_tokens = 0
        while engine.has_work:
            num_tokens += sum(len(output.tokens) for output in engine.step())
        return num_tokens

    return work


def theirs(folder: Path, prompts: torch.Tensor, options: argparse.Namespace) -> Callable[[], int]:
    """The same through transformers."""
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}

    def work() -> int:
        with torch.inference_mode():
            ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=2, **length)
        return ids.numel() - prompts.numel()

    return work


def rates(works: list[tuple[Callable[[], int], int]], repetitions: int) -> list[float]:
    """Best tokens a second of each work, which torch gives so many threads; one round does not count."""
    best = [0.0] * len(works)
    for number in range(repetitions + 1):
        for index, (work, threads) in enumerate(works):
            torch.set_num_threads(threads)
            start = time.perf_counter()
            rate = work() / (time.perf_counter() - start)
            best[index] = max(best[index], rate if number else 0.0)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; none: all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append each row as JSON, too")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"batch {options.batch}, {options.prompt_tokens} prompt and {options.new_tokens} new tokens, {options.dtype}, "
          f"{options.threads} threads, best of {options.repetitions}\n")  # fmt: skip
    print("| architecture | parameters | tok/s | transformers tok/s | times |\n|---|---|---|---|---|")
    for kind in options.kinds or KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            num_parameters = write(kind, folder)
            chance = torch.Generator().manual_seed(1)
            prompts = torch.randint(3, VOCABULARY, (options.batch, options.prompt_tokens), generator=chance)
            works = [(ours(folder, prompts, options), 1), (theirs(folder, prompts, options), options.threads)]
            own, other = rates(works, options.repetitions)
        row = f"| {kind} | {num_parameters / 1e6:.0f} M | {own:.1f} | {other:.1f} | {own / other:.2f} |"
        print(row, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({"kind": kind, "tok_s": own, "transformers_tok_s": other}) + "\n")
        del works
        gc.collect()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
