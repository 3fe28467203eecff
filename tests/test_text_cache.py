"""The cache gives back what was built, notices damage, and never stands in the way."""

from pathlib import Path

import pytest

from workbench.text.cache import Cache, default_folder


def test_kept_by_key(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "folder")
    assert cache.fetch("thing one", lambda: b"1") == b"1"
    assert cache.fetch("thing one", lambda: b"other") == b"1"
    assert cache.fetch("thing two", lambda: b"2") == b"2"
    assert sorted(path.name for path in cache.folder.iterdir()) == sorted(
        cache.path(key).name for key in ("thing one", "thing two")
    )


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:40] + b"x" + b[41:], lambda b: b"", lambda b: b[:10]]
)
def test_damage_is_noticed_and_mended(tmp_path: Path, damage) -> None:
    cache = Cache(tmp_path)
    content = bytes(range(100))
    cache.fetch("thing", lambda: content)
    path = cache.path("thing")
    path.write_bytes(damage(path.read_bytes()))
    assert cache.fetch("thing", lambda: content) == content
    assert cache.fetch("thing", lambda: b"not asked") == content


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Cache(tmp_path).fetch("thing", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="it is built again next time"):
        assert Cache(tmp_path / "file").fetch("thing", lambda: b"1") == b"1"


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "moe-workbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == Path.home() / ".cache" / "moe-workbench"
