"""Run names, and listing, renaming and deleting runs."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench import record


def new_run(folder: Path) -> record.RunWriter:
    return record.RunWriter.create(
        folder,
        recipe_json="{}",
        seed=1,
        total_steps=10,
        text_fingerprint="f",
        layer_names=("a",),
        num_experts=2,
        hardware={},
    )


BAD_PATHS = ["", ".", "..", "../x", "a/b", "/abs", "a\\b", "a\0b", ".hidden", "a:b", "-rf", "a b", "a\n", "a."]
BAD_NAMES = ["CON", "con.txt", "lpt1", "COM¹", "x" * 121, "\ud800"]


@pytest.mark.parametrize("name", BAD_PATHS + BAD_NAMES, ids=ascii)
def test_a_bad_name_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="run name") as refused:
        record.validate_name(tmp_path, name)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError):
        record.rename(tmp_path, name, "fine")
    with pytest.raises(ValueError):
        record.delete(tmp_path, name)


@given(name=st.one_of(st.text(), st.text("./\\ab\0:*", max_size=6), st.from_regex(r"(?i)(con|nul|com1)(\.x)?")))
def test_an_allowed_name_is_one_folder_below_the_root(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.getbasetemp()
    try:
        path = record.validate_name(root, name)
    except ValueError as refused:
        assert str(refused)
        return
    assert path.parent == root
    assert path.name == name
    assert path.resolve().parent == root.resolve()
    assert not name.startswith(".") and not name.endswith(".")
    assert name.split(".")[0].lower() not in ("con", "nul", "com1")


@pytest.mark.parametrize("name", ["toy_v3-001", "a", "Größe.2", "0"])
def test_ordinary_names_are_allowed(tmp_path: Path, name: str) -> None:
    assert record.validate_name(tmp_path, name) == tmp_path / name


def test_an_existing_or_linked_name_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "there").mkdir(parents=True)
    outside.mkdir()
    (root / "out").symlink_to(outside)
    (root / "dangling").symlink_to(root / "nowhere")
    for name, reason in [("there", "exists already"), ("out", "leads out"), ("dangling", "exists already")]:
        with pytest.raises(ValueError, match=reason):
            record.validate_name(root, name)


def test_fresh_folder_counts_on(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert record.fresh_folder(root, "toy") == root / "toy-001"
    for taken in ("toy-001", "toy-003", "toy-x", "other-007"):
        (root / taken).mkdir(parents=True)
    assert record.fresh_folder(root, "toy") == root / "toy-004"
    (root / "toy-999").mkdir()
    assert record.fresh_folder(root, "toy").name == "toy-1000"
    with pytest.raises(ValueError, match="not allowed"):
        record.fresh_folder(root, "../toy")


def test_list_rename_delete(tmp_path: Path) -> None:
    assert record.runs(tmp_path / "none") == []
    for name in ("b", "a"):
        new_run(tmp_path / name).close()
    (tmp_path / "no-run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = record.runs(tmp_path)
    assert [run.name for run in found] == ["b", "a"]
    assert found[0].status == "stopped"
    assert (found[0].step, found[0].total_steps) == (0, 10)
    assert found[0].disk_bytes == sum(p.stat().st_size for p in (tmp_path / "b").rglob("*") if p.is_file())

    record.rename(tmp_path, "b", "c")
    assert record.Tail(tmp_path / "c").snapshot().name == "c"
    record.RunWriter.reopen(tmp_path / "c", 0).close()
    with pytest.raises(ValueError, match="exists already"):
        record.rename(tmp_path, "c", "a")
    with pytest.raises(ValueError, match="there is no run 'b'"):
        record.rename(tmp_path, "b", "d")

    record.delete(tmp_path, "c")
    with pytest.raises(ValueError, match="there is no run 'c'"):
        record.delete(tmp_path, "c")
    assert [run.name for run in record.runs(tmp_path)] == ["a"]
    assert not list(tmp_path.glob(".*"))


def test_a_running_run_is_neither_renamed_nor_deleted(tmp_path: Path) -> None:
    with new_run(tmp_path / "live") as writer:
        writer.status("running")
        assert record.runs(tmp_path)[0].status == "running"
        with pytest.raises(ValueError, match="being written"):
            record.rename(tmp_path, "live", "other")
        with pytest.raises(ValueError, match="being written"):
            record.delete(tmp_path, "live")
    record.delete(tmp_path, "live")


def test_links_are_never_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    new_run(outside / "precious").close()
    new_run(root / "inner").close()
    (root / "alias").symlink_to(root / "inner")
    (root / "evil").symlink_to(outside / "precious")
    for name in ("alias", "evil"):
        for act in (lambda name=name: record.delete(root, name), lambda name=name: record.rename(root, name, "x")):
            with pytest.raises(ValueError, match="link"):
                act()
    (root / "inner" / "arrays" / "away").symlink_to(outside)
    record.delete(root, "inner")
    assert (outside / "precious" / "recipe.json").is_file()


def test_a_run_of_another_version_or_damaged_is_listed_and_refused(tmp_path: Path) -> None:
    new_run(tmp_path / "old").close()
    with sqlite3.connect(tmp_path / "old" / "run.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    connection.close()
    new_run(tmp_path / "torn").close()
    os.truncate(tmp_path / "torn" / "run.sqlite", 5000)
    assert {run.name: run.status for run in record.runs(tmp_path)} == {"old": "unreadable", "torn": "unreadable"}
    with pytest.raises(ValueError, match="schema_version 99; this version of the workbench reads 1"):
        record.Tail(tmp_path / "old")
    with pytest.raises(ValueError, match="cannot be read as a run database"):
        record.Tail(tmp_path / "torn")
    with pytest.raises(ValueError, match="not a run folder"):
        record.open_source(tmp_path)


def test_what_a_killed_create_left_is_swept_when_old(tmp_path: Path) -> None:
    old, young = tmp_path / ".creating-old", tmp_path / ".creating-young"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    new_run(tmp_path / "run").close()
    assert not old.exists()
    assert young.exists()
