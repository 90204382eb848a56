import pytest
from lmi_dist_handler.cache import complete_folder


def test_folder_appears_when_complete(tmp_path):
    with complete_folder(tmp_path / "cache" / "model") as unfinished:
        (unfinished / "config.json").write_text("{}")
        assert not (tmp_path / "cache" / "model").exists()

    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]
    assert (tmp_path / "cache" / "model" / "config.json").read_text() == "{}"


def interrupted(folder, interruption):
    with complete_folder(folder) as unfinished:
        (unfinished / "config.json").write_text("{}")
        raise interruption


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OSError])
def test_interrupted_folder_vanishes(tmp_path, interruption):
    with pytest.raises(interruption):
        interrupted(tmp_path / "model", interruption)

    assert list(tmp_path.iterdir()) == []
