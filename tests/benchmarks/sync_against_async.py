"""What DJL's sync steps cost against its async mode: 16 sequences decoded inside today's DJL (the tests' stand-ins), both ways.

`python tests/benchmarks/sync_against_async.py [CHECKPOINT]`; without one a Llama of 30 M parameters in bf16 is made on the spot.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny_models
import tiny_tokenizers
from djl_host import VERSIONS, Client, DjlHost

NUM_SEQUENCES, NUM_TOKENS, NUM_ROUNDS = 16, 64, 9


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else make(Path(made))
        properties = {"engine": "Python", "option.rolling_batch": "lmi-dist", "option.model_id": str(folder)}
        with DjlHost(VERSIONS[4], properties) as in_steps, DjlHost(VERSIONS[5], properties) as at_once:
            hosts = {"sync steps": in_steps, "async mode": at_once}
            best = dict.fromkeys(hosts, 1e9)
            for _ in range(NUM_ROUNDS):
                for name, host in hosts.items():
                    best[name] = min(best[name], seconds(host))
    rates = {name: NUM_SEQUENCES * NUM_TOKENS / taken for name, taken in best.items()}
    cost = 100 * (best["sync steps"] / best["async mode"] - 1)
    told = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items())
    print(f"{NUM_SEQUENCES} sequences of {NUM_TOKENS} tokens: {told}; sync costs {cost:.1f} %")


def make(folder: Path) -> Path:
    tiny_models.write_big(folder, 4)
    tiny_tokenizers.byte_level().save_pretrained(folder)
    return folder


def seconds(host: DjlHost) -> float:
    """Until all sequences have been answered, a line a token."""
    asks = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True, "do_sample": False}
    clients = [Client.of(inputs="x" * (i + 1), stream=True, parameters=asks) for i in range(NUM_SEQUENCES)]
    started = time.perf_counter()
    if host.version.is_async:
        host.go(clients)
    else:
        host.roll(clients)
    taken = time.perf_counter() - started
    assert [len(client.lines) for client in clients] == [NUM_TOKENS] * NUM_SEQUENCES
    return taken


main()
