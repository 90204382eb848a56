"""The stream, joined, is what decoding all ids at once gives; stop strings are found wherever the token borders are."""

import re

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lmi_dist.request import Token
from lmi_dist.text import REPLACEMENT, StopStrings, TextDecoder, TextStream

KINDS = tuple(tiny_tokenizers.KINDS)
DECODERS = {kind: TextDecoder(make()) for kind, make in tiny_tokenizers.KINDS.items()}
SETTINGS = settings(max_examples=150, derandomize=True, deadline=None, database=None)
random_ids = st.lists(st.integers(0, 420), max_size=60)  # above the vocabularies' ends too


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return tiny_tokenizers.KINDS[kind]()


def ids_of(kind: str, text: str) -> list[int]:
    return list(tokenizer_of(kind)(text, add_special_tokens=False).input_ids)


def stream(kind: str, ids: list[int], prompt: tuple[int, ...] = (), stop: tuple[str, ...] = (), **options) -> list[Token]:
    """Everything that a stream releases for ids, the tokens after a stop string left out."""
    text = TextStream(DECODERS[kind], prompt, stop=StopStrings(stop), **options)
    released = []
    for id in ids:
        released += text.push(Token(id, "?", logprob=-float(id)))
        if text.stop_string is not None:
            return released
    return released + list(text.flush())


def text_of(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


def cut(text: str, stop: tuple[str, ...], include: bool = False) -> str:
    """Slow and obvious: the shortest beginning that ends in a stop string, without the longest such string."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            return text[:end] if include else text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", tiny_tokenizers.TEXTS)
def test_stream_equals_batch_for_scripts(kind, text):
    ids = ids_of(kind, text)

    tokens = stream(kind, ids)

    assert text_of(tokens) == tokenizer_of(kind).decode(ids)
    assert [token.id for token in tokens] == ids
    assert [token.logprob for token in tokens] == [-float(id) for id in ids]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@SETTINGS
@given(ids=random_ids)
def test_stream_equals_batch_for_random_ids(kind, skip, ids):
    tokens = stream(kind, ids, skip_special_tokens=skip)

    assert text_of(tokens) == tokenizer_of(kind).decode(ids, skip_special_tokens=skip)
    assert [token.id for token in tokens] == ids


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@SETTINGS
@given(data=st.binary(max_size=80))
def test_stream_equals_batch_for_invalid_bytes(kind, data):
    tokenizer = tokenizer_of(kind)
    names = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "byte_fallback" else byte_names()
    ids = [tokenizer.convert_tokens_to_ids(names[byte]) for byte in data]

    assert text_of(stream(kind, ids)) == tokenizer.decode(ids)


def byte_names() -> list[str]:
    """The byte-level names of all bytes: printable ones stand for themselves, the others follow from 256 on (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@SETTINGS
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_stream_gives_back_any_text(kind, text):
    ids = ids_of(kind, text)

    assert text_of(stream(kind, ids)) == tokenizer_of(kind).decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_answer_keeps_its_leading_space(kind):
    prompt, answer = ids_of(kind, "The quick"), ids_of(kind, "The quick brown fox")[len(ids_of(kind, "The quick")) :]

    assert text_of(stream(kind, answer, tuple(prompt))) == " brown fox"


@pytest.mark.parametrize("kind", KINDS)
@SETTINGS
@given(ids=random_ids)
def test_stream_equals_batch_behind_a_prompt(kind, ids):
    prompt, tokenizer = ids_of(kind, "lazy dog"), tokenizer_of(kind)

    continued = text_of(stream(kind, ids, tuple(prompt)))

    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    assert continued == whole.removeprefix(tokenizer.decode(prompt))


def test_bytes_of_the_prompt_stay_there():
    ids = ids_of("byte_level", "👩")

    tokens = stream("byte_level", ids[-1:], tuple(ids[:-1]))

    assert text_of(tokens) == tokenizer_of("byte_level").decode(ids[-1:])


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", ["😀", "👩‍👩‍👧‍👦 x", "नमस्ते"])
def test_no_piece_splits_a_character(kind, text):
    pieces = [token.text for token in stream(kind, ids_of(kind, text))]

    assert all(REPLACEMENT not in piece for piece in pieces)
    assert "".join(pieces).strip() == text


def test_real_replacement_character_is_flushed():
    tokens = stream("byte_level", ids_of("byte_level", f"a{REPLACEMENT}"))

    assert text_of(tokens) == f"a{REPLACEMENT}"


def test_unfinished_character_is_flushed():
    ids = ids_of("byte_level", "😁")[:-1]

    assert text_of(stream("byte_level", ids)) == REPLACEMENT


@pytest.mark.parametrize("kind", KINDS)
def test_window_stays_small(kind, monkeypatch):
    decoder, sizes = TextDecoder(tokenizer_of(kind)), []
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda ids: sizes.append(len(ids)) or decode(ids))
    text = TextStream(decoder)

    for index in range(2000):
        text.push(Token(len(decoder.tokenizer) - 1 - index * 31 % 60, ""))

    assert max(sizes) < 30
    assert len(sizes) < 2400


def test_bytes_that_never_fit_do_not_pile_up():
    text = TextStream(DECODERS["byte_level"])
    id = tokenizer_of("byte_level").convert_tokens_to_ids(byte_names()[0x80])

    released = [text.push(Token(id, "")) for _ in range(100)]

    assert sum(map(len, released)) == 99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["The quick brown fox", "مرحبا بالعالم", "我能吞下玻璃", "a👩‍👩‍👧b"])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_is_found_at_every_offset(kind, text, include):
    ids = ids_of(kind, text)
    whole = tokenizer_of(kind).decode(ids)

    for start in range(len(whole)):
        for size in (1, 2, 5, 50):
            stop = (whole[start : start + size],)
            tokens = stream(kind, ids, stop=stop, include_stop_string=include)
            assert text_of(tokens) == cut(whole, stop, include)


@pytest.mark.parametrize("kind", KINDS)
@SETTINGS
@given(ids=random_ids, stop=st.lists(st.text("abe ,\n\ufffd", min_size=1, max_size=3), max_size=4), include=st.booleans())
def test_several_stop_strings_cut_like_a_slow_search(kind, ids, stop, include):
    whole = tokenizer_of(kind).decode(ids, skip_special_tokens=True)

    tokens = stream(kind, ids, stop=tuple(stop), include_stop_string=include)

    assert text_of(tokens) == cut(whole, tuple(stop), include)
    assert [token.id for token in tokens] == ids[: len(tokens)]


@SETTINGS
@given(text=st.text("ab", max_size=40), stop=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
def test_self_similar_stop_strings_are_found(text, stop):
    ids = ids_of("byte_level", text)

    assert text_of(stream("byte_level", ids, stop=tuple(stop))) == cut(text, tuple(stop))


@SETTINGS
@given(text=st.text("abc", max_size=30))
def test_text_is_released_as_soon_as_it_is_clear(text):
    stop = ("abcab", "cc")
    tokens, seen = TextStream(DECODERS["byte_level"], stop=StopStrings(stop)), ""
    emitted = ""
    for char in text:
        emitted += text_of(list(tokens.push(Token(ids_of("byte_level", char)[0], ""))))
        seen += char
        if tokens.stop_string is not None:
            break
        beginnings = [string[:size] for string in stop for size in range(len(string))]
        assert emitted == seen[: len(seen) - max(len(begin) for begin in beginnings if seen.endswith(begin))]

    assert emitted + text_of(list(tokens.flush())) == cut(text, stop)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
@settings(SETTINGS, max_examples=20_000)
@given(
    ids=st.lists(st.integers(0, 420), max_size=200),
    stop=st.lists(st.text("abe ,\n\ufffd\ud55c", min_size=1, max_size=4), max_size=5),
    skip=st.booleans(),
    include=st.booleans(),
)
def test_stream_equals_batch_for_very_many_ids(kind, ids, stop, skip, include):
    whole = tokenizer_of(kind).decode(ids, skip_special_tokens=skip)

    tokens = stream(kind, ids, stop=tuple(stop), include_stop_string=include, skip_special_tokens=skip)

    assert text_of(tokens) == cut(whole, tuple(stop), include)


def test_longest_of_stop_strings_that_end_together_wins():
    text = TextStream(DECODERS["byte_level"], stop=StopStrings(["fox", "n fox", "ox"]))

    tokens = [token for id in ids_of("byte_level", "brown fox") for token in text.push(Token(id, ""))]

    assert text.stop_string == "n fox"
    assert text_of(tokens) == "brow"


def test_beginning_of_stop_string_is_flushed():
    tokens = stream("byte_level", ids_of("byte_level", "brown fo"), stop=("fox",))

    assert text_of(tokens) == "brown fo"


def test_stop_string_before_min_tokens_does_not_count():
    ids = ids_of("byte_level", "a.b.c.d")

    assert text_of(stream("byte_level", ids, stop=(".",), min_tokens=4)) == "a.b"


def test_tokens_of_the_stop_string_are_released_empty():
    ids = ids_of("byte_level", "say </end>")

    tokens = stream("byte_level", ids, stop=("</end>",))

    assert [token.id for token in tokens] == ids
    assert text_of(tokens) == "say "


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_known(kind):
    tokenizer = tokenizer_of(kind)

    assert DECODERS[kind].special_ids == frozenset(tokenizer.convert_tokens_to_ids(list(tiny_tokenizers.SPECIAL)))


def test_pieces_keep_their_space():
    decoder = DECODERS["byte_fallback"]
    name = next(name for name in decoder.tokenizer.get_vocab() if re.fullmatch("▁[a-z]+", name))

    assert decoder.piece(decoder.tokenizer.convert_tokens_to_ids(name)) == name.replace("▁", " ")
