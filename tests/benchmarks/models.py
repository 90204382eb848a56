"""Every architecture at the 160M size against transformers' generate on the same batch: python tests/benchmarks/models.py --help

Random weights, the same checkpoint for both, greedy, all of the answer's tokens; the two take turns, and the best of each counts. A
row is new tokens a second over all the time of a batch, its prompts included. The machine must be otherwise idle.
"""

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import transformers

from lmi_dist import Engine, EngineConfig, ImagePart, Request, SamplingParams
from lmi_dist.request import Prompt

sys.path.append(str(Path(__file__).parents[1] / "support"))
import tiny_llava
import tiny_tokenizers
import tiny_variants

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY, POSITIONS = 768, 3072, 12, 12, 32000, 2048
TILE, PATCH = 224, 32  # of LLaVA's images: 49 tokens each
KINDS = tiny_variants.KINDS | {
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration"),
    "t5": ("T5Config", "T5ForConditionalGeneration"),
}
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = {
    **COMMON, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "max_position_embeddings": POSITIONS,
}  # fmt: skip
GPT2 = {**COMMON, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
# by kind; an expert of mixtral is a quarter of a feed-forward block
SIZES: dict[str, dict[str, Any]] = {
    "bloom": {**COMMON, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "falcon": {key: value for key, value in LLAMA.items() if key not in ("intermediate_size", "num_key_value_heads")},
    "gemma": {**LLAMA, "head_dim": 64},
    "gemma2": {**LLAMA, "head_dim": 64},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "gptj": {**GPT2, "rotary_dim": 64},
    "llava": {
        "text_config": LLAMA,
        "image_token_index": VOCABULARY - 1,
        "vision_config": {"hidden_size": HIDDEN, "intermediate_size": INNER, "image_size": TILE, "patch_size": PATCH},
    },
    "mixtral": {**LLAMA, "num_key_value_heads": 4, "intermediate_size": INNER // 4},
    "mistral": {**LLAMA, "num_key_value_heads": 4},
    "mpt": {**COMMON, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS},
    "opt": {**LLAMA, "word_embed_proj_dim": HIDDEN, "ffn_dim": INNER},
    "qwen3": {**LLAMA, "head_dim": 64},
    "t5": {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "d_ff": 2048,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    },
}


def write(kind: str, folder: Path) -> int:
    """A checkpoint of this kind in bf16; its number of parameters."""
    config_class, model_class = (getattr(transformers, name) for name in KINDS[kind])
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES.get(kind, LLAMA))).to(torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizers.byte_level().save_pretrained(folder)
    if kind == "llava":
        image_processor().save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def image_processor() -> transformers.CLIPImageProcessorPil:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})


@dataclass(frozen=True)
class Batch:
    """What both continue: ids [B,T], and of LLaVA one encoded image before each prompt."""

    ids: torch.Tensor
    images: tuple[bytes, ...] = ()

    @classmethod
    def random(cls, kind: str, size: int, length: int) -> "Batch":
        ids = torch.randint(3, VOCABULARY - 1, (size, length), generator=torch.Generator().manual_seed(1))
        images = tuple(tiny_llava.png(320, 240, seed) for seed in range(size)) if kind == "llava" else ()
        return cls(ids, images)

    def prompts(self) -> list[Prompt]:
        prompts = [tuple(row) for row in self.ids.tolist()]
        return [(ImagePart(image), *prompt) for image, prompt in zip(self.images, prompts, strict=True)] if self.images else prompts

    def inputs(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """For transformers' generate."""
        if not self.images:
            return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        places = torch.full((len(self.ids), (TILE // PATCH) ** 2), VOCABULARY - 1)
        ids = torch.cat((places, self.ids), dim=1)
        pictures = [PIL.Image.open(io.BytesIO(image)) for image in self.images]
        pixels = image_processor()(pictures, return_tensors="pt").pixel_values.to(dtype)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def ours(folder: Path, batch: Batch, options: argparse.Namespace) -> Callable[[], int]:
    """The batch through our engine; gives the number of new tokens. Images are read before, by transformers' side, too."""
    prompts = batch.prompts()
    values = {"model": str(folder), "dtype": options.dtype, "cpu_threads": options.threads, "enable_prefix_caching": False}
    engine = Engine(EngineConfig.of({**values, "max_batch_size": len(prompts), "max_model_len": POSITIONS}))
    params = SamplingParams(max_tokens=options.new_tokens, ignore_eos=True, temperature=0.0)
    requests = [engine.prepare(Request(id=str(number), prompt=prompt, params=params)) for number, prompt in enumerate(prompts)]

    def work() -> int:
        for request in requests:
            engine.add(request)
        num_tokens = 0
        while engine.has_work:
            num_tokens += sum(len(output.tokens) for output in engine.step())
        return num_tokens

    return work


def theirs(kind: str, folder: Path, batch: Batch, options: argparse.Namespace) -> Callable[[], int]:
    """The same through transformers."""
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    model = getattr(transformers, KINDS[kind][1]).from_pretrained(folder, dtype=dtype).eval()
    length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
    inputs = batch.inputs(dtype)

    def work() -> int:
        with torch.inference_mode():
            model.generate(**inputs, do_sample=False, pad_token_id=2, use_cache=True, **length)  # MPT's configuration says false
        return len(batch.ids) * options.new_tokens

    return work


def serve(connection: Connection, make: Callable[..., Callable[[], int]], *args: Any) -> None:
    """In a process of its own, so that neither side's threads are pinned or kept busy by the other's: a rate for each message."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work = make(*args)
    while True:
        connection.send(None)
        if connection.recv() is None:
            return
        start = time.perf_counter()
        connection.send(work() / (time.perf_counter() - start))


def rates(sides: list[tuple[Any, ...]], repetitions: int) -> list[float]:
    """Best tokens a second of each side, which take turns; one round does not count."""
    context = multiprocessing.get_context("spawn")
    best = [0.0] * len(sides)
    connections, processes = [], []
    for side in sides:
        ours_end, its_end = context.Pipe()
        process = context.Process(target=serve, args=(its_end, *side))
        process.start()
        its_end.close()
        ours_end.recv()  # the model is loaded
        connections.append(ours_end)
        processes.append(process)
    for number in range(repetitions + 1):
        for index, connection in enumerate(connections):
            connection.send("again")
            rate = connection.recv()
            connection.recv()
            best[index] = max(best[index], rate if number else 0.0)
    for connection, process in zip(connections, processes, strict=True):
        connection.send(None)
        process.join()
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
            batch = Batch.random(kind, options.batch, options.prompt_tokens)
            own, other = rates([(ours, folder, batch, options), (theirs, kind, folder, batch, options)], options.repetitions)
        row = f"| {kind} | {num_parameters / 1e6:.0f} M | {own:.1f} | {other:.1f} | {own / other:.2f} |"
        print(row, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({"kind": kind, "tok_s": own, "transformers_tok_s": other}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
