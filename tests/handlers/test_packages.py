"""handlers/lmi_dist_handler/packages.py: what pip is asked for, and what becomes of its failures."""

import asyncio
import logging
import zipfile
from pathlib import Path

import pytest
from lmi_dist_handler import registry
from lmi_dist_handler.host import Turns
from lmi_dist_handler.packages import install, pip_arguments, requirements_of
from lmi_dist_handler.properties import load


def wheel(folder: Path, name: str) -> None:
    """A wheel with one module that says hello."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "hello = 'world'\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize(
    ("has_wheels", "offline", "expected"),
    [(False, False, []), (False, True, ["--no-deps"]), (True, False, ["-f", "W"]), (True, True, ["--no-index", "-f", "W"])],
)
def test_pip_is_asked_as_djl_asks_it(tmp_path: Path, has_wheels: bool, offline: bool, expected: list[str]) -> None:
    wheels = tmp_path / "requirements"
    if has_wheels:
        wheels.mkdir()

    arguments = pip_arguments(tmp_path / "requirements.txt", offline=offline)

    assert arguments[:6] == ["-m", "pip", "-q", "install", "-r", str(tmp_path / "requirements.txt")]
    assert [argument.replace(str(wheels), "W") for argument in arguments[6:]] == expected


def test_requirements_are_installed_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wheel(tmp_path / "requirements", "tiny_hello")
    (tmp_path / "requirements.txt").write_text("tiny_hello==1.0\n")
    (tmp_path / "serving.properties").write_text("option.model_id=m\n")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "target"))  # not into the environment that runs the tests
    environ = {"SERVING_INSTALL_REQUIREMENTS": "true", "SERVING_OFFLINE": "true"}
    settings = load(tmp_path, environ)

    async def main() -> None:
        host = registry.serve_model(settings.models[0], settings.server, Turns()).host
        assert host._prepare is not None
        await host._prepare()

    asyncio.run(main())

    assert (tmp_path / "target" / "tiny_hello.py").read_text() == "hello = 'world'\n"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_requirements_are_left_alone_without_leave(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "requirements.txt").write_text("tiny_hello\n")
    (tmp_path / "serving.properties").write_text("option.model_id=m\n")
    settings = load(tmp_path, {})

    async def main() -> None:
        assert registry.serve_model(settings.models[0], settings.server, Turns()).host._prepare is None

    asyncio.run(main())

    path = tmp_path / "requirements.txt"
    assert caplog.messages == [f"{path} is not installed; SERVING_INSTALL_REQUIREMENTS=true has pip do so before the model loads"]


def test_failing_pip_is_told_and_loading_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements.txt").write_text("no-such-package\n")

    asyncio.run(install(tmp_path / "requirements.txt", offline=True, timeout_s=60))

    assert "requirements.txt: pip failed: " in caplog.text
    assert "no-such-package" in caplog.text


def test_endless_pip_is_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "requirements.txt").write_text("")

    asyncio.run(install(tmp_path / "requirements.txt", offline=True, timeout_s=0.01))

    assert "pip was not done within model_loading_timeout=0.01 s; going on without" in caplog.text


def test_folder_without_requirements_has_none(tmp_path: Path) -> None:
    assert requirements_of(tmp_path) is None
    assert requirements_of(None) is None
