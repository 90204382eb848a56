"""Ours, vLLM's CPU build and OpenVINO GenAI on the same work in turn, and one markdown table with the floors of the same minutes.

    .venv/bin/python tests/benchmarks/against_peers.py --peers PEERS --bench ../shared/bench --out against.jsonl
    .venv/bin/python tests/benchmarks/against_peers.py --peers PEERS --bench ../shared/bench --only 160m:throughput,1.1b:start
    .venv/bin/python tests/benchmarks/against_peers.py --table against.jsonl

PEERS is the folder that the bench folder's README has made: venv-vllm, venv-ov, models, models-ov, the programs limits and noise.
Each engine is a process (one_engine.py) with the same CPUs and threads; all are there, and asleep, while one of them works. Every
repetition goes ours, vllm, openvino, each after a wait for a quiet machine, so that all meet the same noise: what others leave of a
shared machine's bandwidth changes by the minute; hence a workload's limits are measured before and after it, and the better ones
make its floor. --prepare lets each engine start once before anything counts: vLLM compiles a model at its first start.

Besides the workloads of `lmi-dist bench`: `start`, from the start of the process to the first token of a request of 16; and `gap`,
the 99th percentile of the time between the tokens of 8 streams from the arrival of a prompt of 2000 tokens to the first token of
that, over the median without it.
"""

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmi_dist_handler.bench_work import WORKLOADS, ElementBytes, Limits, Shape, floor, jobs_of, tokens_per_s

ENGINES = ("ours", "vllm", "openvino")
NAMES = {"ours": "lmi-dist", "vllm": "vLLM", "openvino": "OpenVINO"}
ELEMENT_BYTES = ElementBytes(weight=2, cached=2)
QUIET = 0.03  # share of the CPUs' time that others may take before a turn
PATIENCE_S = 20.0
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured of one model, and how often."""

    folder: str
    repetitions: dict[str, int]
    read_mb: int  # of the bandwidth's working sets, the one that is like its weights


PLANS = {
    "1.1b": Plan("llama-1.1b", {"latency": 5, "throughput": 3, "prefill1": 3, "prefill4": 4, "gap": 3}, 2200),
    "160m": Plan("llama-160m", {"latency": 5, "throughput": 3, "prefill1": 3, "prefill4": 4, "gap": 3}, 325),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments and models")
    parser.add_argument("--bench", type=Path, help="folder of peers.py")
    parser.add_argument("--only", default=",".join(PLANS), help="MODEL or MODEL:WORKLOAD, with commas between (%(default)s)")
    parser.add_argument("--engines", default=",".join(ENGINES), help="some of %(default)s")
    parser.add_argument("--cpus", default=",".join(map(str, sorted(os.sched_getaffinity(0)))), help="of every engine (%(default)s)")
    parser.add_argument("--prepare", action="store_true", help="only start each engine once with each model")
    parser.add_argument("--out", type=Path, default=Path("against_peers.jsonl"), help="append every repetition here (%(default)s)")
    parser.add_argument("--table", type=Path, nargs="+", help="measure nothing, print the table of these files")
    parser.add_argument("-o", dest="options", metavar="FIELD=VALUE", action="append", default=[], help="ours: of EngineConfig")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table([json.loads(line) for path in options.table for line in path.open()])))
        return 0
    if options.peers is None or options.bench is None:
        parser.error("--peers and --bench are needed to measure")
    run = Run(options)
    run.prepare() if options.prepare else run.measure()
    if not options.prepare:
        print("\n".join(table(run.rows)))
    return 1 if run.num_failed else 0


class Run:
    """All turns of one call."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._peers = options.peers.absolute()
        self._engines = options.engines.split(",")
        self._plans = _chosen(options.only)
        self.rows: list[dict[str, Any]] = []
        self.num_failed = 0  # turns

    def prepare(self) -> None:
        for name, plan in self._plans.items():
            for engine in self._engines:
                self._start(engine, name, plan).end()

    def measure(self) -> None:
        for name, plan in self._plans.items():
            started = {engine: self._start(engine, name, plan) for engine in self._engines}
            living = {engine: one for engine, one in started.items() if one.is_alive}
            for work, num in plan.repetitions.items():
                self._limits(name, work)
                for repetition in range(num):
                    for engine, one in living.items():
                        before = self._noise(PATIENCE_S)
                        row = one.ask(f"{work} {repetition}")
                        self._keep(row | {"engine": engine, "model": name, "noise": before})
                        _say(f"{name} {work} {engine}: {row.get('tok_s', row.get('steps'))}")
                self._limits(name, work)
            for one in living.values():
                one.end()

    def _start(self, engine: str, name: str, plan: Plan) -> "Started":
        """An engine that has answered its first request. Of one that fails the last words are told of, and the others go on."""
        path = self._options.out.with_name(f"{self._options.out.stem}.{name}.{engine}.rows")
        path.unlink(missing_ok=True)
        model = self._peers / "models" / plan.folder
        words = [engine, "--model", model, "--ir", self._peers / "models-ov" / plan.folder, "--cpus", self._options.cpus]
        words += ["--peers-py", self._options.bench / "peers.py", "--out", path.absolute()]
        words += [word for option in self._options.options for word in ("-o", option)]
        script = Path(__file__).with_name("one_engine.py")
        python, environment = self._python(engine)
        # -P: else a peer that imports a package `kernels` would find the file of this folder
        command = [str(word) for word in (python, "-P", script, *words)]
        cpus = {int(cpu) for cpu in self._options.cpus.split(",")}
        one = Started(command, environment, cpus, path)
        row = one.answer()
        if one.is_alive:
            self._keep(row | {"engine": engine, "model": name})
            _say(f"{name} {engine} starts in {row['seconds']:.1f} s")
        else:
            self.num_failed += 1
            _say(f"{name} {engine} did not start; {one.log} has its last words")
        return one

    def _python(self, engine: str) -> tuple[Path, dict[str, str]]:
        """An engine's interpreter and the environment that its makers recommend."""
        environment = dict(os.environ) | {"OMP_NUM_THREADS": str(len(self._options.cpus.split(",")))}
        if engine == "ours":
            return Path(sys.executable), dict(os.environ)
        folder = self._peers / {"vllm": "venv-vllm", "openvino": "venv-ov"}[engine]
        if engine == "vllm":
            environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
            libraries = [*Path("/usr/lib").rglob("libtcmalloc_minimal.so.4"), folder / "lib/libiomp5.so"]
            environment["LD_PRELOAD"] = ":".join(map(str, libraries))
        return folder / "bin/python", environment

    def _limits(self, name: str, work: str) -> None:
        """Bandwidth by working set and arithmetic of all CPUs by the bench folder's program, for what has a floor."""
        if work not in WORKLOADS:
            return
        environment = dict(os.environ) | {"OMP_NUM_THREADS": str(len(self._options.cpus.split(","))), "OMP_PROC_BIND": "true"}
        said = subprocess.run([self._peers / "limits"], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        for line in said.splitlines():
            self._keep({"limit": json.loads(line), "model": name, "workload": work})

    def _noise(self, patience_s: float) -> float:
        """The share of CPU time that others take; waits for a quiet moment, but not for ever."""
        until = time.monotonic() + patience_s
        while True:
            lost = float(subprocess.run([self._peers / "noise", "0.6"], check=True, stdout=subprocess.PIPE, text=True).stdout)
            if lost <= QUIET or time.monotonic() > until:
                return lost

    def _keep(self, row: dict[str, Any]) -> None:
        row = row | {"peers": str(self._peers)}
        self.rows.append(row)
        with self._options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Started:
    """A process of one_engine.py, which sleeps while it is not asked."""

    def __init__(self, command: list[str], environment: dict[str, str], cpus: set[int], rows: Path) -> None:
        self.log = rows.with_suffix(".log")
        self._rows = rows
        self._num_read = 0
        self._done, done = os.pipe()
        with self.log.open("w") as said:
            self._process = subprocess.Popen(
                [*command, "--born", str(time.monotonic()), "--done-fd", str(done)], env=environment, stdin=subprocess.PIPE,
                stdout=said, stderr=said, text=True, pass_fds=[done], preexec_fn=lambda: os.sched_setaffinity(0, cpus),
            )  # fmt: skip
        os.close(done)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        row = self.answer()
        if not row:
            raise SystemExit(f"an engine has ended; {self.log} has its last words")
        return row

    def answer(self) -> dict[str, Any]:
        """The next row; {} where the process ends or has none for TIMEOUT_S."""
        if not select.select([self._done], [], [], TIMEOUT_S)[0] or not os.read(self._done, 1):
            self._process.kill()
            self._process.wait()
            return {}
        self._num_read += 1
        row: dict[str, Any] = json.loads(self._rows.read_text().splitlines()[self._num_read - 1])
        return row

    def end(self) -> None:
        if self.is_alive:
            self._process.kill()
            self._process.wait()
        os.close(self._done)


def _chosen(only: str) -> dict[str, Plan]:
    """The plans that `only` names, with their workloads cut to what it names. Raises SystemExit for others."""
    chosen: dict[str, Plan] = {}
    for part in only.split(","):
        name, _, work = part.partition(":")
        plan = PLANS.get(name)
        if plan is None or work not in ("", "start", *plan.repetitions):
            known = f"MODEL or MODEL:WORKLOAD of {', '.join(PLANS)} and start, {', '.join(PLANS['160m'].repetitions)}"
            raise SystemExit(f"--only={only}: {part} must be {known}")
        kept = {key: num for key, num in plan.repetitions.items() if work in ("", key)}
        before = chosen[name].repetitions if name in chosen else {}
        chosen[name] = Plan(plan.folder, before | kept, plan.read_mb)
    return chosen


# ---- the table ----


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a model and workload: floor, every engine, ours over the floor and over the best peer."""
    measured = [row for row in rows if "limit" not in row]
    engines = [engine for engine in ENGINES if any(row["engine"] == engine for row in measured)]
    columns = ["model", "workload", "floor (GB/s, TFLOP/s)", *(NAMES[engine] for engine in engines), "of floor", "of best peer"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, plan in PLANS.items():
        for work in (*WORKLOADS, *EXTRA):
            own = [row for row in measured if (row["model"], row["workload"]) == (name, work)]
            if own:
                limits = [row["limit"] for row in rows if "limit" in row and (row["model"], row["workload"]) == (name, work)]
                lines.append(_line(name, plan, work, own, engines, _limits_of(limits, plan)))
    return lines


EXTRA: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "gap": ("p99 gap, times the gap without the prompt", lambda row: _p99(row["beside_ms"]) / statistics.median(row["alone_ms"])),
    "start": ("start to first token, s", lambda row: float(row["seconds"])),
}
UNITS = {"latency": "decode, 1 x (128, 64), tok/s", "throughput": "mixed, 32 requests, 16 at a time, tok/s"}
UNITS |= {"prefill1": "prefill 1 x 1024, tok/s", "prefill4": "prefill 4 x 512, tok/s"}


def _line(name: str, plan: Plan, work: str, rows: Sequence[dict[str, Any]], engines: Sequence[str], limits: Limits | None) -> str:
    label, value = EXTRA.get(work, (UNITS.get(work, work), lambda row: float(row["tok_s"])))
    values = {engine: [value(row) for row in rows if row["engine"] == engine] for engine in engines}
    medians = {engine: statistics.median(found) for engine, found in values.items() if found}
    least = _floor(plan, work, rows, limits)
    peers = [median for engine, median in medians.items() if engine != "ours"]
    best = (min(peers) if work in EXTRA else max(peers)) if peers else None
    ours = medians.get("ours")
    cells = [
        name,
        label,
        f"{least:.1f} ({limits.bytes_per_s / 1e9:.0f}, {limits.flops_per_s / 1e12:.2f})" if limits and least else "",
    ]
    cells += [_spread(values[engine]) + _details(work, [row for row in rows if row["engine"] == engine]) for engine in engines]
    cells += [f"{ours / least:.2f}" if ours and least else "", f"{ours / best:.2f}" if ours and best else ""]
    return f"| {' | '.join(cells)} |"


def _details(work: str, rows: Sequence[dict[str, Any]]) -> str:
    """Of the gap: the figures that its ratio is made of, and when the long prompt had its first token."""
    if work != "gap" or not rows:
        return ""
    beside, alone = (statistics.median(figure(row) for row in rows) for figure in (_beside, _alone))
    return f"; {beside:.0f} over {alone:.0f} ms, first token {statistics.median(row['first_ms'] for row in rows) / 1e3:.1f} s"


def _beside(row: dict[str, Any]) -> float:
    return _p99(row["beside_ms"])


def _alone(row: dict[str, Any]) -> float:
    return float(statistics.median(row["alone_ms"]))


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f}, {len(values)})"


def _floor(plan: Plan, work: str, rows: Sequence[dict[str, Any]], limits: Limits | None) -> float | None:
    """Tokens a second at the machine's limits."""
    if limits is None or work not in WORKLOADS:
        return None
    jobs = jobs_of(work, 0, 0, 100)
    return tokens_per_s(work, jobs, floor(_shape(plan, rows), jobs, limits, ELEMENT_BYTES))


def _shape(plan: Plan, rows: Iterable[dict[str, Any]]) -> Shape:
    return Shape.read(Path(next(iter(rows))["peers"]) / "models" / plan.folder)


def _limits_of(found: Sequence[dict[str, Any]], plan: Plan) -> Limits | None:
    """The better of what was measured before and after: bandwidth of a working set like the model's, arithmetic of tiles or else of
    AVX-512's dot products."""
    threads = max((one["threads"] for one in found), default=0)
    read = [one["median"] for one in found if one["threads"] == threads and "huge" in one["what"] and one["mb"] == plan.read_mb]
    products = [one["median"] for one in found if one["threads"] == threads and "bf16" in one["what"]]
    return Limits(max(read) * 1e9, max(products) * 1e9) if read and products else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
