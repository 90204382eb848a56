import argparse
import json

import pytest
from lmi_dist_handler import bench, bench_limits, cli, synthetic
from lmi_dist_handler.bench import Row
from lmi_dist_handler.bench_target import EngineTarget
from lmi_dist_handler.bench_work import Limits
from lmi_dist_handler.synthetic import PRESETS

from lmi_dist import ConfigError

LIMITS = Limits(bytes_per_s=20e9, flops_per_s=0.5e12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny"
    synthetic.write(place, PRESETS["tiny"], num_bytes=20_000)
    return place


def row(workload, repetition, tok_s):
    return Row("m", "engine", workload, repetition, tok_s, first_ms=30.0, floor_tok_s=100.0, floor_first_ms=10.0, peak_mb=500)


def test_bench_measures_the_engine(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_limits, "measure", lambda num_threads: LIMITS)

    status = cli.main(["bench", "--model", str(folder), "--workloads", "latency,prefill4", "--repetitions", "2", "--warmups", "0",
                       "--out", str(tmp_path / "rows.jsonl"), "-o", "max_model_len=1100"])  # fmt: skip

    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    table = capsys.readouterr().out
    assert status == 0
    assert [(one["workload"], one["repetition"]) for one in rows] == [
        ("latency", 0),
        ("latency", 1),
        ("prefill4", 0),
        ("prefill4", 1),
    ]
    assert all(one["tok_s"] > 0 and one["peak_mb"] > 50 for one in rows)
    assert "20.0 GB/s" in table
    assert "| tiny | latency | 2 |" in table


@pytest.mark.parametrize(("options", "size"), [({}, (2, 2)), ({"kv_cache_dtype": "fp8"}, (2, 1)), ({"dtype": "fp32"}, (4, 4))])
def test_engine_target_knows_what_a_number_takes(folder, options, size):
    assert EngineTarget({"model": str(folder), "dtype": "bf16", "max_model_len": 64, **options}).element_bytes == size


def test_table_tells_median_spread_and_share():
    rows = [row("latency", i, tok_s) for i, tok_s in enumerate((50.0, 10.0, 60.0))] + [row("prefill1", 0, 25.0)]

    lines = bench.report(rows, LIMITS)

    assert lines[-2] == "| m | latency | 3 | 50.0 (10.0-60.0) | 100.0 | 0.50 | 30.0 (30.0-30.0) | 10.0 | 500 |"
    assert lines[-1] == "| m | prefill1 | 1 | 25.0 (25.0-25.0) | 100.0 | 0.25 |  |  | 500 |"


def test_limits_are_measured_elsewhere():
    limits = bench_limits.measure(num_threads=1, num_read=2**22, side=128)

    assert 1e8 < limits.bytes_per_s < 1e13
    assert 1e8 < limits.flops_per_s < 1e15


def test_synthetic_model_is_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(synthetic, "write", lambda folder, preset: (made.append(preset), folder.mkdir()))
    arguments = argparse.Namespace(model=None, synthetic="llama-160m", cache=tmp_path)

    folders = [bench.model_folder(arguments) for _ in range(2)]

    assert folders == [tmp_path / "llama-160m"] * 2
    assert made == [PRESETS["llama-160m"]]


def test_folder_without_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--model=.* must be a folder with a config.json"):
        bench.model_folder(argparse.Namespace(model=tmp_path))


def test_unknown_workload_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--synthetic", "tiny", "--workloads", "latencies"])

    assert "must be some of latency,throughput,prefill1,prefill4" in capsys.readouterr().err
