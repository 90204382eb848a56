"""config.properties, SERVING_* and the command line: order, addresses, refusals."""

from pathlib import Path

import pytest
from lmi_dist_handler.server_words import server_words
from lmi_dist_handler.words import environment_words

from lmi_dist import ConfigError


def values(environ: dict[str, str], arguments: dict[str, str] | None = None) -> dict[str, str]:
    return {key: word.value for key, word in server_words(environment_words(environ), arguments or {}).items()}


def config_file(tmp_path: Path, text: str) -> dict[str, str]:
    """Variables under which a server finds this config.properties."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.properties").write_text(text)
    return {"MODEL_SERVER_HOME": str(tmp_path)}


def test_container_file_is_read(tmp_path: Path) -> None:
    text = (
        "inference_address=http://0.0.0.0:8080\nmanagement_address=http://0.0.0.0:8080\ncluster_address=http://0.0.0.0:8888\n"
        "model_store=/opt/ml/model\nload_models=ALL\n#model_url_pattern=.*\n"
    )

    found = values(config_file(tmp_path, text))

    assert (found["host"], found["port"], found["load_models"]) == ("0.0.0.0", "8080", "ALL")


def test_command_line_beats_variable_beats_file(tmp_path: Path) -> None:
    environ = {
        **config_file(tmp_path, "job_queue_size=1\nmax_request_size=1\nchunked_read_timeout=1\n"),
        "SERVING_JOB_QUEUE_SIZE": "2",
    }
    environ["SERVING_MAX_REQUEST_SIZE"] = "2"

    found = values(environ, {"max_request_size": "3"})

    assert (found["chunked_read_timeout"], found["job_queue_size"], found["max_request_size"]) == ("1", "2", "3")


def test_port_beats_the_address_beside_it() -> None:
    assert values({"SERVING_INFERENCE_ADDRESS": "http://0.0.0.0:80", "SERVING_PORT": "90"})["port"] == "90"


def test_config_file_of_the_command_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.properties"
    path.write_text("job_queue_size=9\n")

    assert values({}, {"config_file": str(path)})["job_queue_size"] == "9"


@pytest.mark.parametrize("address", ["unix:/tmp/x", "https://0.0.0.0:443", "8080", "http://h:port"])
def test_bad_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"SERVING_INFERENCE_ADDRESS='.*' must look like http://127\.0\.0\.1:8080"):
        values({"SERVING_INFERENCE_ADDRESS": address})


def test_second_port_is_refused() -> None:
    environ = {"SERVING_INFERENCE_ADDRESS": "http://h:1", "SERVING_MANAGEMENT_ADDRESS": "http://h:2"}

    with pytest.raises(ConfigError, match="another address than inference_address is known but not built yet"):
        values(environ)


def test_tls_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="SERVING_KEYSTORE='k' is known but not built yet"):
        values({"SERVING_KEYSTORE": "k"})


def test_misspelt_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.properties:1: job_queue_sise is unknown; did you mean job_queue_size\?"):
        values(config_file(tmp_path, "job_queue_sise=1\n"))


def test_misspelt_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"command line: prt is unknown; did you mean port\?"):
        values({}, {"prt": "1"})


def test_misspelt_variable_only_warns(caplog: pytest.LogCaptureFixture) -> None:
    assert values({"SERVING_PROT": "1", "SERVING_FEATURES": "lmi-dist"}) == {}

    assert caplog.messages == ["ignored: SERVING_PROT is unknown; did you mean SERVING_PORT?"]


def test_payload_in_megabytes_is_translated() -> None:
    assert values({"SAGEMAKER_MAX_PAYLOAD_IN_MB": "6"})["max_request_size"] == str(6 * 1024 * 1024)
