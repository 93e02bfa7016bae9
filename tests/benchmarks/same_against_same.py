"""How often the comparison errs: a variant against itself, with and without extra work.

``python tests/benchmarks/same_against_same.py`` writes ``same.csv`` and ``slower.csv``,
with the p-value of every pair. ``same.csv`` has 200 pairs of one variant: a pair that
is called different is a false alarm, at a stated rate of 0.2%. ``slower.csv`` has 100
pairs with 2% extra work in one of them: a pair that is called the same is a miss. The
rule is that of ``vitnb compare``. Each set of CPU cores that ``--cores`` names, such as
``0 1`` or ``0,1 2,3``, runs a share of the pairs, with a thread for each of its cores,
in fresh processes for every twenty pairs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch
from slower import EXTRA, load_slower_variant

from vitnb import statistics
from vitnb.analysis.comparison import pair_ratio
from vitnb.measure import interleaving
from vitnb.measure.worker import WorkerProcess, load_local_variant
from vitnb.records import machine
from vitnb.records.files import write_file
from vitnb.study import ROOT, Compare, Study, load_study

VARIANT, BATCH_SIZE, PROCESSES = "fp32-sdpa", 1, 3
BUDGET = Compare(rounds=220, seconds=1e9, forwards=1)
PAIRS_A_LAUNCH = 20


def launch(study: Study, load_other: Callable, seed: int) -> list[dict]:
    """Compare plain processes of a variant with others, twenty times.

    Args:
        load_other: makes the variant of the other processes.
    """
    loads = {"plain": load_local_variant, "other": load_other}
    workers: dict[str, list[WorkerProcess]] = {name: [] for name in loads}
    rows = []
    with ExitStack() as stack:
        for name, load in loads.items():
            for _ in range(PROCESSES):
                worker = WorkerProcess(study, VARIANT, "cpu", load)
                workers[name].append(stack.enter_context(worker))
        interleaving.warm_up_workers(workers, BATCH_SIZE)
        for pair in range(PAIRS_A_LAUNCH):
            blocks = interleaving.time_interleaved(
                workers, BATCH_SIZE, BUDGET, seed=seed * PAIRS_A_LAUNCH + pair
            )
            ratio = pair_ratio(blocks["other"], blocks["plain"])
            rows.append(
                {
                    "launch": seed,
                    "pair": pair,
                    "rounds": ratio.samples,
                    "ratio": ratio.ratio,
                    "low": ratio.low,
                    "high": ratio.high,
                    "p": ratio.p,
                    "different": ratio.different,
                }
            )
    return rows


def run_share(
    study: Study, launches: list[int], same: int, out: Path, minutes: float
) -> None:
    """Run some launches, and write one CSV each.

    None is started that would not end within ``minutes`` if it took as long as the
    longest so far.

    Args:
        same: launches with a smaller number compare the variant with itself.
    """
    start, longest = time.monotonic(), 0.0
    for number in launches:
        begin = time.monotonic()
        if begin - start + longest > 60 * minutes:
            return
        if number < same:
            kind, load_other = "same", load_local_variant
        else:
            kind, load_other = "slower", load_slower_variant
        table = pd.DataFrame(launch(study, load_other, number))
        content = table.to_csv(index=False, lineterminator="\n")
        write_file(out / f"{kind}-{number:03d}.csv", content)
        print(
            f"{kind} {number}: {table.different.sum()} of {len(table)} called "
            f"different, {table.ratio.median():.4f}",
            flush=True,
        )
        longest = max(longest, time.monotonic() - begin)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs" / "published" / "instrument"
    )
    parser.add_argument(
        "--pairs", type=int, nargs=2, default=(200, 100), metavar=("SAME", "SLOWER")
    )
    parser.add_argument(
        "--cores", nargs="+", default=["0,1"], help="sets of cores, such as 0,1 2,3"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e9,
        help="start no launch that would end after that",
    )
    # Which set of cores this process is, and where it writes.
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_tables(parts: Path, out: Path, threads: int, about: dict) -> None:
    """Join the CSVs of all launches, one table a kind, with the machine beside them."""
    for kind, extra in (("same", 0.0), ("slower", EXTRA)):
        paths = sorted(parts.glob(f"{kind}-*.csv"))
        table = pd.concat([pd.read_csv(path) for path in paths]).assign(
            variant=VARIANT,
            batch_size=BATCH_SIZE,
            processes=PROCESSES,
            threads=threads,
            extra=extra,
            level=statistics.PAIR_LEVEL,
            device=about["cpu"],
            commit=about["commit"],
            torch=torch.__version__,
        )
        content = table.to_csv(index=False, lineterminator="\n")
        write_file(out / f"{kind}.csv", content)
        print(
            f"{kind}: {table.different.sum()} of {len(table)} called different, "
            f"median ratio {table.ratio.median():.4f}"
        )


def main() -> None:
    options = parse_arguments()
    study, about = load_study("embedded"), machine.describe_machine()
    same, slower = (count // PAIRS_A_LAUNCH for count in options.pairs)
    if options.share is not None:
        cores = options.cores[options.share].split(",")
        os.sched_setaffinity(0, {int(core) for core in cores})
        # The order mixes both kinds, so that a bad minute does not hit one alone.
        order = sorted(range(same + slower), key=lambda n: n * 0.618 % 1)
        launches = order[options.share :: len(options.cores)]
        run_share(study, launches, same, options.parts, options.minutes)
        return
    with tempfile.TemporaryDirectory() as parts:
        words = [sys.executable, *sys.argv, "--parts", parts, "--share"]
        shares = [subprocess.Popen([*words, str(i)]) for i in range(len(options.cores))]
        codes = [process.wait() for process in shares]
        if any(codes):
            raise SystemExit("a share failed: its error is above")
        threads = len(options.cores[0].split(","))
        write_tables(Path(parts), options.out, threads, about)


if __name__ == "__main__":
    main()
