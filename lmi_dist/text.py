"""From token ids to text, one token at a time: incremental detokenizer and stop strings. Knows nothing of batches.

The text of a candidate is decode([anchor] + generated) without decode([anchor]), where the anchor is the prompt's last token that
is complete text by itself. So the stream, joined, is tokenizer.decode(generated), code point for code point; only where a tokenizer
drops a leading space at the start of what it decodes (sentencepiece style) the space stays, for the answer continues the prompt.
`clean_up_tokenization_spaces` is off, as it is for every BPE tokenizer since transformers 5.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from lmi_dist.request import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not UTF-8 (yet)
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

# Decoding from the middle agrees with decoding from the start after at most 3 bytes (UTF-8 finds back by itself) and one token (a
# decoder may treat the first one apart). So a window of a few tokens is enough: its wrong front stays the same.
WINDOW_KEEP = 6
WINDOW_LIMIT = 24

ANCHOR_SEARCH = 32  # complete tokens of a prompt that are tried


class TextDecoder:
    """What a stream needs to know of a tokenizer, found out once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        marked = sorted(added | set(tokenizer.all_special_ids))
        self.special_ids = frozenset(id for id in marked if not tokenizer.decode([id], skip_special_tokens=True))
        names = {id: name for name, id in tokenizer.get_vocab().items() if name}
        self.known_ids = frozenset(names)
        self.byte_ids = frozenset(id for id, name in names.items() if BYTE_TOKEN.fullmatch(name))
        self.longest = max(map(len, names.values()), default=0)  # characters that one token may stand for
        self._decode = _plain_decode(tokenizer)
        self.piece = lru_cache(maxsize=65536)(self._piece)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids as the tokenizer has it, special tokens included."""
        return self._decode(list(ids))

    def is_silent(self, id: int, *, skip_special_tokens: bool) -> bool:
        """Whether decoding leaves the token out, as if it were not there: skipped, unknown (padding of the vocabulary) or empty."""
        return (skip_special_tokens and id in self.special_ids) or id not in self.known_ids

    def is_byte(self, id: int) -> bool:
        """Whether it is one byte of byte fallback. A run of them is decoded as a whole: one wrong byte changes the text of all."""
        return id in self.byte_ids

    def anchor(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """The prompt's last token that is complete text by itself, or none."""
        plain = (id for id in reversed(prompt_ids) if not (self.is_silent(id, skip_special_tokens=True) or self.is_byte(id)))
        for id, _ in zip(plain, range(ANCHOR_SEARCH), strict=False):
            if REPLACEMENT not in self.decode([id]):
                return (id,)
        return ()

    def _piece(self, id: int) -> str:
        """The text of one token anywhere but at the start: what a second one adds to a first."""
        return self.decode([id, id])[len(self.decode([id])) :]


def _plain_decode(tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[int]], str]:
    """tokenizer.decode(ids, clean_up_tokenization_spaces=False), which runs for every token. Most of its time goes into finding out
    what kind of list it was given, so a fast tokenizer that does not decode in a way of its own is asked directly."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    if isinstance(tokenizer, Fast) and kind.decode is Fast.decode and kind._decode is Fast._decode:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    return lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class StopStrings:
    """Stop strings as automata (Knuth, Morris, Pratt 1977), shared by the streams of a request; a stream keeps the states.

    They are found character by character, so that token borders do not matter: the string that is complete first wins, of several
    that end at the same character the longest.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self.strings = sorted(set(strings), key=len, reverse=True)
        self._borders = [_borders(string) for string in self.strings]

    def start(self) -> list[int]:
        """States before the first character: how many characters of each string have been seen."""
        return [0] * len(self.strings)

    def advance(self, states: list[int], char: str) -> str | None:
        """Take one character into states; the longest string that is complete with it."""
        found = None
        for index, (string, borders) in enumerate(zip(self.strings, self._borders, strict=True)):
            seen = states[index]
            while seen and string[seen] != char:
                seen = borders[seen - 1]
            seen += string[seen] == char
            if seen == len(string):
                found = found or string
                seen = borders[-1]
            states[index] = seen
        return found


def _borders(string: str) -> list[int]:
    """For each end, the length of the longest proper prefix of string that ends there."""
    borders = [0]
    for char in string[1:]:
        length = borders[-1]
        while length and string[length] != char:
            length = borders[length - 1]
        borders.append(length + (string[length] == char))
    return borders


@dataclass(slots=True)
class _Held:
    """A token that waits for its text, or for the text to be clear of stop strings; the text ends at `end` of the stream."""

    token: Token
    start: int
    end: int
    text: str = ""


class TextStream:
    """Turns one candidate's tokens into text. A token is released when its text cannot change any more.

    Held back are tokens whose last character is not complete, and text that may be the beginning of a stop string. After a stop
    string was found (`stop_string`) nothing more may be pushed. One that is complete before `min_tokens` tokens does not count.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        stop: StopStrings | None = None,
        include_stop_string: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.stop_string: str | None = None
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._stop = stop or StopStrings()
        self._include_stop_string = include_stop_string
        self._min_tokens = min_tokens
        self._states = self._stop.start()
        self._held: deque[_Held] = deque()
        self._num_tokens = 0
        self._length = 0  # characters of the stream that are final, released or not
        self._window = list(decoder.anchor(prompt_ids))
        self._emitted = len(decoder.decode(self._window)) if self._window else 0  # characters of the window that are in the stream
        self._in_bytes = False  # the window ends in a run of byte tokens
        self._is_cut = False  # the window ends in what may be a part of a character

    def push(self, token: Token) -> tuple[Token, ...]:
        """Take the next token (its text is ignored). Returns the tokens that are released by it, each with its text."""
        assert self.stop_string is None, "the stream has stopped"
        self._num_tokens += 1
        silent = self._decoder.is_silent(token.id, skip_special_tokens=self._skip_special_tokens)
        is_byte = not silent and self._decoder.is_byte(token.id)
        if self._in_bytes and not (silent or is_byte):
            self._settle(final=True)
        self._held.append(_Held(token, self._length, self._length))
        if self.stop_string is None and not silent:
            self._window.append(token.id)
            self._in_bytes = is_byte
            if not is_byte:
                self._settle(final=False)
        return self._release()

    def flush(self) -> tuple[Token, ...]:
        """No token follows: release what is held. May find a stop string in the text that was not final before."""
        if self.stop_string is None and (self._in_bytes or self._is_cut):
            self._settle(final=True)
        if self.stop_string is None:
            self._states = self._stop.start()
        return self._release()

    def _settle(self, *, final: bool) -> None:
        """Decode the window and give what is new and cannot change to the newest token."""
        text = self._decoder.decode(self._window)
        self._is_cut = not final and text.endswith(REPLACEMENT)
        end = len(text) - self._is_cut
        self._extend(text[self._emitted : end])
        self._emitted, self._in_bytes = end, False
        if len(self._window) > WINDOW_LIMIT:
            self._window = self._window[-WINDOW_KEEP:]
            self._emitted = len(self._decoder.decode(self._window)) - self._is_cut

    def _extend(self, text: str) -> None:
        """Add text to the newest token, up to a stop string if one is found."""
        newest = self._held[-1]
        newest.text += text
        is_armed = self._num_tokens >= self._min_tokens
        for offset, char in enumerate(text if self._states else "", start=self._length + 1):
            found = self._stop.advance(self._states, char)
            if found and is_armed:
                self._cut(found, offset)
                return
        self._length = newest.end = self._length + len(text)

    def _cut(self, found: str, end: int) -> None:
        """End the stream at the stop string whose last character is before `end`."""
        self.stop_string = found
        self._length = end if self._include_stop_string else end - len(found)
        for held in self._held:
            held.text = held.text[: max(0, self._length - held.start)]
            held.end = min(held.end, self._length)
        self._in_bytes = self._is_cut = False

    def _release(self) -> tuple[Token, ...]:
        clear = self._length if self.stop_string is not None else self._length - max(self._states, default=0)
        released = []
        while self._held and self._held[0].end <= clear and not (len(self._held) == 1 and (self._in_bytes or self._is_cut)):
            held = self._held.popleft()
            released.append(replace(held.token, text=held.text))
        return tuple(released)
