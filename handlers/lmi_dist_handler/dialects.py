"""The table of dialects: what differs between the versions of DJL Serving that may drive us (contract 4.6, 7.2 to 7.8, 8.4).

Which version it is, is told by the package `djl_python` that the host has put on the path: its build writes `__version__` into it,
"0.26.0" to "0.29.0" or later (contract 1.8). What is later than 0.29 is today's, in one of two ways of working: where requests
come with a `request_tracking_id`, in async mode, it speaks as its own vLLM handler does. A worker end of ours (another class of
Input) is no DJL at all: our own host speaks as 0.29 does, or the init property `djl_version` says for whom it forwards.
"""

from dataclasses import dataclass, replace
from typing import Any

FIRST_DETAILS = frozenset(("finish_reason", "tokens"))
COUNTED = FIRST_DETAILS | {"generated_tokens", "inputs"}
WITH_PROMPT = COUNTED | {"prefill"}
ALL_DETAILS = WITH_PROMPT | {"top_tokens"}
PARSE_ERROR = "Input Parsing failed. Ensure that the request payload is valid. "


@dataclass(frozen=True, slots=True, kw_only=True)
class LmiDialect:
    """How one version speaks the LMI schema. The defaults are those of 0.29."""

    wire: int = 27  # version of the wire: 26 has 16-bit text lengths
    asks_all_ranks: bool = True  # each request goes to every rank, and the last one's answer counts
    failure: str = "prediction failure"  # message of a reply for an exception
    has_chat: bool = True  # a body with `messages` is a chat
    form_by_request: bool = True  # `stream` and parameters.output_formatter choose the form; else the option alone
    several: bool = True  # n and best_of
    sampled_by_default: bool = False  # without do_sample
    json_in_pieces: bool = False  # one object all the same, but as it comes
    drops_falsy: bool = False  # of a token's fields: id 0, no text, log probability 0
    lists_ids: bool = False  # a token's id is a list
    is_todays: bool = False  # the shapes of today's vLLM handler, OpenAI's bodies among them
    details: frozenset[str] = ALL_DETAILS  # keys of the details object that there are
    tells_stop_sequence: bool = False  # as the reason of an end; else that is `eos_token`, too
    parse_error: str = ""  # stands before the sentence that refuses a body
    failed_in_form: bool = False  # a failed step is told in the answer's own form, without a code
    last_must_speak: bool = False  # a last piece without text would leave the client waiting

    def token(self, id: int, text: str, log_prob: float | None, *, is_special: bool) -> dict[str, Any]:
        """A token's object (contract 7.6)."""
        shown: dict[str, Any] = {"id": [id] if self.lists_ids else id, "text": text, "log_prob": log_prob}
        shown |= {"special_token": True} if is_special else {}
        return {name: value for name, value in shown.items() if value} if self.drops_falsy else shown

    def reason(self, finish_reason: str | None) -> str:
        """How a candidate ended, in this version's words."""
        reason = finish_reason or ""
        return "eos_token" if reason == "stop_sequence" and not self.tells_stop_sequence else reason


TODAYS_FAILURE = "invoke handler failure"
OURS = LmiDialect(asks_all_ranks=False, failure=TODAYS_FAILURE)
V26 = LmiDialect(
    wire=26, has_chat=False, form_by_request=False, several=False, json_in_pieces=True, drops_falsy=True, details=FIRST_DETAILS,
    tells_stop_sequence=True,
)  # fmt: skip
V27 = LmiDialect(several=False, json_in_pieces=True, drops_falsy=True, lists_ids=True, details=COUNTED)
V28 = LmiDialect(several=False, json_in_pieces=True, details=WITH_PROMPT, failed_in_form=True)
V29 = LmiDialect(parse_error=PARSE_ERROR, last_must_speak=True)
TODAY = LmiDialect(asks_all_ranks=False, failure=TODAYS_FAILURE, sampled_by_default=True, parse_error=PARSE_ERROR)
TODAY_ASYNC = replace(TODAY, is_todays=True, parse_error="Input parsing failed: ")

BY_MINOR = {26: V26, 27: V27, 28: V28, 29: V29}


def dialect_of(version: str, *, is_async: bool) -> LmiDialect:
    """The dialect of `djl_python.__version__`, "0.<minor>.<patch>" and perhaps more. Older ones than 0.26 speak as it."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    number = int(minor) if major == "0" and minor.isdecimal() else max(BY_MINOR) + 1
    if number in BY_MINOR:
        return BY_MINOR[number]
    return V26 if number < min(BY_MINOR) else TODAY_ASYNC if is_async else TODAY
