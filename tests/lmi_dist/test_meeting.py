"""Ranks that mpirun has started meet through MPI, which is gone before the first plan."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from lmi_dist import ConfigError, Link, Ranks, connect

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
# What a rank does: refuse another degree, load, answer, and tell what MPI has left.
BODY = """
import json, sys, threading
from pathlib import Path
from lmi_dist import ConfigError, Engine, EngineConfig, Follower, Ranks, Request, SamplingParams, connect

folder, ids = sys.argv[1], json.loads(sys.argv[2])
try:
    connect(3)
except ConfigError as error:
    refusal = str(error)
link = connect(2)
from mpi4py import MPI
told = {"refusal": refusal, "finalized": MPI.Is_finalized(), "maps": Path("/proc/self/maps").read_text()}
if Ranks.of_environment().rank:
    follower = Follower(link)
    thread = threading.Thread(target=follower.run)
    thread.start()
    told["reply"] = link.await_reply().decode()
    thread.join()
else:
    engine = Engine(EngineConfig.of({"model": folder, "dtype": "fp32", "tensor_parallel_degree": 2}), link)
    engine.add(Request(id="r", prompt=ids, params=SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)))
    told["ids"] = []
    while engine.has_work:
        told["ids"] += [token.id for output in engine.step() for token in output.tokens]
    link.publish_reply(b"answered")
    told["reply"] = "answered"
    engine.close()
print("TOLD" + json.dumps(told), flush=True)
"""


def test_ranks_of_mpirun_answer_like_one(tmp_path: Path) -> None:
    model, references = tiny_models.settled("llama2-gqa")
    folder = tiny_models.save(model, tmp_path)
    command = [MPIRUN, "-np", "2", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    prompt = json.dumps(references[0].prompt)

    done = subprocess.run(
        [*command, sys.executable, "-c", BODY, str(folder), prompt], capture_output=True, text=True, timeout=150, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line.partition("TOLD")[2]) for line in done.stdout.splitlines() if "TOLD" in line]
    assert len(told) == 2
    assert next(each["ids"] for each in told if "ids" in each) == list(references[0].ids)
    for each in told:
        assert each["refusal"].startswith("tensor_parallel_degree=3 must be the number of ranks, and the launcher has started 2")
        assert (each["finalized"], each["reply"]) == (True, "answered")
        named = [line for line in each["maps"].splitlines() if "/dev/shm" in line and not line.endswith("(deleted)")]
        assert ("/memfd:lmi-dist" in each["maps"], named) == (True, []), "what is mapped by name, a SIGKILL would leave"


def test_one_rank_is_alone() -> None:
    assert type(connect(1, Ranks())) is Link


def test_more_ranks_than_the_launcher_started_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_degree=2 .* has started 1; start with mpirun -np 2, or set .*=1$"):
        connect(2, Ranks())
