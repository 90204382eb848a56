"""handlers/lmi_dist_handler/{cli,server}.py: what the command line prints and how it ends. Serving: test_serve.py."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from lmi_dist_handler import cli
from lmi_dist_handler.server import bind
from lmi_dist_handler.settings import ServerSettings

from lmi_dist import ConfigError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny-llama"
    return tiny_models.save(tiny_models.build("llama2-gqa"), folder)


def explain(checkpoint: Path | str, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    words = [f"option.model_id={checkpoint}", *options]
    status = cli.main(["explain", *(word for option in words for word in ("-o", option))])
    out, err = capsys.readouterr()
    return status, out, err


def test_explain_tells_options_memory_and_kernels(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = explain(checkpoint, capsys, "option.max_model_len=128")

    rows = [line.split() for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert ["option.max_model_len", "128", "command", "line"] in rows
    assert ["option.max_rolling_batch_size", "256", "default"] in rows
    assert "KV pool" in out
    assert "kernels" in out


def test_explained_models_share_the_memory(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = f"option.model_id={checkpoint}\noption.kv_cache_memory_bytes=500000000\n"
        (tmp_path / name / "serving.properties").write_text(lines)

    assert cli.main(["explain", "-o", f"model_store={tmp_path}"]) == 0

    first, second = (float(found) for found in re.findall(r"available memory ([\d.]+) GB", capsys.readouterr().out))
    assert 0.5 < first - second < 1.0


def test_explain_reads_a_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "serving.properties").write_text(f"engine=MPI\noption.model_id={checkpoint}\n")

    assert cli.main(["explain", "--model-dir", str(tmp_path)]) == 0

    assert "serving.properties:2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [("missing", "config.json"), ("corrupt", "model.safetensors"), ("unknown", "architectures=['NoSuchForCausalLM']")],
)
def test_unusable_checkpoint_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, sentence: str
) -> None:
    if fault != "missing":
        for file in checkpoint.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if fault == "corrupt":
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    if fault == "unknown":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchForCausalLM"]}))

    status, out, err = explain(tmp_path, capsys)

    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("lmi-dist: error: ")
    assert sentence in err


def test_want_of_room_is_one_line_with_the_arithmetic(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = explain(checkpoint, capsys, "option.kv_cache_memory_bytes=100")

    assert (status, err.count("\n")) == (2, 1)
    assert "kv_cache_memory_bytes=100" in err


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("option.max_model_len=x", "option.max_model_len='x' is refused"),
        ("option.max_modl_len=9", "did you mean option.max_model_len"),
        ("port=99999", "port"),
    ],
)
def test_bad_option_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str], option: str, sentence: str) -> None:
    status, _, err = explain(checkpoint, capsys, option)

    assert (status, err.count("\n")) == (2, 1)
    assert sentence in err


def test_wrong_words_show_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["no-such-command"])

    assert ended.value.code == 2
    assert "usage: lmi-dist" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "explain", "bench", "demo"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])

    assert ended.value.code == 0
    assert f"usage: lmi-dist {command}" in capsys.readouterr().out


def test_serving_process_stays_free_of_torch() -> None:
    program = "import sys, lmi_dist_handler.cli, lmi_dist_handler.server; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_port_in_use_is_told_with_the_way_out() -> None:
    with bind(ServerSettings(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"port={port} on host=127.0.0.1 is in use; choose another with SERVING_PORT or --port"
        ):
            bind(ServerSettings(port=port))


def test_address_of_another_machine_is_told() -> None:
    with pytest.raises(ConfigError, match=r"host=192\.0\.2\.1 cannot be had: Cannot assign requested address"):
        bind(ServerSettings(host="192.0.2.1", port=0))


def test_ipv6_is_served_too() -> None:
    with bind(ServerSettings(host="::1", port=0)) as listener:
        assert listener.family == socket.AF_INET6
