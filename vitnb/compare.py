"""Comparing variants: live processes of each, asked in turn for short blocks, so that all meet the same moments.

A shared machine is faster in one minute and slower in the next. Side by side, both variants of a pair get the same minutes,
and the ratio of their times stands still where the times themselves do not.
"""

import time
from contextlib import ExitStack
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pandas as pd

from vitnb import accuracy, intervals, records, studies, variants
from vitnb.errors import UserError, VariantError, one_line
from vitnb.workers import Worker

RATIO_COLUMNS = ["a", "b", "batch_size", "ratio", "low", "high", "samples"]
FEWEST_ROUNDS = 20


def warm_up(workers: dict[str, list[Worker]], batch_size: int) -> None:
    """Bring every process to a stable time at this batch size."""
    for worker in chain.from_iterable(workers.values()):
        worker.ask("warm_up", batch_size=batch_size)


def take_turns(
    workers: dict[str, list[Worker]], batch_size: int, budget: studies.Compare, seed: int = 0
) -> dict[str, list]:
    """Blocks of forwards in rounds, every variant once a round, in an order drawn anew: {name: [[ms, ...], ...]}.

    A variant's turn goes to one of its processes at random: two processes of the same program differ by a percent, by where
    their memory lies, and that must not pass for a difference between variants. Ends after ``budget.rounds`` or
    ``budget.seconds``, but not before FEWEST_ROUNDS.
    """
    random, blocks = np.random.default_rng(seed), {name: [] for name in workers}
    begin = time.perf_counter()
    for done in range(budget.rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - begin > budget.seconds:
            break
        for name in random.permutation(list(workers)):
            worker = workers[name][random.integers(len(workers[name]))]
            blocks[name].append(worker.ask("block", batch_size=batch_size, forwards=budget.forwards))
    return blocks


def pair(a: list[list[float]], b: list[list[float]]) -> intervals.Ratio:
    """The ratio of two variants' blocks of the same rounds; a block counts with its median."""
    return intervals.ratio(np.median(a, axis=1), np.median(b, axis=1))


def measure(study: studies.Study, device: str | None = None) -> dict:
    """Start ``study.compare.processes`` processes for every variant and let the variants take turns at every batch size.

    Returns:
        blocks_ms: {batch size: {variant: [rounds][forwards] milliseconds}}; attention_launched: by variant; failed:
        {variant: reason} for those that cannot run here.
    """
    failed, launched, blocks = {}, {}, {}
    with ExitStack() as stack:
        workers = {
            name: [stack.enter_context(Worker(study, name, device)) for _ in range(study.compare.processes)]
            for name in study.variants
        }
        for worker in chain.from_iterable(workers.values()):  # all load at once
            worker.send("describe")
        for name, several in list(workers.items()):
            try:
                described = [worker.receive() for worker in several]
                launched[name] = described[0]["attention_launched"]
            except VariantError as error:
                failed[name] = one_line(error)
                del workers[name]
        for size in study.batch_sizes:
            warm_up(workers, size)
            blocks[str(size)] = take_turns(workers, size, study.compare, study.seed)
            rounds = len(next(iter(blocks[str(size)].values()), []))
            print(f"batch {size}: {len(workers)} variants side by side, {rounds} rounds", flush=True)
    return {"blocks_ms": blocks, "attention_launched": launched, "failed": failed}


def run(study: studies.Study, device: str | None = None) -> Path:
    """Measure a study's variants side by side; write ``records/compare.json`` and ``ratios.csv``; return the CSV's path."""
    records.check_machine(study)
    for name in {variants.get(name).checkpoint for name in study.variants}:
        if not study.checkpoint(name).is_dir():
            raise UserError(
                f"no checkpoint at {study.checkpoint(name)}: make it with 'python -m vitnb run finetune -p study {study.typed}'"
            )
    started = records.start("compare", study.typed, variants=study.variants, device=device)
    found = measure(study, device)
    record = started.save(**found, answers=accuracy.answers(study))
    path = study.outputs / "ratios.csv"
    records.write_whole(path, ratios(record).to_csv(index=False, lineterminator="\n"))
    return path


def ratios(record: dict) -> pd.DataFrame:
    """Every pair of variants at every batch size: how many times longer a takes than b, with its interval.

    The interval is at intervals.PAIR_LEVEL; a pair of which one failed has blanks.
    """
    order = [name for name in variants.REGISTRY if name in record["asked"]["variants"]]
    rows = []
    for size, blocks in record["blocks_ms"].items():
        for b, a in combinations(order, 2):
            row = {"a": a, "b": b, "batch_size": int(size), "samples": 0}
            if a in blocks and b in blocks:
                found = pair(blocks[a], blocks[b])
                row |= {"ratio": found.ratio, "low": found.low, "high": found.high, "samples": found.samples}
            rows.append(row)
    return pd.DataFrame(rows, columns=RATIO_COLUMNS)


def against(table: pd.DataFrame, baseline: str = variants.BASELINE) -> pd.DataFrame:
    """The ratios of every variant to one of them, which stands there as 1: columns variant, batch_size, ratio, low, high."""
    straight = table[table.b == baseline].rename(columns={"a": "variant"})
    turned = table[table.a == baseline].rename(columns={"b": "variant"})
    turned = turned.assign(ratio=1 / turned.ratio, low=1 / turned.high, high=1 / turned.low)
    sizes = sorted(table.batch_size.unique())
    itself = pd.DataFrame(
        [{"variant": baseline, "batch_size": s, "ratio": 1.0, "low": 1.0, "high": 1.0} for s in sizes]
    )
    columns = ["variant", "batch_size", "ratio", "low", "high"]
    return pd.concat([itself, straight[columns], turned[columns]], ignore_index=True)
