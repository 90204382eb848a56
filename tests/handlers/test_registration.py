"""handlers/lmi_dist_handler/registration.py: whatever a client writes, it gets a model of the store or a sentence."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmi_dist_handler.registration import PARAMETERS, confined, registration, store_of

from lmi_dist import ConfigError

PIECES = st.sampled_from(("..", ".", "/", "//", "~", "$HOME", "%2e%2e", "\0", "inside", "link", "s3://", "file://", "\udce9", "é"))
URLS = st.lists(PIECES, max_size=6).map("/".join) | st.text(max_size=20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a folder in it, and a link that leads out of it."""
    folder = tmp_path_factory.mktemp("registration")
    (folder / "store" / "inside").mkdir(parents=True)
    (folder / "outside").mkdir()
    (folder / "store" / "link").symlink_to(folder / "outside")
    return folder / "store"


@given(url=URLS)
@settings(max_examples=300)
def test_no_url_leaves_the_store(store: Path, url: str) -> None:
    with contextlib.suppress(ConfigError):  # a sentence is as good an answer
        path = confined(url, store, any_url=False)
        assert Path(path).resolve().is_relative_to(store.resolve())
        assert Path(path).is_dir()


@given(parameters=st.dictionaries(st.sampled_from(PARAMETERS) | st.text(max_size=8), URLS, max_size=5))
@settings(max_examples=300)
def test_parameters_give_a_model_or_a_sentence(store: Path, parameters: dict[str, str]) -> None:
    with contextlib.suppress(ConfigError):
        entry, words = registration({"url": "inside", **parameters}, store, any_url=True)
        assert entry.url
        assert {word.origin for word in words.values()} <= {"POST /models"}


def test_unset_store_is_sagemakers_folder_if_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lmi_dist_handler.registration.DEFAULT_STORE", tmp_path)

    assert store_of(None) == tmp_path
    assert store_of("/models") == Path("/models")
    monkeypatch.setattr("lmi_dist_handler.registration.DEFAULT_STORE", tmp_path / "missing")
    assert store_of(None) is None
