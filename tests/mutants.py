"""Plant bugs, one at a time, in a copy of the project: a test must fail of each.

``python tests/mutants.py [NAME ...]`` plants the bugs of ``mutants.yaml`` (only some:
words of their names), two at a time. It writes ``outputs/published/mutants.csv`` with
bug, patch, test and result: ``caught``, ``survived`` or ``broken``.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
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
    whole = path.read_text()
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


def plant_and_show(copy: Path, bug: dict) -> str:
    """Plant one bug, print a line, and return the result."""
    begin = time.monotonic()
    result, complaint = plant(copy, bug)
    seconds = time.monotonic() - begin
    print(f"{result:8} {seconds:4.0f} s  {bug['bug']}: {complaint[:100]}", flush=True)
    return result


def row(bug: dict, result: str) -> dict:
    """Return a row of the table; code stands on one line."""
    old, new = (" ".join(bug[key].split()) for key in ("old", "new"))
    patch = f"{bug['file']}: {old} -> {new}"
    return {"bug": bug["bug"], "patch": patch, "test": bug["test"], "result": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="words of the bugs; all without")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table")
    asked = parser.parse_args()
    bugs = [
        bug
        for bug in yaml.safe_load(BUGS.read_text())
        if not asked.names or any(word in bug["bug"] for word in asked.names)
    ]
    by_file: dict[str, list[str]] = {}
    for test in sorted({bug["test"] for bug in bugs}):
        by_file.setdefault(test.split("::")[0], []).append(test)
    with tempfile.TemporaryDirectory() as folder:
        copies = [copy_project(Path(folder) / str(i)) for i in range(asked.at_once)]
        lists = share_copies(copies, find_unsound, list(by_file.values()))
        unsound = list(chain.from_iterable(lists))
        print(f"fail before a bug is planted: {', '.join(unsound) or 'none'}")
        sound_bugs = [bug for bug in bugs if bug["test"] not in unsound]
        outcomes = share_copies(copies, plant_and_show, sound_bugs)
    by_bug = {bug["bug"]: one for bug, one in zip(sound_bugs, outcomes, strict=True)}
    results = [by_bug.get(bug["bug"], "broken") for bug in bugs]
    rows = [row(bug, result) for bug, result in zip(bugs, results, strict=True)]
    escaped = [one["bug"] for one in rows if one["result"] != "caught"]
    caught = len(rows) - len(escaped)
    print(f"{caught} of {len(rows)} caught; not: {', '.join(escaped) or 'none'}")
    if not asked.names:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        text = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
        asked.out.write_text(text)
    raise SystemExit(bool(escaped))


if __name__ == "__main__":
    main()
