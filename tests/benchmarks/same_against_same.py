"""How often the comparison errs: the same variant against itself, and against itself with 2% more work.

``python tests/benchmarks/same_against_same.py`` writes ``same.csv`` (200 pairs; one called different is a false alarm, at a
stated rate of 0.2%) and ``slower.csv`` (100 pairs, of which one does 2% extra work; called the same is a miss), with the p-value
of every pair. The rule is that of ``vitnb compare``. Each set of CPU cores that ``--cores`` names, such as ``0 1`` or
``0,1 2,3``, runs a share of them, with a thread for each of its cores, in fresh processes for every twenty pairs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch
from slower import EXTRA, Slower

from vitnb import statistics
from vitnb.analysis.comparison import pair_ratio
from vitnb.measure import comparison
from vitnb.measure.worker import VariantServer, WorkerProcess
from vitnb.records import machine
from vitnb.records.files import write_file
from vitnb.study import ROOT, Compare, Study, load_study

VARIANT, BATCH_SIZE, PROCESSES = "fp32-sdpa", 1, 3
BUDGET = Compare(rounds=220, seconds=1e9, forwards=1)
PAIRS_A_LAUNCH = 20


def launch(study: Study, other: type, seed: int) -> list[dict]:
    """Twenty comparisons of one variant: plain processes against others that run ``other``."""
    with ExitStack() as stack:
        workers = {
            name: [stack.enter_context(WorkerProcess(study, VARIANT, "cpu", bench)) for _ in range(PROCESSES)]
            for name, bench in (("plain", VariantServer), ("other", other))
        }
        comparison.warm_up_workers(workers, BATCH_SIZE)
        rows = []
        for pair in range(PAIRS_A_LAUNCH):
            blocks = comparison.time_interleaved(workers, BATCH_SIZE, BUDGET, seed=seed * PAIRS_A_LAUNCH + pair)
            found = pair_ratio(blocks["other"], blocks["plain"])
            rows.append({"launch": seed, "pair": pair, "rounds": found.samples, "ratio": found.ratio, "low": found.low,
                         "high": found.high, "p": found.p, "different": found.different})  # fmt: skip
    return rows


def share(study: Study, launches: list[int], same: int, out: Path, minutes: float) -> None:
    """Run some launches, the first ``same`` of all of which compare the variant with itself; one CSV each.

    None is started that would not end within ``minutes`` if it took as long as the longest so far.
    """
    start, longest = time.monotonic(), 0.0
    for number in launches:
        begin = time.monotonic()
        if begin - start + longest > 60 * minutes:
            return
        kind, other = ("same", VariantServer) if number < same else ("slower", Slower)
        table = pd.DataFrame(launch(study, other, number))
        write_file(out / f"{kind}-{number:03d}.csv", table.to_csv(index=False, lineterminator="\n"))
        print(
            f"{kind} {number}: {table.different.sum()} of {len(table)} called different, {table.ratio.median():.4f}",
            flush=True,
        )
        longest = max(longest, time.monotonic() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "published" / "instrument")
    parser.add_argument("--pairs", type=int, nargs=2, default=(200, 100), metavar=("SAME", "SLOWER"))
    parser.add_argument("--cores", nargs="+", default=["0,1"], help="sets of cores, such as 0,1 2,3")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no launch that would end after that")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # which set of cores this process is
    parser.add_argument("--parts", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    study, about = load_study("embedded"), machine.describe_machine()
    same, slower = (count // PAIRS_A_LAUNCH for count in asked.pairs)
    if asked.share is not None:
        os.sched_setaffinity(0, {int(core) for core in asked.cores[asked.share].split(",")})
        # In an order that mixes both kinds, so that a bad minute does not hit one alone.
        order = sorted(range(same + slower), key=lambda n: n * 0.618 % 1)
        share(study, order[asked.share :: len(asked.cores)], same, asked.parts, asked.minutes)
        return
    with tempfile.TemporaryDirectory() as parts:
        words = [sys.executable, *sys.argv, "--parts", parts, "--share"]
        started = [subprocess.Popen([*words, str(i)]) for i in range(len(asked.cores))]
        if any(process.wait() for process in started):
            raise SystemExit("a share failed: its error is above")
        for kind in ("same", "slower"):
            table = pd.concat([pd.read_csv(path) for path in sorted(Path(parts).glob(f"{kind}-*.csv"))])
            table = table.assign(
                variant=VARIANT, batch_size=BATCH_SIZE, processes=PROCESSES, threads=len(asked.cores[0].split(",")),
                extra=EXTRA * (kind == "slower"),
                level=statistics.PAIR_LEVEL, device=about["cpu"], commit=about["commit"], torch=torch.__version__,
            )  # fmt: skip
            write_file(asked.out / f"{kind}.csv", table.to_csv(index=False, lineterminator="\n"))
            print(
                f"{kind}: {table.different.sum()} of {len(table)} called different, median ratio {table.ratio.median():.4f}"
            )


if __name__ == "__main__":
    main()
