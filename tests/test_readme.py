"""README.md says only what works: each of its fenced examples is executed, over a tiny Llama that stands where it says."""

import argparse
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from lmi_dist_handler import cli, load_models, properties
from lmi_dist_handler.openapi import LMI_ONLY
from lmi_dist_handler.options import OPTIONS
from lmi_dist_handler.sampling import LMI
from running_server import Server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KINDS = ("sh", "properties", "json", "python")
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
STATUS = "\nstatus %{http_code}"  # what curl is asked to write after the body


@dataclass(frozen=True)
class Block:
    """One fenced example and the line that it stands in."""

    kind: str
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        """Commands of a shell block, each on one line, without comments at its end."""
        joined = self.text.replace("\\\n", " ")
        return [re.sub(r"\s+#\s.*", "", line) for line in joined.splitlines() if line.strip()]


BLOCKS = [Block(match[1], match[2], README[: match.start()].count("\n") + 1) for match in FENCE.finditer(README)]
COMMANDS = [command for block in BLOCKS if block.kind == "sh" for command in block.commands]
MAKE = [command for command in COMMANDS if command.startswith("make ")]
STARTS = [command for command in COMMANDS if re.search(r"=\S+ make run$|bin/lmi-dist serve", command)]
EXPLAINS = [command for command in COMMANDS if "lmi-dist explain" in command]
DOCKER = [command for command in COMMANDS if command.startswith("docker ")]
CURLS = [command for command in COMMANDS if command.startswith("curl ")]
ANSWERED = [
    (asked.commands[-1], answer.text) for asked, answer in itertools.pairwise(BLOCKS) if (asked.kind, answer.kind) == ("sh", "json")
]


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(block.text, id=f"line-{block.line}") for block in BLOCKS if block.kind == kind]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for /models."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.save(tiny_models.build("llama2-gqa"), folder / "my-llama")
    (folder / "my-llama" / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(folder / "my-llama", folder / "other")
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Server]:
    """Started by the README's own command, that with a model store."""
    environ, arguments = start_words(next(command for command in STARTS if "MODEL_STORE" in command), models)
    server = Server(*arguments, **environ)
    server.wait_until_ready()
    yield server
    server.end()


def here(text: str, models: Path, url: str = "") -> str:
    """An example with this machine's folder, address and programs in it."""
    text = re.sub(r"(?<=[=\s\"'])/models\b", str(models), text).replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    return text.replace("http://localhost:8080", url).replace("localhost:8080", url)


def start_words(command: str, models: Path) -> tuple[dict[str, str], list[str]]:
    """Variables and arguments of a command that starts a server; `make run` runs `lmi-dist serve`."""
    words = shlex.split(here(command, models))
    environ = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    rest = words[len(environ) :]
    return environ, [] if rest == ["make", "run"] else rest[rest.index("serve") + 1 :]


def ask(command: str, models: Path, server: Server) -> tuple[int, str]:
    """Run a curl command as it stands; status and body of what it got."""
    done = subprocess.run(
        ["bash", "-c", f"{here(command, models, server.url)} --silent --max-time 60 --write-out {shlex.quote(STATUS)}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\nstatus ")
    return int(status), body


def shape(value: object) -> object:
    """What an answer is made of: names and types, not values."""
    if isinstance(value, Mapping):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return "number" if isinstance(value, int | float) else type(value).__name__


def test_every_example_is_of_a_kind_that_is_run() -> None:
    untold = set(COMMANDS) - {*MAKE, *STARTS, *EXPLAINS, *DOCKER, *CURLS}

    assert {block.kind for block in BLOCKS} == set(KINDS)
    assert untold == set()
    assert len(ANSWERED) == sum(block.kind == "json" for block in BLOCKS)


def test_it_begins_with_the_two_commands() -> None:
    assert [command.split("#")[0].strip() for command in BLOCKS[0].commands] == ["make run", "make test"]


@pytest.mark.parametrize("command", MAKE)
def test_make_has_the_target(command: str) -> None:
    done = subprocess.run(["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, check=False)

    assert done.returncode == 0


def test_make_run_serves() -> None:
    assert "exec $(BIN)/lmi-dist serve;" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", STARTS)
def test_start_resolves(command: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_models, "DEFAULT_STORE", models / "no-store")
    environ, arguments = start_words(command, models)

    given = cli._parser("serve").parse_args(["serve", *arguments])
    words = {"port": given.port} if given.port else {}
    settings = properties.load(given.model_dir, environ, {**words, **dict(option.split("=", 1) for option in given.options)})

    found = {model.engine_config().model for model in settings.models}
    assert found <= {str(models / "my-llama"), str(models / "other"), "org/name"}
    assert settings.server.port == int(given.port or 8080)


@pytest.mark.parametrize("text", of_kind("properties"))
def test_file_resolves(text: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "serving.properties").write_text(here(text, models))

    (model,) = properties.load(tmp_path, {}).models

    given = dict(line.split("=", 1) for line in text.splitlines())
    assert {name for name in model.origin if model.origin[name] != "default"} == {OPTIONS[key].name for key in given}


def docker_parser() -> argparse.ArgumentParser:
    """Of what the examples say to docker, which is not there to be asked."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    build, run = commands.add_parser("build"), commands.add_parser("run")
    for name in ("--target", "--build-arg"):
        build.add_argument(name, action="append", default=[])
    build.add_argument("-t", dest="name")
    build.add_argument("folder")
    for name in ("-p", "-v", "-e"):
        run.add_argument(name, dest={"-p": "ports", "-v": "volumes", "-e": "variables"}[name], action="append", default=[])
    run.add_argument("image")
    run.add_argument("words", nargs="*")
    return parser


@pytest.mark.parametrize("command", [command for command in DOCKER if command.startswith("docker build")])
def test_image_can_be_asked_for(command: str) -> None:
    given = docker_parser().parse_args(shlex.split(command)[1:])
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")

    assert all(re.search(rf"^FROM .* AS {target}$", dockerfile, re.MULTILINE) for target in given.target)
    assert all(re.search(rf"^ARG {word.partition('=')[0]}=", dockerfile, re.MULTILINE) for word in given.build_arg)
    assert given.folder == "."


@pytest.mark.parametrize("command", [command for command in DOCKER if command.startswith("docker run")])
def test_container_finds_its_model(command: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = docker_parser().parse_args(shlex.split(command)[1:])
    built = [docker_parser().parse_args(shlex.split(line)[1:]).name for line in DOCKER if line.startswith("docker build")]
    (tmp_path / "conf").mkdir()
    (file,) = (block.text for block in BLOCKS if block.kind == "properties" and "engine=Python" in block.text)
    (tmp_path / "conf" / "serving.properties").write_text(here(file, models))
    volumes = dict(reversed(volume.split(":")) for volume in given.volumes)
    mounted = volumes.get("/opt/ml/model", "")
    store = tmp_path / "conf" if mounted == "/models/conf" else models / "my-llama" if mounted else tmp_path / "store"
    store.mkdir(exist_ok=True)
    monkeypatch.setattr(load_models, "DEFAULT_STORE", store)
    environ = {word.partition("=")[0]: here(word, models).partition("=")[2] for word in given.variables}
    environ = {name: value.replace("/opt/ml/model", str(store)) for name, value in environ.items()}

    (model,) = properties.load(None, environ).models

    assert model.engine_config().model == str(models / "my-llama")
    assert given.image in built
    assert (given.ports, given.words) in ((["8080:8080"], []), (["8080:8080"], ["serve"]))


@pytest.mark.parametrize("command", EXPLAINS)
def test_explain_tells(command: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(here(command, models))

    assert cli.main(words[1:]) == 0
    assert "option.model_id" in capsys.readouterr().out


@pytest.mark.parametrize("command", CURLS)
def test_request_is_answered(command: str, models: Path, server: Server) -> None:
    status, body = ask(command, models, server)

    assert body, command
    assert status in (200, 202) or any(asked == command and '"code": 4' in answer for asked, answer in ANSWERED), body


@pytest.mark.parametrize(("command", "answer"), ANSWERED)
def test_answer_has_the_shape_that_is_shown(command: str, answer: str, models: Path, server: Server) -> None:
    _, body = ask(command, models, server)

    assert shape(json.loads(body)) == shape(json.loads(answer))


@pytest.mark.parametrize("text", of_kind("python"))
def test_program_prints_an_answer(text: str, models: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    code = here(text, models, server.url)

    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})

    assert capsys.readouterr().out


def test_every_parameter_is_told() -> None:
    assert [name for name in {**LMI, **LMI_ONLY} if f"`{name}`" not in README] == []


def test_options_have_their_defaults_and_meanings() -> None:
    example = (ROOT / "serving.properties.example").read_text(encoding="ascii")
    rows = re.findall(r"^\| `((?:option\.|SERVING_)?\w+)` \| (.*?) \| (.*?) \|$", README, re.MULTILINE)

    assert len(rows) > 10
    for name, default, meaning in rows:
        assert f"# {meaning} (default: {default})\n#{name}=" in example, name


def test_error_that_is_shown_is_the_very_one(models: Path, server: Server) -> None:
    ((command, answer),) = [(asked, answer) for asked, answer in ANSWERED if '"error"' in answer]

    assert json.loads(ask(command, models, server)[1]) == json.loads(answer)
