"""One engine in against_peers.py, run by that engine's own Python: it starts, and for each line "WORKLOAD REPETITION" on its
standard input it works and writes a JSON line.

Needs no more than the standard library and the engine; workloads come from bench_work.py, the peers' settings from peers.py, both
by their paths. Every engine is stepped by hand in this process, so that nothing but the engine is measured.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

BENCH_WORK = Path(__file__).parents[2] / "handlers/lmi_dist_handler/bench_work.py"

NUM_STREAMS = 8
STREAM_PROMPT = 64  # tokens
ARRIVING_PROMPT = 2000
QUIET_TOKENS = 32  # of each stream before the long prompt comes; gaps of the first SETTLING do not count
SETTLING = 8
MAX_STREAM_TOKENS = 1200  # more than come while the long prompt is read


class Driver(Protocol):
    """An engine stepped by hand."""

    def add(self, ids: Sequence[int], num_new: int) -> str:
        """Queue a request for exactly so many tokens, greedy; returns its name."""

    def step(self) -> dict[str, int]:
        """One step; the number of new tokens by request."""

    def has_work(self) -> bool: ...

    def abort(self, name: str) -> None: ...


class Ours:
    """lmi_dist.Engine with its defaults, 16 sequences at most."""

    def __init__(self, options: argparse.Namespace, peers: None) -> None:
        from lmi_dist import Engine, EngineConfig

        threads = len(options.cpus.split(","))
        given = dict(option.partition("=")[::2] for option in options.options)
        config = {"model": options.model, "max_batch_size": 16, "cpu_threads": threads, **given}
        self._engine = Engine(EngineConfig.of(config))
        self._num = 0

    def add(self, ids: Sequence[int], num_new: int) -> str:
        from lmi_dist import Request, SamplingParams

        self._num += 1
        params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        self._engine.add(Request(id=str(self._num), prompt=tuple(ids), params=params, add_special_tokens=False))
        return str(self._num)

    def step(self) -> dict[str, int]:
        outputs = self._engine.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
        return {output.request_id: len(output.tokens) for output in outputs if output.tokens}

    def has_work(self) -> bool:
        return self._engine.has_work

    def abort(self, name: str) -> None:
        self._engine.abort(name)


class Vllm:
    """vLLM's CPU build with the settings of peers.py."""

    def __init__(self, options: argparse.Namespace, peers: ModuleType) -> None:
        self._peer = peers.VLLM(_peer_arguments(options, "compiled"))
        self._engine = self._peer.llm.llm_engine
        self._made: dict[str, int] = {}

    def add(self, ids: Sequence[int], num_new: int) -> str:
        name = str(len(self._made))
        params = self._peer.vllm.SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": list(ids)}, params)
        self._made[name] = 0
        return name

    def step(self) -> dict[str, int]:
        new: dict[str, int] = {}
        for output in self._engine.step():
            name, made = output.request_id, len(output.outputs[0].token_ids)
            new[name], self._made[name] = made - self._made[name], made
        return new

    def has_work(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def abort(self, name: str) -> None:
        self._engine.abort_request([name])


class OpenVino:
    """OpenVINO GenAI's continuous batching with the settings of peers.py."""

    def __init__(self, options: argparse.Namespace, peers: ModuleType) -> None:
        self._peer = peers.OpenVINO(_peer_arguments(options, "bf16"))
        self._handles: dict[str, Any] = {}
        self._num = 0

    def add(self, ids: Sequence[int], num_new: int) -> str:
        peer = self._peer
        config = peer.g.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_new, True, False
        tokens = peer.ov.Tensor(peer.np.array([ids], dtype=peer.np.int64))
        self._num += 1
        self._handles[str(self._num)] = peer.pipe.add_request(self._num, tokens, config)
        return str(self._num)

    def step(self) -> dict[str, int]:
        self._peer.pipe.step()
        new: dict[str, int] = {}
        for name, handle in self._handles.items():
            while handle.can_read():
                new[name] = new.get(name, 0) + sum(len(part.generated_ids) for part in handle.read().values())
        return new

    def has_work(self) -> bool:
        return bool(self._peer.pipe.has_non_finished_requests())

    def abort(self, name: str) -> None:
        self._handles.pop(name).cancel()


ENGINES: dict[str, Any] = {"ours": Ours, "vllm": Vllm, "openvino": OpenVino}


def _peer_arguments(options: argparse.Namespace, variant: str) -> SimpleNamespace:
    threads = len(options.cpus.split(","))
    return SimpleNamespace(model=options.model, ir=options.ir, variant=variant, threads=threads, batch_tokens=2048)


def work(driver: Driver, jobs: Sequence[Any], most: int) -> tuple[float, float]:
    """Seconds until the last token and until the first of all, with at most so many requests at a time: OpenVINO's own limit,
    max_num_seqs, lets all 32 in where it cuts prompts. Raises AssertionError when a length is not what was asked for."""
    start, first = time.perf_counter(), 0.0
    waiting, wanted = deque(jobs), dict[str, int]()
    while waiting or driver.has_work():
        while waiting and len(wanted) < most:
            job = waiting.popleft()
            wanted[driver.add(job.token_ids, job.num_new)] = job.num_new
        for name, num in driver.step().items():
            first = first or time.perf_counter() - start
            wanted[name] -= num
            if not wanted[name]:
                del wanted[name]
    assert not wanted, wanted
    return time.perf_counter() - start, first


def gaps(driver: Driver, chance: random.Random, vocab: int) -> dict[str, Any]:
    """Gaps between the tokens of NUM_STREAMS streams, ms: alone, and from the arrival of a long prompt to its first token."""

    def prompt(length: int) -> list[int]:
        return [chance.randrange(3, vocab) for _ in range(length)]

    made = {driver.add(prompt(STREAM_PROMPT), MAX_STREAM_TOKENS): 0 for _ in range(NUM_STREAMS)}
    last: dict[str, float] = {}
    alone: list[float] = []
    while min(made.values()) < QUIET_TOKENS:
        new, now = driver.step(), time.perf_counter()
        for name, num in new.items():
            if made[name] >= SETTLING:
                alone += [(now - last[name]) / num] * num
            last[name] = now
            made[name] += num
    arrived = time.perf_counter()
    long = driver.add(prompt(ARRIVING_PROMPT), 1)
    beside: list[float] = []
    num_steps = 0
    while True:
        new, now = driver.step(), time.perf_counter()
        num_steps += 1
        for name in new.keys() - {long}:
            beside += [(now - last[name]) / new[name]] * new[name]
        last |= dict.fromkeys(new, now)
        if long in new:
            break
    for name in made:
        driver.abort(name)
    while driver.has_work():
        driver.step()
    return {
        "alone_ms": [round(gap * 1e3, 3) for gap in alone],
        "beside_ms": [round(gap * 1e3, 3) for gap in beside],
        "first_ms": round((now - arrived) * 1e3, 1),
        "steps": num_steps,
    }


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _warm_up(jobs: Sequence[Any]) -> Sequence[Any]:
    """A quarter of the requests, each cut short: what an engine makes at the first use is made for sizes like these."""
    return [type(job)(job.token_ids[:512], min(job.num_new, 16)) for job in jobs[: max(1, len(jobs) // 4)]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("--model", required=True)
    parser.add_argument("--ir", default="", help="the model as OpenVINO has it")
    parser.add_argument("--peers-py", type=Path)
    parser.add_argument("--cpus", default="0,1")
    parser.add_argument("--born", type=float, required=True, help="time.monotonic() when this process was started")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--done-fd", type=int, required=True, help="gets a byte for each row that is in `out`")
    parser.add_argument("-o", dest="options", metavar="FIELD=VALUE", action="append", default=[], help="ours: of EngineConfig")
    options = parser.parse_args()
    bench_work = _module(BENCH_WORK)
    vocab = json.loads(Path(options.model, "config.json").read_text())["vocab_size"]
    peers = _module(options.peers_py) if options.engine != "ours" else None
    driver: Driver = ENGINES[options.engine](options, peers)
    chance = random.Random(0)
    most = bench_work.MAX_RUNNING
    work(driver, [bench_work.Job(tuple(chance.randrange(3, vocab) for _ in range(16)), 1)], most)
    start_s = time.monotonic() - options.born
    with options.out.open("a") as file:

        def tell(**values: object) -> None:
            peak_mb = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024
            file.write(json.dumps({**values, "peak_mb": peak_mb}) + "\n")
            file.flush()
            os.write(options.done_fd, b".")

        tell(workload="start", seconds=round(start_s, 3))
        for line in sys.stdin:
            name, repetition = line.split()
            if name == "gap":
                tell(workload=name, **gaps(driver, chance, vocab))
                continue
            jobs = bench_work.jobs_of(name, int(repetition), 0, vocab)
            if repetition == "0":
                work(driver, _warm_up(bench_work.jobs_of(name, -1, 0, vocab)), most)
            seconds, first_s = work(driver, jobs, most)
            tok_s = bench_work.tokens_per_s(name, jobs, bench_work.Timing(seconds, first_s))
            tell(workload=name, tok_s=round(tok_s, 2), first_ms=round(first_s * 1e3, 1), seconds=round(seconds, 3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
