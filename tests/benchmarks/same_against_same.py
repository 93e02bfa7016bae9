"""How often the comparison errs: the same variant against itself, and against itself with 2% more work.

``python tests/benchmarks/same_against_same.py`` writes ``same.csv`` (200 pairs; called different is a false alarm, at a stated rate of 0.2%)
and ``slower.csv`` (100 pairs, one of which does 2% extra work; called the same is a miss), with the p-value of every pair. The
rule is that of ``vitnb compare``. Fresh processes every ten pairs. About 25 minutes on 2 CPU cores that do nothing else.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vitnb import compare, intervals, machine, records, studies
from vitnb.workers import Bench, Worker

VARIANT, BATCH_SIZE = "fp32-sdpa", 1
BUDGET = studies.Compare(rounds=100, seconds=1e9, forwards=2)
PAIRS_A_LAUNCH = 10
EXTRA = 0.02


class Slower(Bench):
    """The same variant, with small matrix products after each forward that take 2% of its time."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.warm_up(BATCH_SIZE)
        forward = np.median(self.block(BATCH_SIZE, 200))
        piece, times = torch.randn(48, 48), []
        for _ in range(400):
            begin = time.perf_counter()
            for _ in range(10):
                piece @ piece
            times.append((time.perf_counter() - begin) * 1e2)
        count = round(EXTRA * forward / float(np.median(times)))

        def work(*_):
            for _ in range(count):
                piece @ piece

        self.loaded.model.register_forward_hook(work)


def pairs(study: studies.Study, count: int, other: type) -> list[dict]:
    """``count`` comparisons of one variant, plain in one process and run by ``other`` in the other."""
    rows = []
    for launch in range(count // PAIRS_A_LAUNCH):
        with Worker(study, VARIANT, "cpu") as plain, Worker(study, VARIANT, "cpu", bench=other) as changed:
            for _ in range(PAIRS_A_LAUNCH):
                blocks = compare.take_turns({"plain": plain, "changed": changed}, BATCH_SIZE, BUDGET, seed=len(rows))
                found = compare.pair(blocks["changed"], blocks["plain"])
                rows.append({"pair": len(rows), "launch": launch, "rounds": found.samples, "ratio": found.ratio, "low": found.low,
                             "high": found.high, "p": found.p, "different": found.different})  # fmt: skip
        print(f"{other.__name__}: {sum(row['different'] for row in rows)} of {len(rows)} called different", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=studies.ROOT / "outputs" / "published" / "instrument")
    parser.add_argument("--pairs", type=int, nargs=2, default=(200, 100), metavar=("SAME", "SLOWER"))
    asked = parser.parse_args()
    study, about = studies.load("embedded"), machine.machine()
    # The two kinds in turns as well, so that a bad quarter of an hour does not hit one alone.
    found = {"same": [], "slower": []}
    chunk = PAIRS_A_LAUNCH
    todo = [
        (name, other)
        for name, other, count in zip(found, (Bench, Slower), asked.pairs, strict=True)
        for _ in range(count // chunk)
    ]
    for name, other in [todo[i] for i in np.random.default_rng(0).permutation(len(todo))]:
        rows = pairs(study, chunk, other)
        done = len(found[name])
        found[name] += [row | {"pair": done + i, "launch": done // chunk} for i, row in enumerate(rows)]
    for name, rows in found.items():
        table = pd.DataFrame(rows).assign(
            variant=VARIANT, level=intervals.PAIR_LEVEL, forwards=BUDGET.forwards, device=about["cpu"], commit=about["commit"],
            torch=torch.__version__,
        )  # fmt: skip
        records.write_whole(asked.out / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
        print(
            f"{name}: {table.different.sum()} of {len(table)} called different, median ratio {table.ratio.median():.4f}"
        )


if __name__ == "__main__":
    main()
