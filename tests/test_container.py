"""Dockerfile, read and not run (there is no docker where these tests run): what it copies, calls and sets is there and fits."""

import fnmatch
import importlib.util
import re
import shlex
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PREFIX = "/opt/lmi-dist"


@dataclass
class Stage:
    """One FROM and what follows it: (instruction, its words as they stand)."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def of(self, instruction: str) -> list[str]:
        return [words for kind, words in self.steps if kind == instruction]

    @property
    def variables(self) -> dict[str, str]:
        return dict(word.split("=", 1) for words in self.of("ENV") for word in shlex.split(words))


def read() -> tuple[dict[str, str], dict[str, Stage]]:
    """The arguments before the first stage, and the stages by name."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in text.replace("\\\n", " ").splitlines():
        kind, _, words = line.strip().partition(" ")
        if kind == "FROM":
            base, _, name = words.partition(" AS ")
            stage = stages[name] = Stage(base, name)
        elif kind == "ARG" and not stages:
            name, _, default = words.partition("=")
            arguments[name] = default
        elif kind:
            stage.steps.append((kind, words.strip()))
    return arguments, stages


ARGUMENTS, STAGES = read()


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path of the tree through; its last line that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if any(fnmatch.fnmatch(part, pattern) for part in (path, *map(str, Path(path).parents), Path(path).name)):
            sent = line.startswith("!")
    return sent


def test_both_targets_are_there_and_the_standalone_is_what_a_plain_build_gives():
    assert set(STAGES) == {"djl-build", "djl", "build", "standalone"}
    assert list(STAGES)[-1] == "standalone"


def test_bases_are_images_by_name_with_a_version_to_choose():
    assert {STAGES[name].base for name in ("djl-build", "djl")} == {"deepjavalibrary/djl-serving:${DJL_VERSION}"}
    assert {STAGES[name].base for name in ("build", "standalone")} == {"python:${PYTHON}-slim"}
    assert {name for stage in STAGES.values() for name in re.findall(r"\$\{(\w+)\}", stage.base)} == set(ARGUMENTS)
    assert all(ARGUMENTS.values())


@pytest.mark.parametrize("name", STAGES)
def test_what_is_copied_is_there_and_sent(name):
    for words in STAGES[name].of("COPY"):
        *sources, _ = words.split()
        if sources[0].startswith("--from="):
            origin, *paths = sources
            made = " ".join(STAGES[origin.removeprefix("--from=")].of("RUN"))
            assert all(re.search(rf"(venv|virtualenv) {path}\b", made) for path in paths)
        else:
            assert [source for source in sources if not (ROOT / source).exists() or not is_sent(source)] == []


@pytest.mark.parametrize("name", ["djl-build", "build"])
def test_build_has_all_that_the_project_is_made_of(name):
    copied = {source for words in STAGES[name].of("COPY") for source in words.split()[:-1]}
    extra = re.search(r"pip install .*'\.\[(\w+)\]'", STAGES[name].of("RUN")[-1])[1]

    assert copied == {".ci/constraints.txt", "pyproject.toml", "README.md", "LICENSE", "kernels", "lmi_dist", "handlers"}
    assert extra in metadata.metadata("lmi-dist").get_all("Provides-Extra")


@pytest.mark.parametrize("name", ["djl", "standalone"])
def test_own_programs_go_first(name):
    assert STAGES[name].variables["PATH"] == f"{PREFIX}/bin:$PATH"


def test_djl_starts_our_python_with_our_entry_point():
    variables = STAGES["djl"].variables

    assert variables["PYTHON_EXECUTABLE"] == f"{PREFIX}/bin/python"
    module = variables["DJL_ENTRY_POINT"]
    assert importlib.util.find_spec(module) is not None
    assert hasattr(importlib.import_module(module), "handle")
    assert [kind for kind, _ in STAGES["djl"].steps] == ["COPY", "ENV"]  # DJL's own start, settings and user stay as they are


def test_standalone_starts_our_program():
    stage = STAGES["standalone"]

    assert stage.of("ENTRYPOINT") == ['["lmi-dist"]']
    assert [entry.value for entry in metadata.entry_points(group="console_scripts", name="lmi-dist")] == [
        "lmi_dist_handler.cli:main"
    ]
    assert (stage.of("CMD"), stage.of("EXPOSE"), stage.variables["SERVING_HOST"]) == (['["serve"]'], ["8080"], "0.0.0.0")
