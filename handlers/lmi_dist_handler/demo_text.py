"""Text that lies on any machine with Python, the tokenizer learned from it, and the bigram model that the demo has to beat.

Stands beside the server: nothing that serves imports it.
"""

import ast
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
MIN_LENGTH = 20  # characters; shorter docstrings say nothing
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Document:
    """A docstring with the dotted name of what it documents, or a licence with its file's name."""

    title: str
    text: str


def documents(num_bytes: int | None = None) -> list[Document]:
    """The standard library's docstrings and Python's licences, each text once, in a fixed order. Up to about `num_bytes` of text.
    Raises FileNotFoundError where Python has no library in sources."""
    found: dict[str, Document] = {}
    size = 0
    for document in _all_documents(Path(sysconfig.get_path("stdlib"))):
        if num_bytes is not None and size >= num_bytes:
            break
        if document.text not in found:
            found[document.text] = document
            size += len(document.text)
    if not found:
        raise FileNotFoundError(f"no docstrings under {sysconfig.get_path('stdlib')}; the demo learns from Python's own sources")
    return list(found.values())


def _all_documents(library: Path) -> Iterator[Document]:
    yield from _licences(library)
    for path in _sources(library):
        module = ".".join(path.relative_to(library).parts).removesuffix(".py")
        yield from docstrings(path.read_text(encoding="utf-8", errors="replace"), module)


def _sources(folder: Path) -> Iterator[Path]:
    """Python files in a fixed order, those of a folder before those of its own folders."""
    entries = sorted(folder.iterdir())
    yield from (path for path in entries if path.suffix == ".py")
    for path in entries:
        if path.is_dir() and path.name not in SKIPPED_FOLDERS:
            yield from _sources(path)


def _licences(library: Path) -> Iterator[Document]:
    for folder in (library, library.parent, Path(sys.base_prefix)):
        for path in sorted(folder.glob("LICENSE*")):
            yield Document(path.stem, path.read_text(encoding="utf-8", errors="replace"))


def docstrings(source: str, module: str) -> list[Document]:
    """The docstrings of a source file; none where it is not today's Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escapes are not our business
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return []
    return list(_documented(tree, module))


def _documented(node: Documented, title: str) -> Iterator[Document]:
    text = ast.get_docstring(node)
    if text and len(text) >= MIN_LENGTH:
        yield Document(title, text)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{title}.{child.name}")


def split(all_documents: list[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """(to learn from, held out): whole documents, one in twenty held out."""
    shuffled = list(all_documents)
    random.Random(seed).shuffle(shuffled)
    num_held_out = max(1, len(shuffled) // 20)
    return shuffled[num_held_out:], shuffled[:num_held_out]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries (at least 260: every byte, four special tokens) that writes BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # with little text BPE runs out of pairs, but every row of the embedding must have a name
    tokenizer.add_tokens([f"<|extra_{i}|>" for i in range(vocab_size - tokenizer.get_vocab_size())])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return tokenizer


def encode(tokenizer: Tokenizer, some_documents: Iterable[Document]) -> torch.Tensor:
    """All documents in one row of token ids, int64 [T]. Every other one is the answer to a user who gave its title."""
    texts = [
        f"{BOS}{USER}{document.title}{ASSISTANT}{document.text}{EOS}" if i % 2 else f"{BOS}{document.text}{EOS}"
        for i, document in enumerate(some_documents)
    ]
    return torch.tensor([id_ for row in tokenizer.encode_batch(texts, add_special_tokens=False) for id_ in row.ids])


def bigram_loss(learned: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """Nats a token of held_out[1:] under a bigram model of `learned`: absolute discounting, interpolated with Kneser and Ney's
    continuation counts (ICASSP 1995); the best of the usual smoothings on this text."""
    discount = 0.75
    pairs = learned[:-1] * vocab_size + learned[1:]
    counts = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).double()
    followers = (counts > 0).sum(dim=1)
    continuations = (counts > 0).sum(dim=0) + 0.5  # the half is for tokens never seen
    previous, token = held_out[:-1], held_out[1:]
    total = counts.sum(dim=1).clamp(min=1.0)[previous]
    direct = (counts[previous, token] - discount).clamp(min=0.0) / total
    left_over = torch.where(followers[previous] > 0, discount * followers[previous] / total, torch.ones_like(total))
    return float(-(direct + left_over * (continuations / continuations.sum())[token]).log().mean())
