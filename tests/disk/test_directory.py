"""Directories appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from wara_peft.disk.directory import written_at_once


def write(path, text="new", **options):
    with written_at_once(path, **options) as directory:
        assert directory.parent == path.parent
        (directory / "file").write_text(text)


def names(path):
    return sorted(item.name for item in path.iterdir())


def test_a_new_directory_with_new_parents(tmp_path):
    write(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "file").read_text() == "new"
    assert names(tmp_path / "a" / "b") == ["c"]


def test_permissions_are_those_of_any_new_directory(tmp_path):
    (tmp_path / "plain").mkdir()
    write(tmp_path / "written")
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("existing", ["refuse", "replace", "update"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, existing, error):
    old = tmp_path / "old"
    if existing != "refuse":
        write(old, "old")
    for path in (old, tmp_path / "a" / "b"):
        with pytest.raises(error), written_at_once(path, existing) as directory:
            (directory / "file").write_text("half")
            raise error
    assert names(tmp_path) == (["old"] if existing != "refuse" else [])
    if existing != "refuse":
        assert (old / "file").read_text() == "old"


def test_what_is_there_is_refused(tmp_path):
    write(tmp_path / "old", "old")
    with pytest.raises(ValueError, match="exists already; name another directory, or overwrite it"):
        write(tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "old"


@pytest.mark.parametrize("existing", ["refuse", "replace", "update"])
def test_a_file_is_refused(tmp_path, existing):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; name a directory"):
        write(tmp_path / "file", existing=existing)
    assert names(tmp_path) == ["file"]


def test_replace_leaves_no_old_file(tmp_path):
    write(tmp_path / "old", "old")
    (tmp_path / "old" / "other").write_text("old")
    write(tmp_path / "old", existing="replace")
    assert names(tmp_path / "old") == ["file"]
    assert (tmp_path / "old" / "file").read_text() == "new"
    assert names(tmp_path) == ["old"]


def test_update_leaves_other_files(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "other").write_text("mine")
    (tmp_path / "old" / "file").write_text("old")
    write(tmp_path / "old", existing="update")
    assert (tmp_path / "old" / "other").read_text() == "mine"
    assert (tmp_path / "old" / "file").read_text() == "new"
    assert names(tmp_path) == ["old"]


def test_a_failing_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    write(tmp_path / "old", "old")
    rename = os.rename
    calls = []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "old", existing="replace")
    assert (tmp_path / "old" / "file").read_text() == "old"
    assert names(tmp_path) == ["old"]


def test_inputs_are_not_replaced(tmp_path, monkeypatch):
    write(tmp_path / "model", "old")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for path in (tmp_path / "model", tmp_path, tmp_path / "link"):
        with pytest.raises(ValueError, match="must not be replaced"):
            write(path, existing="replace", inputs=[tmp_path / "model"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must not be replaced"):
        write(tmp_path, existing="replace")
    assert (tmp_path / "model" / "file").read_text() == "old"
