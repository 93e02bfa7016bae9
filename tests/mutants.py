"""Plant bugs, one at a time, in a copy of the project: a test must fail of each.

``python tests/mutants.py [NAME ...]`` plants the bugs of ``mutants.yaml`` (only some:
words of their names), two at a time. It writes ``outputs/published/mutants.csv`` with
bug, patch, test and result: ``caught`` or ``survived``.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parent.parent
PLANTED = Path(__file__).with_suffix(".yaml")
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


def copied(folder: Path) -> Path:
    """A copy of what the tests need."""
    for name in NEEDED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(
                source,
                target,
                ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
            )
        else:
            shutil.copy(source, target)
    return folder


def tested(copy: Path, tests: list[str]) -> subprocess.CompletedProcess:
    """Run some tests there until one fails."""
    env = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    env.pop("VITNB_OUTPUTS", None)
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    return subprocess.run(words, cwd=copy, env=env, capture_output=True, text=True)


def planted(copy: Path, bug: dict) -> tuple[str, str]:
    """Plant one bug, run its test, and take the bug out again.

    Returns ``caught`` or ``survived``, and the first line of the test's complaint.
    """
    path = copy / bug["file"]
    whole = path.read_text()
    if whole.count(bug["old"]) != 1:
        raise SystemExit(
            f"'{bug['bug']}': {bug['file']} holds its text "
            f"{whole.count(bug['old'])} times, not once"
        )
    try:
        path.write_text(whole.replace(bug["old"], bug["new"]))
        ended = tested(copy, [bug["test"]])
    finally:
        path.write_text(whole)
    if ended.returncode not in (0, 1):  # a test that did not run caught nothing
        raise SystemExit(
            f"'{bug['bug']}': pytest ended with {ended.returncode}\n"
            f"{ended.stdout[-2000:]}{ended.stderr}"
        )
    said = next(
        (
            line[1:].strip()
            for line in ended.stdout.splitlines()
            if line.startswith("E ")
        ),
        "",
    )
    return "caught" if ended.returncode else "survived", said


def shown(text: str) -> str:
    """A piece of code on one line."""
    return " ".join(text.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="words of the bugs to plant; all without"
    )
    parser.add_argument("--at-once", type=int, default=2)
    asked = parser.parse_args()
    every = yaml.safe_load(PLANTED.read_text())
    bugs = [
        bug
        for bug in every
        if not asked.names or any(word in bug["bug"] for word in asked.names)
    ]
    free = queue.SimpleQueue()  # copies in which nothing is planted

    def judged(bug: dict) -> str:
        copy, begin = free.get(), time.monotonic()
        try:
            result, said = planted(copy, bug)
        finally:
            free.put(copy)
        print(
            f"{result:8} {time.monotonic() - begin:4.0f} s  {bug['bug']}: {said[:100]}",
            flush=True,
        )
        return result

    with tempfile.TemporaryDirectory() as folder:
        copies = [copied(Path(folder) / str(i)) for i in range(asked.at_once)]
        sound = tested(copies[0], sorted({bug["test"] for bug in bugs}))
        if sound.returncode:
            raise SystemExit(
                "the tests must pass before anything is planted:\n"
                f"{sound.stdout[-3000:]}"
            )
        for copy in copies:
            free.put(copy)
        with ThreadPoolExecutor(asked.at_once) as pool:
            results = list(pool.map(judged, bugs))
    rows = [
        {
            "bug": bug["bug"],
            "patch": f"{bug['file']}: {shown(bug['old'])} -> {shown(bug['new'])}",
            "test": bug["test"],
            "result": result,
        }
        for bug, result in zip(bugs, results, strict=True)
    ]
    survivors = [row["bug"] for row in rows if row["result"] == "survived"]
    print(
        f"{len(rows) - len(survivors)} of {len(rows)} caught; "
        f"survived: {', '.join(survivors) or 'none'}"
    )
    if not asked.names:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    main()
