"""The page at `/` and the figures it asks for: one static text, confined by its headers, over a JSON object of plain values.

The page holds no value of this server: it asks for `/status.json`, with the key if there is one, and shows what comes as text.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.responses import Response

from lmi_dist_handler.host import Host

Row = tuple[str, str, str]  # option, value, origin

HTML = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def wants_page(accept: str) -> bool:
    """Whether whoever asks is a browser; `curl` and clients get JSON."""
    return "text/html" in accept.lower()


def page() -> Response:
    """The page, which may run its own script and style, ask this server, and nothing else."""
    return Response(HTML, media_type="text/html", headers=HEADERS)


def model_status(name: str, host: Host, model_id: str, options: Sequence[Row], stats: Mapping[str, Any]) -> dict[str, object]:
    """How one model stands; `label` also has its version. `figures` is empty while there is no worker that answers."""
    health, reason = host.health
    return {
        "name": name,
        "label": host.name,
        "model_id": model_id,
        "health": health,
        "reason": reason,
        "requests_in_flight": host.num_in_flight,
        "worker_restarts": host.num_restarts,
        "figures": _figures(stats) if stats else {},
        "options": rows(options),
    }


def rows(options: Sequence[Row]) -> list[dict[str, str]]:
    """Options as JSON says them."""
    return [{"option": option, "value": value, "origin": origin} for option, value, origin in options]


def _figures(stats: Mapping[str, Any]) -> dict[str, float]:
    """What moves, from the counters of a worker. Rates are the reader's: they need two looks and a clock."""
    first_token = stats["first_token_s"]
    return {
        "running": stats["num_running"],
        "waiting": stats["num_waiting"],
        "kv_usage": 1 - stats["num_free_blocks"] / stats["num_blocks"],
        "prompt_tokens": stats["num_prompt_tokens"],
        "generated_tokens": stats["num_generated_tokens"],
        "looked_up_tokens": stats["num_prefix_query_tokens"],
        "reused_tokens": stats["num_prefix_hit_tokens"],
        "first_tokens": sum(first_token["counts"]),
        "first_token_seconds": first_token["sum"],
    }


def _allowed(tag: str) -> str:
    """The hash by which a browser knows the page's own script or style."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "content-security-policy": f"default-src 'none'; script-src {_allowed('script')}; style-src {_allowed('style')}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "vary": "accept",
}
