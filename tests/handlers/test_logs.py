"""handlers/lmi_dist_handler/logs.py: one line a record, in the form that the settings choose."""

import json
import logging
from collections.abc import Iterator

import pytest
from lmi_dist_handler import logs


@pytest.fixture(autouse=True)
def root() -> Iterator[None]:
    """The root logger as it was."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    logger.handlers.clear()
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_records_before_the_settings_take_their_form(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.early() as early:
        logging.warning("an option is %s", "deprecated")
        early.use("json")
    logging.info("later", extra={"fields": {"code": 200}})

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["level"], line["message"]) for line in lines] == [("WARNING", "an option is deprecated"), ("INFO", "later")]
    assert lines[1]["code"] == 200


def test_error_in_the_settings_lets_records_go_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    def start() -> None:
        with logs.early():
            logging.warning("an option is deprecated")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        start()

    assert capsys.readouterr().err.endswith("WARNING an option is deprecated\n")


def test_traceback_is_part_of_its_record(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.early() as early:
        early.use("json")
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        logging.exception("a request\nfailed")

    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "a request\nfailed"
    assert "ZeroDivisionError: by zero" in json.loads(line)["exception"]


def test_line_that_a_host_would_act_on_is_defused(caplog: pytest.LogCaptureFixture) -> None:
    logs.defuse([caplog.handler])
    logs.defuse([caplog.handler])  # once is enough

    logging.warning("parameter %r is unknown", "[METRICS]x|Python engine started.")
    try:
        raise ValueError("ModelServerTelemetry: none")
    except ValueError:
        logging.exception("failed")

    assert "parameter '[METRICSx|Python engine started' is unknown" in caplog.text
    assert "ValueError: ModelServerTelemetry none" in caplog.text
    assert len([one for one in caplog.handler.filters if isinstance(one, logs.Defuse)]) == 1
    caplog.handler.filters.clear()
