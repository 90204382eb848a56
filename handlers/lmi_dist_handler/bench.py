"""`lmi-dist bench`: fixed workloads through the engine or a running server, and what share of the machine's limits they reach.

Warm-up, repetitions, limits measured in the same run, one markdown table. See bench_work.py for the workloads.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lmi_dist import ConfigError
from lmi_dist_handler import bench_limits, synthetic
from lmi_dist_handler.bench_target import EngineTarget, HttpTarget, Target
from lmi_dist_handler.bench_work import WORKLOADS, Job, Limits, Shape, Timing, floor, jobs_of, tokens_per_s
from lmi_dist_handler.cache import default_cache

COLUMNS = (
    "| model | workload | n | tok/s median (min-max) | floor tok/s | of floor | TTFT ms median (min-max) | floor ms | peak RSS MB |"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One repetition. `tok_s` and `first_ms` beside what they would be at the machine's limits."""

    model: str
    target: str
    workload: str
    repetition: int
    tok_s: float
    first_ms: float
    floor_tok_s: float
    floor_first_ms: float
    peak_mb: int | None


@dataclass(frozen=True, slots=True)
class Measured:
    """One repetition as it came; `peak_mb` of memory until then."""

    workload: str
    repetition: int
    jobs: Sequence[Job]
    timing: Timing
    peak_mb: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder of a Llama checkpoint")
    which.add_argument("--synthetic", choices=sorted(synthetic.PRESETS), help="random weights, made at the first use")
    parser.add_argument("--url", help="measure the server there, which serves the same model, instead of an engine in this process")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for synthetic checkpoints (%(default)s)")
    parser.add_argument("--workloads", type=_workloads, default=WORKLOADS, help=f"some of {','.join(WORKLOADS)}")
    parser.add_argument("--repetitions", type=int, default=5, help="of each workload (%(default)s)")
    parser.add_argument("--warmups", type=int, default=1, help="repetitions that do not count (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    parser.add_argument("--threads", type=int, help="of engine and limits; unset: all CPUs")
    parser.add_argument("--out", type=Path, help="append every repetition to this file, as JSON lines")
    parser.add_argument("-o", dest="options", metavar="FIELD=VALUE", action="append", default=[], help="of EngineConfig")


def _workloads(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(WORKLOADS):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(WORKLOADS)}")
    return names


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Raises ConfigError or BenchError."""
    folder = model_folder(arguments)
    limits = [bench_limits.measure(arguments.threads)]
    target = _target(arguments, folder)
    measured = list(_measure(arguments, target, Shape.read(folder).vocab))
    limits.append(bench_limits.measure(arguments.threads))
    best = Limits(max(one.bytes_per_s for one in limits), max(one.flops_per_s for one in limits))
    rows = [_row(folder, target, best, one) for one in measured]
    if arguments.out:
        with arguments.out.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    print("\n".join(report(rows, best)))
    return 0


def model_folder(arguments: argparse.Namespace) -> Path:
    """The checkpoint's folder; a synthetic one is made if it is not there."""
    if arguments.model:
        if not (arguments.model / "config.json").exists():
            raise ConfigError(f"--model={str(arguments.model)!r} must be a folder with a config.json")
        return Path(arguments.model)
    folder = Path(arguments.cache, arguments.synthetic)
    if not folder.exists():
        _say(f"writing {folder}")
        synthetic.write(folder, synthetic.PRESETS[arguments.synthetic])
    return folder


def _target(arguments: argparse.Namespace, folder: Path) -> Target:
    if arguments.url:
        return HttpTarget(arguments.url)
    options = dict(option.partition("=")[::2] for option in arguments.options)
    return EngineTarget({"model": str(folder), "cpu_threads": arguments.threads, **options})


def _measure(arguments: argparse.Namespace, target: Target, vocab_size: int) -> Iterator[Measured]:
    """Every repetition that counts."""
    for workload in arguments.workloads:
        for repetition in range(-arguments.warmups, arguments.repetitions):
            jobs = jobs_of(workload, repetition, arguments.seed, vocab_size)
            timing = target.run(jobs)
            if repetition >= 0:
                _say(f"{workload} {repetition + 1} of {arguments.repetitions}: {tokens_per_s(workload, jobs, timing):.1f} tok/s")
                yield Measured(workload, repetition, jobs, timing, target.peak_mb())


def _row(folder: Path, target: Target, limits: Limits, measured: Measured) -> Row:
    least = floor(Shape.read(folder), measured.jobs, limits, target.element_bytes)
    return Row(
        model=folder.name,
        target=target.name,
        workload=measured.workload,
        repetition=measured.repetition,
        tok_s=round(tokens_per_s(measured.workload, measured.jobs, measured.timing), 2),
        first_ms=round(measured.timing.first_s * 1e3, 2),
        floor_tok_s=round(tokens_per_s(measured.workload, measured.jobs, least), 2),
        floor_first_ms=round(least.first_s * 1e3, 2),
        peak_mb=measured.peak_mb,
    )


def report(rows: Sequence[Row], limits: Limits) -> list[str]:
    """The table with a line above that says what the floors rest on."""
    lines = [
        f"{rows[0].target}; limits of this machine in this run: {limits.bytes_per_s / 1e9:.1f} GB/s read by torch, "
        f"{limits.flops_per_s / 1e12:.3f} TFLOP/s in torch's best matrix product",
        "",
        COLUMNS,
        "|" + "---|" * (COLUMNS.count("|") - 1),
    ]
    for workload in dict.fromkeys(row.workload for row in rows):
        lines.append(_line([row for row in rows if row.workload == workload]))
    return lines


def _line(rows: Sequence[Row]) -> str:
    """The table's line of one workload."""
    one = rows[0]
    share = statistics.median(row.tok_s for row in rows) / one.floor_tok_s
    is_latency = one.workload == "latency"
    peaks = [row.peak_mb for row in rows if row.peak_mb is not None]
    cells = (
        one.model,
        one.workload,
        str(len(rows)),
        _spread([row.tok_s for row in rows]),
        f"{one.floor_tok_s:.1f}",
        f"{share:.2f}",
        _spread([row.first_ms for row in rows]) if is_latency else "",
        f"{one.floor_first_ms:.1f}" if is_latency else "",
        str(max(peaks)) if peaks else "",
    )
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
