"""The planted bugs: the list is sound, and the table says of which code it speaks."""

import os
import re
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import mutants
import pandas as pd
import pytest

BUGS = mutants.read_bugs()


# --- The list ---


def find_faults(bug: dict) -> Iterator[str]:
    """Yield why a bug cannot be planted, or has no test."""
    if set(bug) != {"bug", "file", "old", "new", "test"}:
        yield f"keys {sorted(bug)}"
        return
    file, _, node = bug["test"].partition("::")
    for name in (bug["file"], file):
        if not (mutants.ROOT / name).is_file():
            yield f"no file {name}"
            return
    count = (mutants.ROOT / bug["file"]).read_text().count(bug["old"])
    if count != 1:
        yield f"{bug['file']} holds its text {count} times"
    if bug["old"] == bug["new"]:
        yield "changes nothing"
    function = node.partition("[")[0].split("::")[-1]
    if not re.search(rf"^ *def {function}\(", (mutants.ROOT / file).read_text(), re.M):
        yield f"no test {bug['test']}"


def test_every_bug_can_be_planted_and_has_a_test():
    """The old text stands once in its file, and the test's function is there."""
    faults = [
        f"{bug.get('bug')}: {fault}" for bug in BUGS for fault in find_faults(bug)
    ]
    assert not faults, "\n".join(faults)
    names = [bug["bug"] for bug in BUGS]
    assert len(set(names)) == len(names)


# --- The published table ---


def test_no_planted_bug_survived():
    """Each row has a bug, its test, a commit and a digest, and each bug one row.

    A bug without a row was not planted yet: a warning names it.
    """
    table = mutants.read_table()
    if new := sorted({bug["bug"] for bug in BUGS} - set(table.bug)):
        text = f"{len(new)} of {len(BUGS)} bugs were not planted yet: make mutants"
        warnings.warn(f"{text}: {'; '.join(new)}", stacklevel=1)
    assert list(pd.read_csv(mutants.RESULTS).columns) == list(mutants.COLUMNS)
    planted = set(table.bug)
    assert list(table.bug) == [bug["bug"] for bug in BUGS if bug["bug"] in planted]
    assert set(table.result) == {"caught"}
    assert all(mutants.COMMIT.fullmatch(commit) for commit in table.commit)
    assert all(re.fullmatch(r"[0-9a-f]{16}", code) for code in table.code)
    defects = sorted(
        int(bug.split()[1].strip(":")) for bug in table.bug if bug.startswith("defect ")
    )
    assert defects == list(range(1, 20)) and len(table) - len(defects) >= 20


def test_rows_of_older_code_are_named():
    """No failure: every edit makes rows older. But nobody shall overlook it."""
    if text := mutants.describe_older(mutants.read_table(), BUGS, mutants.ROOT):
        warnings.warn(text, stacklevel=1)


# --- The script, on a project of two files ---


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two bugs; ``planted`` lists the bugs that were planted."""
    root = tmp_path / "project"
    for name in ("code/a.py", "code/b.py", "tests/test_a.py", "tests/test_b.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    bugs = [
        {
            "bug": f"bug of {name}",
            "file": f"code/{name}.py",
            "old": "#",
            "new": "##",
            "test": f"tests/test_{name}.py::test_it",
        }
        for name in "ab"
    ]
    found = SimpleNamespace(root=root, bugs=bugs, table=tmp_path / "table.csv")
    found.planted, found.commit, found.result = [], "aaaaaaa", "caught"

    def plant(copy, bug):
        found.planted.append(bug["bug"])
        return found.result, ""

    monkeypatch.setattr(mutants, "ROOT", root)
    monkeypatch.setattr(mutants, "NEEDED", ("code", "tests"))
    monkeypatch.setattr(mutants, "plant", plant)
    monkeypatch.setattr(mutants, "find_unsound", lambda copy, tests: [])
    monkeypatch.setattr(mutants, "read_bugs", lambda: found.bugs)
    monkeypatch.setattr(mutants, "read_commit", lambda: found.commit)
    return found


def run(project, *words: str) -> tuple[list[str], pd.DataFrame, int]:
    """Return what the script planted, its table and its exit status."""
    project.planted.clear()
    with pytest.raises(SystemExit) as ended:
        mutants.main([*words, "--out", str(project.table), "--at-once", "1"])
    table = mutants.read_table(project.table)
    return list(project.planted), table, int(ended.value.code)


BOTH = ["bug of a", "bug of b"]


def test_only_what_is_new_or_changed_is_planted_again(project):
    planted, table, status = run(project)
    assert planted == BOTH == list(table.bug) and status == 0
    assert list(table.commit) == ["aaaaaaa"] * 2

    project.commit = "bbbbbbb"
    planted, same, _ = run(project)
    assert planted == [] and same.equals(table)

    (project.root / "code/b.py").write_text("# changed\n")
    planted, table, _ = run(project)
    assert planted == BOTH[1:] and list(table.commit) == ["aaaaaaa", "bbbbbbb"]

    project.commit = "ccccccc"
    project.bugs[0]["new"] = "# #"
    assert run(project)[0] == BOTH[:1]
    planted, table, _ = run(project, "of b")
    assert planted == BOTH[1:] and list(table.commit) == ["ccccccc"] * 2
    assert run(project, "--all")[0] == BOTH

    project.bugs.pop(0)  # nothing to plant, and a row without a bug
    planted, table, _ = run(project)
    assert planted == [] and list(table.bug) == BOTH[1:]


def test_what_was_not_caught_is_planted_again(project):
    project.result = "survived"
    _, table, status = run(project)
    assert list(table.result) == ["survived"] * 2 and status == 1
    project.result = "caught"
    planted, table, status = run(project)
    assert planted == BOTH and list(table.result) == ["caught"] * 2 and status == 0


def test_a_test_that_fails_without_the_bug_is_broken(project, monkeypatch):
    unsound = project.bugs[0]["test"]
    monkeypatch.setattr(
        mutants, "find_unsound", lambda _, tests: [unsound] if unsound in tests else []
    )
    planted, table, status = run(project)
    assert planted == BOTH[1:] and list(table.result) == ["broken", "caught"] and status


def test_an_interrupted_run_loses_no_row(project, monkeypatch):
    """The row of the bug that was planted then stays as it was; the one before is new.

    The killed test looks like one that did not run.
    """
    run(project)
    project.commit = "bbbbbbb"

    def plant(copy, bug):
        if bug["bug"] == BOTH[1]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # the test ends later than the signal comes
            return "broken", ""
        return "caught", ""

    monkeypatch.setattr(mutants, "plant", plant)
    with pytest.raises(KeyboardInterrupt):
        mutants.main(["--all", "--out", str(project.table), "--at-once", "1"])
    table = mutants.read_table(project.table)
    assert list(table.commit) == ["bbbbbbb", "aaaaaaa"]
    assert list(table.result) == ["caught"] * 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("change", ["file", "test", "patch", "table"])
def test_an_older_row_is_found(project, change):
    _, table, _ = run(project)
    assert mutants.describe_older(table, project.bugs, project.root) == ""
    if change == "file":
        (project.root / "code/b.py").write_text("# changed\n")
    elif change == "test":
        (project.root / "tests/test_b.py").unlink()
    elif change == "patch":
        project.bugs[1]["old"] = "# "
    else:
        table.loc[1, "code"] = table.code[0]
    text = mutants.describe_older(table, project.bugs, project.root)
    first, *named = text.split("\n- ")
    assert named == BOTH[1:]
    assert first == "1 of 2 rows of mutants.csv were caught in older code: make mutants"


# --- Commits ---


def test_a_commit_may_be_given_where_git_cannot_say_it(project, capsys):
    project.commit = None
    with pytest.raises(SystemExit, match="2"):
        mutants.main(["--out", str(project.table)])
    assert "add --commit SHA" in capsys.readouterr().err
    assert not project.table.exists() and not project.planted
    _, table, _ = run(project, "--commit", "1234567" + "0" * 33)
    assert list(table.commit) == ["1234567"] * 2  # text, not a number
    with pytest.raises(SystemExit, match="2"):
        mutants.main(["--all", "--commit", "main", "--out", str(project.table)])


def test_a_commit_is_git_s_and_says_whether_the_code_changed(tmp_path, monkeypatch):
    def git(*words, day=1):
        when = f"2026-01-{day:02}T00:00:00"
        env = os.environ | {
            "GIT_COMMITTER_DATE": when,
            "GIT_CONFIG_GLOBAL": "/dev/null",
        }
        me = ["-c", "user.name=me", "-c", "user.email=me@here"]
        text = subprocess.run(
            ["git", *me, *words], cwd=tmp_path, env=env, check=True, capture_output=True
        ).stdout
        return text.decode().strip()

    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "NEEDED", ("code.py",))
    assert mutants.read_commit() is None  # no repository
    try:
        git("init")
    except OSError:
        pytest.skip("git is not here")
    code = tmp_path / "code.py"
    code.write_text("1")
    shas = []
    for day in (1, 3, 2):
        code.write_text(str(day))
        git("add", "code.py")
        git("commit", "-m", "code", day=day)
        shas.append(git("rev-parse", "HEAD")[:7])
    assert mutants.read_commit() == shas[-1]
    (tmp_path / "table.csv").write_text("")  # not what is copied
    assert mutants.read_commit() == shas[-1]
    code.write_text("changed")
    assert mutants.read_commit() == f"{shas[-1]}+"
    assert mutants.newest_commit(shas) == shas[1]
    assert mutants.newest_commit([shas[0], shas[1], f"{shas[1]}+"]) == f"{shas[1]}+"
    assert mutants.newest_commit([shas[0], "0" * 7]) is None
