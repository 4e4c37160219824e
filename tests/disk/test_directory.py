"""Directories appear whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from wara_peft.disk.checkpoints import directory
from wara_peft.disk.checkpoints.directory import file_written_at_once, written_at_once


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
    rename = Path.rename
    calls = []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "old", existing="replace")
    assert (tmp_path / "old" / "file").read_text() == "old"
    assert names(tmp_path) == ["old"]


def test_an_empty_directory_is_taken_over(tmp_path):
    """A killed run leaves one."""
    (tmp_path / "new").mkdir()
    write(tmp_path / "new")
    assert names(tmp_path / "new") == ["file"]


@pytest.mark.parametrize("existing", ["refuse", "replace", "update"])
def test_of_two_writers_one_does(tmp_path, existing):
    with written_at_once(tmp_path / "new", existing) as directory:
        (directory / "file").write_text("first")
        with pytest.raises(ValueError, match="is being written by another process"):
            write(tmp_path / "new", existing=existing)
    assert (tmp_path / "new" / "file").read_text() == "first"
    assert names(tmp_path) == ["new"]


def test_what_someone_else_writes_meanwhile_is_kept(tmp_path):
    def write_meanwhile():
        with written_at_once(tmp_path / "new") as directory:
            (directory / "file").write_text("ours")
            (tmp_path / "new" / "other").write_text("theirs")

    with pytest.raises(ValueError, match="was written by someone else meanwhile"):
        write_meanwhile()
    assert names(tmp_path) == ["new"]
    assert (tmp_path / "new" / "other").read_text() == "theirs"
    assert names(tmp_path / "new") == ["other"]


def killed(path, existing: str, then: str = "", writer: str = "written_at_once") -> None:
    """Write a directory or a file in a process of its own that is killed in the middle, or as soon as `then` says."""
    code = f"""
        import os, signal
        from pathlib import Path
        import runpy
        writer = runpy.run_path({directory.__file__!r})[{writer!r}]  # alone, it imports in no time

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        {then}
        with writer(Path({str(path)!r}), {existing!r}) as written:
            (written / "file" if written.is_dir() else written).write_text("half")
            {"" if then else "die()"}
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize("existing", ["refuse", "replace", "update"])
def test_what_a_killed_run_leaves_is_cleared_by_the_next(tmp_path, existing):
    if existing != "refuse":
        write(tmp_path / "out", "old")
    killed(tmp_path / "out", existing)
    assert len(names(tmp_path)) == 2
    write(tmp_path / "out", existing=existing)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_what_another_process_is_writing_is_not_cleared(tmp_path):
    """Even if its claim is gone."""
    with written_at_once(tmp_path / "out") as directory:
        (tmp_path / "out").rmdir()
        write(tmp_path / "out")
        assert directory.is_dir()
        (directory / "file").write_text("kept")
        (tmp_path / "out" / "file").unlink()
    assert (tmp_path / "out" / "file").read_text() == "kept"


def test_leftovers_of_other_names_stay(tmp_path):
    for name in (".out.0123.partial", ".other.01234567.partial", ".out.01234567.partial.more", ".out.0123456g.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.01234567.partial").write_text("a file")
    before = names(tmp_path)
    write(tmp_path / "out")
    assert names(tmp_path) == [*before, "out"]


def test_killed_between_the_renames_of_replacing(tmp_path):
    """The old directory stands beside its place; the next run puts it back."""
    write(tmp_path / "out", "old")
    killed(tmp_path / "out", "replace", "rename = Path.rename; Path.rename = lambda *a: (rename(*a), die())")
    assert "out" not in names(tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


@pytest.mark.parametrize("failing", range(5))
def test_update_is_all_or_nothing(tmp_path, monkeypatch, failing):
    """Whichever rename fails."""
    (tmp_path / "out").mkdir()
    for name in ("config", "weights", "other"):
        (tmp_path / "out" / name).write_text("old")
    rename, calls = Path.rename, []

    def fails_once(source, target):
        calls.append(source)
        if len(calls) - 1 == failing:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    try:
        with written_at_once(tmp_path / "out", "update") as directory:
            (directory / "config").write_text("new")
            (directory / "weights").write_text("new")
    except OSError:
        expected = "old"
    else:
        expected = "new"
    assert (expected == "new") == (failing == 4)
    texts = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert texts == {"config": expected, "weights": expected, "other": "old"}
    assert names(tmp_path) == ["out"]


def test_update_refuses_directories_in_the_place_of_files(tmp_path):
    (tmp_path / "out" / "file").mkdir(parents=True)
    (tmp_path / "out" / "a").write_text("old")

    def update():
        with written_at_once(tmp_path / "out", "update") as directory:
            (directory / "a").write_text("new")
            (directory / "file").write_text("new")

    with pytest.raises(ValueError, match="file' is a directory, where a file is to be written"):
        update()
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_inputs_are_not_updated(tmp_path):
    write(tmp_path / "model", "old")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(ValueError, match="must not be replaced"):
        write(tmp_path / "model", existing="update", inputs=[tmp_path / "link"])
    write(tmp_path, existing="update", inputs=[tmp_path / "model"])  # beside the input, which stays
    assert (tmp_path / "model" / "file").read_text() == "old"


def test_an_empty_working_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must not be replaced"):
        write(tmp_path)


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


def write_file(path, text="new", **options):
    with file_written_at_once(path, **options) as file:
        assert file.parent == path.parent and path.read_text() in ("", "old")
        file.write_text(text)


def test_a_new_file_with_new_parents(tmp_path):
    write_file(tmp_path / "a" / "b" / "file")
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"
    assert names(tmp_path / "a" / "b") == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_no_file_and_the_old_one(tmp_path, error):
    (tmp_path / "old").write_text("old")
    for path in (tmp_path / "old", tmp_path / "a" / "b"):
        with pytest.raises(error), file_written_at_once(path, "replace") as file:
            file.write_text("half")
            raise error
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_a_file_that_is_there_is_refused_or_replaced(tmp_path):
    (tmp_path / "old").write_text("old")
    with pytest.raises(ValueError, match="exists already; name another file, or overwrite it"):
        write_file(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
    write_file(tmp_path / "old", existing="replace")
    assert (tmp_path / "old").read_text() == "new"
    assert names(tmp_path) == ["old"]


def test_places_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path, options, message in (
        ("folder", {}, "is a directory; name a file"),
        ("file/inside", {}, "would lie in .*file', which is a file"),
        ("link", {"existing": "replace", "inputs": [tmp_path / "file"]}, "is read, and must not be replaced"),
    ):
        with pytest.raises(ValueError, match=message):
            write_file(tmp_path / path, **options)
    assert names(tmp_path) == ["file", "folder", "link"]


def test_two_writers_of_a_file(tmp_path):
    with file_written_at_once(tmp_path / "out") as file:
        with pytest.raises(ValueError, match="is being written by another process"):
            write_file(tmp_path / "out", existing="replace")
        file.write_text("first")
    assert (tmp_path / "out").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_what_a_killed_writer_of_a_file_leaves_is_cleared(tmp_path):
    killed(tmp_path / "out", "refuse", writer="file_written_at_once")
    assert len(names(tmp_path)) == 2 and not (tmp_path / "out").read_text()
    others = [".out.0123.partial", ".other.01234567.partial", ".out.01234567.old"]
    for name in others:
        (tmp_path / name).write_text("another's")
    write_file(tmp_path / "out")
    assert names(tmp_path) == sorted([*others, "out"])
    assert (tmp_path / "out").read_text() == "new"
