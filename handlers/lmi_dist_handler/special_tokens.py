"""What users write stays text: a special token spelled in it is cut in two before the prompt is tokenized.

A chat template writes its special tokens as text and the tokenizer finds them again, and with them those that a user has typed, who
could so end a turn and begin another in a role of choice. Only texts that spell one take this way; all others are tokenized whole.
"""

import re
import secrets
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

from lmi_dist import RequestError

MAX_LENGTH = 1 << 20  # characters of a prompt that is tokenized here, which takes about a second


class SpellingTokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    @property
    def all_special_tokens(self) -> list[str]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def __hash__(self) -> int: ...

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]: ...


class Cuts:
    """The cuts of one prompt. A mark that no user can know shows where they are once a template has moved the text around."""

    def __init__(self, tokenizer: SpellingTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pattern = _spelled(tokenizer)
        self._mark = f"{secrets.randbits(128):039d}"  # digits: a template may change case, or write JSON

    def cut(self, text: str) -> str:
        """The text, marked in the middle of each special token."""
        return self._pattern.sub(lambda found: _middle(found[0], self._mark), text)

    def prompt(self, text: str) -> str | tuple[int, ...]:
        """A rendered prompt: as it is if nothing was cut, else its token ids. Raises RequestError if there are too many."""
        pieces = text.split(self._mark)
        if len(pieces) == 1:
            return text
        if len(text) > MAX_LENGTH:
            raise RequestError(
                f"messages spell special tokens of the model, and have {len(text)} characters, but at most {MAX_LENGTH} may "
                "then come; shorten them or leave such words out",
                "messages",
            )
        return tuple(id for piece in pieces for id in self._tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])


def _middle(token: str, mark: str) -> str:
    half = len(token) // 2
    return token[:half] + mark + token[half:]


@lru_cache(maxsize=8)
def _spelled(tokenizer: SpellingTokenizer) -> re.Pattern[str]:
    """Finds special tokens in a text, the longest first; never matches where there are none."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    names = {name for name in (*tokenizer.all_special_tokens, *added) if len(name) > 1}
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")
