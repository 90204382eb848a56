"""Small tokenizers of the three kinds that language models use, made on the spot from a few lines of many scripts. Alphabets are
given and nothing depends on the order of equals, so that they are the same in every run."""

import json
import string
from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "The quick brown fox jumps over the lazy dog.  Two spaces, a tab\t and\nnew lines\n\n",
    "def f(x):\n    return x ** 2  # code { } [ ] <tag> 0x7f\r\n",
    "Zażółć gęślą jaźń; naïve café, Ångström, e\u0301 is not é, a\u0308o\u0323\u0302",
    "Съешь же ещё этих мягких французских булок",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "我能吞下玻璃而不伤身体。吾輩は猫である。한국어 문장입니다",
    "नमस्ते दुनिया, ক্ষ্ম, ภาษาไทยไม่มีช่องว่าง",
    "😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 ❤️ \U0001f9d1\U0001f3ff\u200d\U0001f680",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u2028 \ufeff zero\u200bwidth \u202eRTL\u202c \ufffd end",
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|tool|>")


@lru_cache
def byte_level() -> PreTrainedTokenizerFast:
    """BPE over bytes, as GPT-2, Llama 3 and Qwen have it: a token may be any piece of UTF-8."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer)


@lru_cache
def metaspace() -> PreTrainedTokenizerFast:
    """Unigram with ▁ for spaces, as sentencepiece writes it; no bytes: what it has never seen is <unk>."""
    words = dict.fromkeys(word for text in TEXTS for word in text.replace(" ", " ▁").split(" "))
    characters = dict.fromkeys(character for word in words for character in ("▁", *word))
    scores = {**dict.fromkeys(characters, -8.0), **dict.fromkeys([word for word in words if 1 < len(word) < 8], -6.0)}
    tokenizer = Tokenizer(models.Unigram([*((name, 0.0) for name in SPECIAL), *scores.items()], unk_id=0))
    tokenizer.normalizer = normalizers.Replace(Regex("\r\n"), "\n")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer)


@lru_cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """BPE with ▁ for spaces and <0xE2> tokens for what is not in the vocabulary, as Llama 1 and 2 and Mistral have it."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = ["▁", *string.ascii_letters, *string.digits, *".,:()<>", "é", "а", "我"]
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>"], initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
    )
    learner.train_from_iterator(TEXTS, trainer)
    learned = json.loads(learner.to_str())["model"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *(name for name in learned["vocab"] if name not in SPECIAL)]
    vocabulary = {name: id for id, name in enumerate(names)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _wrap(tokenizer)


KINDS = {"byte_level": byte_level, "metaspace": metaspace, "byte_fallback": byte_fallback}


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With a BOS in front, and one special token that has no role (<|tool|>)."""
    tokenizer.add_special_tokens(list(SPECIAL))
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
