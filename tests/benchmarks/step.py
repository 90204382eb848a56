"""What of a decode step is outside of the kernels: python tests/benchmarks/step.py [--synthetic llama-1.1b] [--sequences 16]

The forward from Python and recorded, in turn in one process: milliseconds a step and, of them, those outside of any call into the
library; medians. --profile tells where the time outside goes, by function (and makes it longer).
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from lmi_dist_handler import synthetic
from lmi_dist_handler.cache import default_cache

from lmi_dist import Engine, EngineConfig, Request, SamplingParams
from lmi_dist.ops import column

PROMPT_TOKENS = 128
STEPS, ROUNDS = 20, 4  # of each way


class Clock:
    """Seconds inside of calls into the library in use."""

    def __init__(self) -> None:
        self.inside = 0.0
        library = column.library()
        assert library is not None, "the torch column has no calls to measure"
        for name, operation in library._operations.items():
            library._operations[name] = replace(operation, function=self._timed(operation.function))
        library._functions["lmi_replay"] = self._timed(library._functions["lmi_replay"])

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.inside += time.perf_counter() - begun

        return run

    def time(self, engine: Engine, num_steps: int) -> list[tuple[float, float]]:
        """Milliseconds of each step, and those outside."""
        steps = []
        for _ in range(num_steps):
            self.inside, begun = 0.0, time.perf_counter()
            engine.step()
            seconds = time.perf_counter() - begun
            steps.append((seconds * 1e3, (seconds - self.inside) * 1e3))
        return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--synthetic", choices=synthetic.PRESETS, default="llama-160m")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    folder = default_cache() / arguments.synthetic
    if not folder.exists():
        synthetic.write(folder, synthetic.PRESETS[arguments.synthetic])
    engine = Engine(EngineConfig.of({"model": str(folder), "max_batch_size": arguments.sequences}))
    decodes, clock = engine._runner.decodes, Clock()
    begin(engine, arguments.sequences)
    steps: dict[str, list[tuple[float, float]]] = {"from Python": [], "recorded": []}
    for _ in range(ROUNDS):
        for way, times in steps.items():
            engine._runner.decodes = decodes if way == "recorded" else None
            clock.time(engine, 2)
            times += clock.time(engine, STEPS)
    if arguments.profile:
        with cProfile.Profile() as profile:
            clock.time(engine, STEPS)
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
    for way, times in steps.items():
        step, outside = (median(each) for each in zip(*times, strict=True))
        share = f"{step:.2f} ms a step, outside {outside:.2f} = {outside / step:.1%}"
        print(f"{folder.name}, {arguments.sequences} sequences, {way}: {share}")


def begin(engine: Engine, num_sequences: int) -> None:
    """Requests that are past their prompts, and run long enough."""
    generator = torch.Generator().manual_seed(0)
    for number in range(num_sequences):
        ids = torch.randint(5, 500, (PROMPT_TOKENS,), generator=generator).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=2 * (ROUNDS + 1) * (STEPS + 8), ignore_eos=True)
        engine.add(Request(id=str(number), prompt=ids, params=params, add_special_tokens=False))
    while len(engine.step()) < num_sequences:
        pass


if __name__ == "__main__":
    main()
