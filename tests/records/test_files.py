"""Folders that their owner alone replaces, whole, and CSV for spreadsheets."""

import ast
import csv
import errno
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vitnb.errors import UserError
from vitnb.records import files
from vitnb.records.files import (
    MARKER,
    check_new_folder,
    escape_formula,
    new_folder,
    write_csv,
    write_file,
)
from vitnb.study import ROOT


def put(final: Path, content: str, what: str = "tests", **options) -> None:
    with new_folder(final, what, **options) as part:
        (part / "file").write_text(content)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Killed(BaseException):
    """The end of a process: nothing after it is done."""


def kill_at(monkeypatch, number: int) -> None:
    """Let the process end at a renaming of a folder; 1: at the first.

    What it would do on its way out, a killed process does not do.
    """
    rename, renamed = Path.rename, []

    def counted(path, to):
        renamed.append(to)
        if len(renamed) >= number:
            raise Killed
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", counted)
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)


def test_a_new_folder_is_whole_and_for_everyone(tmp_path):
    """A folder that breaks off leaves the old one; others may read the new one."""
    final = tmp_path / "checkpoint"
    for content in ("old", "new"):
        put(final, content)
    with pytest.raises(KeyboardInterrupt), new_folder(final, "tests") as part:
        (part / "file").write_text("half")
        raise KeyboardInterrupt
    assert (final / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [final]
    assert final.stat().st_mode & 0o777 == 0o755


def test_the_marker_says_what_a_folder_is_and_who_made_it(tmp_path):
    put(tmp_path / "a", "x", "checkpoints")
    (line,) = (tmp_path / "a" / MARKER).read_text().splitlines()
    assert json.loads(line) == {"what": "checkpoints", "by": "vitnb"}


@pytest.mark.parametrize(
    ("left", "marker"),
    [
        ("thesis.tex", None),
        ("file", None),
        ("thesis.tex", '{"what": "other", "by": "vitnb"}'),
        ("thesis.tex", '{"what": "tests", "by": "me"}'),
        ("thesis.tex", "tests"),
        (None, '{"what": "other", "by": "vitnb"}'),
    ],
)
def test_what_is_not_its_own_stays(tmp_path, left, marker):
    final = tmp_path / "folder"
    final.mkdir()
    if left:
        (final / left).write_text("years of work")
    if marker:
        (final / MARKER).write_text(marker)
    before = names(final)
    with pytest.raises(UserError, match="move it away, or name another") as told:
        put(final, "new")
    assert str(final) in str(told.value) and (left or MARKER) in str(told.value)
    assert "\n" not in str(told.value)
    assert names(final) == before and names(tmp_path) == {"folder"}


def test_what_comes_while_the_new_one_is_made_stays(tmp_path):
    """The first check was an hour ago."""
    final = tmp_path / "folder"
    with pytest.raises(UserError, match="move it away"), new_folder(final, "tests"):
        final.mkdir()
        (final / "thesis.tex").write_text("years of work")
    assert names(final) == {"thesis.tex"} and names(tmp_path) == {"folder"}


def test_a_file_in_its_place_stays(tmp_path):
    (tmp_path / "folder").write_text("mine")
    with pytest.raises(UserError, match="move it away"):
        put(tmp_path / "folder", "new")
    assert (tmp_path / "folder").read_text() == "mine"


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "folder").mkdir()
    put(tmp_path / "folder", "new")
    assert names(tmp_path / "folder") == {"file", MARKER}


def test_a_folder_of_an_older_version_is_its_own_if_one_says_so(tmp_path):
    final = tmp_path / "folder"
    final.mkdir()
    (final / "old").write_text("old")
    with pytest.raises(UserError):
        put(final, "new", is_own=lambda folder: names(folder) == {"other"})
    put(final, "new", is_own=lambda folder: names(folder) == {"old"})
    assert names(final) == {"file", MARKER} and names(tmp_path) == {"folder"}


def test_a_link_leads_to_the_folder(tmp_path):
    put(tmp_path / "disk" / "folder", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    put(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "folder" / "file").read_text() == "new"


@pytest.mark.parametrize("source", ["folder", "folder/inner", "."])
def test_a_folder_and_what_it_is_made_from_lie_apart(tmp_path, source):
    put(tmp_path / "folder", "old")
    (tmp_path / "folder" / "inner").mkdir()
    with pytest.raises(UserError, match="one lies in the other: name another folder"):
        put(tmp_path / "folder", "new", reads=[tmp_path / source])
    assert (tmp_path / "folder" / "file").read_text() == "old"
    put(tmp_path / "folder", "new", reads=[tmp_path / "folder2"])


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_loses_neither_folder(tmp_path, monkeypatch, number):
    """Killed before the old folder is set aside, and before the new one is in place.

    The next call finds the old one again, whatever it is going to do.
    """
    final = tmp_path / "folder"
    put(final, "old")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, number)
        # What puts the old one back in a living process fails as well.
        put(final, "new")
    contents = {path.read_text() for path in tmp_path.rglob("file")}
    assert contents == {"old", "new"}, "nothing is lost"
    assert final.exists() == (number == 1)
    with pytest.raises(KeyboardInterrupt), new_folder(final, "tests"):
        assert (final / "file").read_text() == "old"
        raise KeyboardInterrupt
    assert (final / "file").read_text() == "old"
    put(final, "newer")
    assert (final / "file").read_text() == "newer"


def test_a_kill_while_the_old_folder_is_deleted(tmp_path, monkeypatch):
    final = tmp_path / "folder"
    put(final, "old")

    def killed(folder):
        (folder / "file").unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files, "_delete", killed)
        put(final, "new")
    assert (final / "file").read_text() == "new" and len(names(tmp_path)) == 2
    # Half of the old folder is never put back.
    files.shutil.rmtree(final)
    with pytest.raises(KeyboardInterrupt), new_folder(final, "tests"):
        assert not final.exists()
        raise KeyboardInterrupt
    put(final, "newer")
    assert names(tmp_path) == {"folder"} and names(final) == {"file", MARKER}


def test_a_living_process_puts_the_old_folder_back(tmp_path, monkeypatch):
    final, rename = tmp_path / "folder", Path.rename
    put(final, "old")

    def broken(path, to):
        if to == final and "vitnb-old" not in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(UserError, match=r"cannot write .*: Input/output error"):
        put(final, "new")
    assert (final / "file").read_text() == "old" and names(tmp_path) == {"folder"}


def test_what_looks_set_aside_and_is_not_its_own_stays(tmp_path):
    aside = tmp_path / ".folder.vitnb-old"
    aside.mkdir()
    (aside / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="in the way: move it away"):
        put(tmp_path / "folder", "new")
    assert names(aside) == {"thesis.tex"}


@pytest.mark.parametrize("make", [put, lambda final, _: write_file(final / "x", "y")])
def test_a_file_in_place_of_a_folder_is_told_in_one_line(tmp_path, make):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*: move away") as told:
        make(tmp_path / "file" / "deep" / "folder", "new")
    assert "\n" not in str(told.value) and "VITNB_OUTPUTS" in str(told.value)
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EROFS, "writable"),
        (errno.EACCES, "writable"),
    ],
)
def test_a_disk_that_takes_no_more_leaves_the_old_ones(
    tmp_path, monkeypatch, number, fix
):
    put(tmp_path / "folder", "old")
    write_file(tmp_path / "table.csv", "old")

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", full)
    told = rf"cannot write .*table.csv: {os.strerror(number)}: .*{fix}"
    with pytest.raises(UserError, match=told):
        write_file(tmp_path / "table.csv", "new")
    with pytest.raises(UserError, match=rf"cannot write .*folder.*{fix}"):
        put(tmp_path / "folder", "new")
    assert names(tmp_path) == {"folder", "table.csv"}
    assert (tmp_path / "table.csv").read_text() == "old"
    assert (tmp_path / "folder" / "file").read_text() == "old"


def test_a_full_disk_inside_the_block_is_told_in_one_line(tmp_path):
    with (
        pytest.raises(UserError, match=r"cannot write .*: make room"),
        new_folder(tmp_path / "deep" / "folder", "tests"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == set(), "folders on the way are removed as well"


def test_a_check_writes_nothing(tmp_path):
    check_new_folder(tmp_path / "deep" / "folder", "tests")
    assert names(tmp_path) == set()


# --- CSV ---

FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1")
WHOLE = ("plain", "a$b", "a,b", 'a"b', "a\nb", "a\rb", "'quoted", "Blüte 花", "")


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_begins_like_a_formula(tmp_path, text):
    table = pd.DataFrame({text: [text, 1.5, None], "n": [-1, 0, 2]})
    write_csv(tmp_path / "t.csv", table)
    with (tmp_path / "t.csv").open(newline="") as file:
        (head, *_), first, *_ = csv.reader(file)
    assert head == first[0] == f"'{text}" and first[1] == "-1"


@pytest.mark.parametrize("text", WHOLE)
def test_other_names_arrive_whole(tmp_path, text):
    write_csv(tmp_path / "t.csv", pd.DataFrame({"name": [text, "x"], "n": [1, 2]}))
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["name", "n"], [text, "1"], ["x", "2"]]


def test_numbers_stay_numbers(tmp_path):
    """Also where they are text, and in a column of both."""
    rows = [(-1.5, "-1.5", "-1"), (float("nan"), "+3e-05", 2), (1e-300, "x", True)]
    table = pd.DataFrame(rows, columns=["a", "b", "c"])
    write_csv(tmp_path / "t.csv", table)
    found = (tmp_path / "t.csv").read_text()
    assert found == "a,b,c\n-1.5,-1.5,-1\n,+3e-05,2\n1e-300,x,True\n"
    assert escape_formula(-1) == -1 and escape_formula(None) is None
    assert table.loc[0, "b"] == "-1.5", "the caller's table stays as it is"


def test_a_table_without_text_is_as_pandas_writes_it(tmp_path):
    table = pd.DataFrame(np.random.RandomState(0).randn(20, 3), columns=list("abc"))
    write_csv(tmp_path / "t.csv", table)
    assert (tmp_path / "t.csv").read_text() == table.to_csv(
        index=False, lineterminator="\n"
    )


def test_every_table_is_written_by_one_function():
    """Whoever else writes CSV would have to escape formulas, too."""
    writers = {}
    for path in (ROOT / "vitnb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", "")
            if name == "to_csv" or name in ("DictWriter", "writer"):
                writers.setdefault(path.name, set()).add(name)
    assert writers.pop("files.py") == {"to_csv"}
    assert writers.pop("case.py", {"to_csv"}) == {"to_csv"}  # of a hash, in no file
    # It copies tables that were written by that function.
    assert writers.pop("publication.py", {"writer"}) == {"writer"}
    assert writers == {}
