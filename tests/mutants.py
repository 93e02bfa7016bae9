"""Plant bugs, one at a time, in a copy of the project: a test must fail of each.

``python tests/mutants.py`` plants the bugs of ``mutants.yaml`` that are new, were not
caught, or whose code has changed since. ``--all`` plants every bug, words of their
names only those. Each result is written at once into ``outputs/published/mutants.csv``;
the other rows stay. A row holds bug, patch, test, result (``caught``, ``survived`` or
``broken``), commit (with a ``+`` if changes were not committed) and a digest of the
code.
"""

import argparse
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parent.parent
BUGS = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "outputs" / "published" / "mutants.csv"
NEEDED = (
    "vitnb",
    "tests",
    "notebooks",
    "studies",
    "data/base",
    "data/claims.csv",
    "pyproject.toml",
    "Snakefile",
)
COLUMNS = ("bug", "patch", "test", "result", "commit", "code")
COMMIT = re.compile(r"[0-9a-f]{7}\+?")


# --- What a result depends on ---


def code_digest(root: Path, bug: dict) -> str:
    """Return a digest of a bug, of its file and of its test's file, without the bug.

    A file that is missing counts as an empty one.
    """
    words = [bug[key] for key in ("file", "old", "new", "test")]
    digest = hashlib.sha256(json.dumps(words).encode())
    for name in (bug["file"], bug["test"].split("::")[0]):
        path = root / name
        whole = path.read_bytes() if path.is_file() else b""
        digest.update(hashlib.sha256(whole).digest())
    return digest.hexdigest()[:16]


def find_older(table: pd.DataFrame, bugs: list[dict], root: Path) -> list[str]:
    """Return the bugs whose rows speak of another patch, file or test than today's."""
    now = {bug["bug"]: code_digest(root, bug) for bug in bugs}
    return [
        name
        for name, code in zip(table.bug, table.code, strict=True)
        if now.get(name, code) != code
    ]


def describe_older(table: pd.DataFrame, bugs: list[dict], root: Path) -> str:
    """Return a text that counts and names older rows; empty if there are none."""
    older = find_older(table, bugs, root)
    if not older:
        return ""
    begin = f"{len(older)} of {len(table)} rows of {RESULTS.name} were caught in older"
    return "\n- ".join([f"{begin} code: make mutants", *older])


def select_bugs(
    bugs: list[dict], table: pd.DataFrame, names: list[str], every: bool = False
) -> list[dict]:
    """Return the bugs to plant: by words of their names, every one, or what is due.

    Due are bugs that the table does not call caught, and those whose code has changed.
    """
    if names:
        return [bug for bug in bugs if any(word in bug["bug"] for word in names)]
    if every:
        return bugs
    caught = set(table.bug[table.result == "caught"])
    settled = caught - set(find_older(table, bugs, ROOT))
    return [bug for bug in bugs if bug["bug"] not in settled]


def ask_git(*words: str) -> str | None:
    """Return what git prints about the project; None where git cannot say."""
    try:
        ended = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def read_commit() -> str | None:
    """Return the commit of the files that are copied, with a ``+`` if they changed.

    None where git cannot say, as in a copy without history.
    """
    commit = ask_git("rev-parse", "HEAD")
    known = ask_git("ls-files", "--error-unmatch", *NEEDED[:1])
    changes = ask_git("status", "--porcelain", "--", *NEEDED)
    if not commit or not known or changes is None:
        return None
    return commit[:7] + ("+" if changes else "")


def newest_commit(commits: list[str]) -> str | None:
    """Return the newest of some commits; None where git does not know one of them.

    A commit with changes (``+``) is newer than the same commit without.
    """
    names = sorted({commit.removesuffix("+") for commit in commits})
    found = ask_git("rev-list", "--no-walk=sorted", "--max-count=1", *names, "--")
    if not found:
        return None
    name = found[:7]
    return f"{name}+" if f"{name}+" in commits else name


# --- The table ---


def read_bugs() -> list[dict]:
    """Return the bugs of ``mutants.yaml``."""
    return yaml.safe_load(BUGS.read_text())


def read_table(path: Path = RESULTS) -> pd.DataFrame:
    """Return the table as text, as a commit may look like a number; empty if missing.

    Columns that an older table lacks are empty.
    """
    if not path.exists():
        return pd.DataFrame(columns=list(COLUMNS), dtype=str)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table.reindex(columns=list(COLUMNS), fill_value="")


class Table:
    """The table on disk: whole after each row, in the order of the bugs."""

    def __init__(self, path: Path, bugs: list[dict]) -> None:
        self.path, self.order = path, [bug["bug"] for bug in bugs]
        self.rows = {row["bug"]: row for row in read_table(path).to_dict("records")}
        self.lock = threading.Lock()

    def put(self, row: dict) -> None:
        """Set the row of one bug and write the table."""
        with self.lock:
            self.rows[row["bug"]] = row
            self.write()

    def write(self) -> None:
        """Write the rows of the bugs that there are; rows of others go."""
        rows = [self.rows[name] for name in self.order if name in self.rows]
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Another file first: a killed process must not leave half a table.
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(table.to_csv(index=False, lineterminator="\n"))
        part.replace(self.path)


def make_row(bug: dict, result: str, commit: str, code: str) -> dict[str, str]:
    """Return a row of the table; a patch stands on one line."""
    old, new = (" ".join(bug[key].split()) for key in ("old", "new"))
    patch = f"{bug['file']}: {old} -> {new}"
    values = (bug["bug"], patch, bug["test"], result, commit, code)
    return dict(zip(COLUMNS, values, strict=True))


# --- Planting ---


def copy_project(folder: Path) -> Path:
    """Copy the files that the tests need into a folder, and return the folder."""
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in NEEDED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy(source, target)
    return folder


def run_tests(copy: Path, tests: list[str]) -> subprocess.CompletedProcess:
    """Run some tests in a copy until one fails."""
    inherited = os.environ.get("PYTHONPATH", "")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(copy), inherited])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    env.pop("VITNB_OUTPUTS", None)
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    return subprocess.run(
        words + tests, cwd=copy, env=env, capture_output=True, text=True
    )


def find_unsound(copy: Path, tests: list[str]) -> list[str]:
    """Return the tests that fail before anything is planted."""
    if run_tests(copy, tests).returncode == 0:
        return []
    return [test for test in tests if run_tests(copy, [test]).returncode]


def plant(copy: Path, bug: dict) -> tuple[str, str]:
    """Plant one bug, run its test, and take the bug out again.

    Returns ``caught``, ``survived`` or ``broken`` (the test could not run, or fails
    without the bug), and the first line of the complaint.
    """
    path = copy / bug["file"]
    whole = path.read_text() if path.is_file() else ""
    count = whole.count(bug["old"])
    if count != 1:
        return "broken", f"{bug['file']} holds its text {count} times, not once"
    try:
        path.write_text(whole.replace(bug["old"], bug["new"]))
        ended = run_tests(copy, [bug["test"]])
    finally:
        path.write_text(whole)
    if ended.returncode not in (0, 1):  # a test that did not run caught nothing
        return "broken", f"pytest ended with {ended.returncode}: {ended.stdout[-500:]}"
    lines = [line for line in ended.stdout.splitlines() if line.startswith("E ")]
    complaint = lines[0][1:].strip() if lines else ""
    return "caught" if ended.returncode else "survived", complaint


def share_copies(copies: list[Path], work: Callable, items: list) -> list:
    """Return ``work(copy, item)`` of each item; each copy does one thing at a time."""
    free = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def one(item):
        copy = free.get()
        try:
            return work(copy, item)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        return list(pool.map(one, items))


def plant_all(copies: list[Path], bugs: list[dict], table: Table, commit: str) -> list:
    """Plant bugs, print a line for each, and write its row at once.

    Returns the bugs that no test caught. Ctrl-C ends the tests as well; what they said
    then is no result, and their rows stay as they were.
    """
    stopped = threading.Event()

    def stop(*_):
        stopped.set()
        raise KeyboardInterrupt

    def one(copy: Path, bug: dict) -> str | None:
        begin, code = time.monotonic(), code_digest(copy, bug)
        result, complaint = plant(copy, bug)
        if stopped.is_set():
            return None
        seconds = time.monotonic() - begin
        line = f"{result:8} {seconds:4.0f} s  {bug['bug']}: {complaint[:100]}"
        print(line, flush=True)
        table.put(make_row(bug, result, commit, code))
        return None if result == "caught" else bug["bug"]

    before = signal.signal(signal.SIGINT, stop)
    try:
        return [name for name in share_copies(copies, one, bugs) if name]
    finally:
        signal.signal(signal.SIGINT, before)


def parse_commit(text: str) -> str:
    """Return a commit as the table holds it: seven digits, perhaps a ``+``."""
    if not re.fullmatch(r"[0-9a-f]{7,40}\+?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no commit: 7 to 40 hex digits")
    return text[:7] + ("+" if text.endswith("+") else "")


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="words of the bugs' names")
    parser.add_argument("--all", action="store_true", help="every bug")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table")
    parser.add_argument(
        "--commit", type=parse_commit, help="of this code, where git cannot say it"
    )
    asked = parser.parse_args(words)
    asked.commit = asked.commit or read_commit()
    if not asked.commit:
        parser.error("git cannot say the commit of this code: add --commit SHA")
    return asked


def plant_due(due: list[dict], table: Table, at_once: int, commit: str) -> list[str]:
    """Plant bugs in copies of the project; return those that no test caught.

    A bug is broken if its test fails without it.
    """
    by_file: dict[str, list[str]] = {}
    for test in sorted({bug["test"] for bug in due}):
        by_file.setdefault(test.split("::")[0], []).append(test)
    with tempfile.TemporaryDirectory() as folder:
        number = min(at_once, len(due))
        copies = [copy_project(Path(folder) / str(i)) for i in range(number)]
        lists = share_copies(copies, find_unsound, list(by_file.values()))
        unsound = list(chain.from_iterable(lists))
        print(f"fail before a bug is planted: {', '.join(unsound) or 'none'}")
        broken = [bug for bug in due if bug["test"] in unsound]
        for bug in broken:
            table.put(make_row(bug, "broken", commit, code_digest(copies[0], bug)))
        sound = [bug for bug in due if bug["test"] not in unsound]
        return [bug["bug"] for bug in broken] + plant_all(copies, sound, table, commit)


def main(words: list[str] | None = None) -> None:
    asked, bugs = parse_arguments(words), read_bugs()
    table = Table(asked.out, bugs)
    due = select_bugs(bugs, read_table(asked.out), asked.names, asked.all)
    if asked.names and not due:
        raise SystemExit(f"no bug's name holds {' or '.join(asked.names)}")
    print(f"{len(due)} of {len(bugs)} bugs to plant, at commit {asked.commit}")
    table.write()
    escaped = plant_due(due, table, asked.at_once, asked.commit) if due else []
    caught = len(due) - len(escaped)
    print(f"{caught} of {len(due)} caught; not: {', '.join(escaped) or 'none'}")
    raise SystemExit(bool(escaped))


if __name__ == "__main__":
    main()
