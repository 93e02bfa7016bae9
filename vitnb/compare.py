"""Comparing variants and peers: live processes of each, asked in turn for short blocks, so that all meet the same moments.

A shared machine is faster in one minute and slower in the next. Side by side, both variants of a pair get the same minutes,
and the ratio of their times stands still where the times themselves do not.
"""

import time
from contextlib import ExitStack
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pandas as pd

from vitnb import accuracy, intervals, peers, records, studies, variants
from vitnb.errors import UserError, VariantError, one_line
from vitnb.workers import Bench, Worker

RATIO_COLUMNS = ["a", "b", "batch_size", "ratio", "low", "high", "samples"]
TIME_COLUMNS = ["variant", "batch_size", "p50_ms", "low", "high", "samples"]
FEWEST_ROUNDS = 20


def _fail(failed: dict[str, str] | None, name: str, error: VariantError) -> None:
    """Keep the reason, or raise the error again where nobody keeps it."""
    if failed is None:
        raise error
    failed[name] = one_line(error)


def warm_up(
    workers: dict[str, list[Worker]], batch_size: int, failed: dict[str, str] | None = None
) -> dict[str, list[dict]]:
    """Bring every process to a stable time at this batch size; what each answers, see ``workers.Bench.warm_up``.

    One that fails is left out, its reason in ``failed``; without such a dict its error is raised.
    """
    for worker in chain.from_iterable(workers.values()):  # what is compiled is compiled at once
        worker.send("prepare", batch_size=batch_size)
    ready, warmed = [], {}
    for name, several in workers.items():
        try:
            _ = [worker.receive() for worker in several]
            ready.append(name)
        except VariantError as error:
            _fail(failed, name, error)
    for name in ready:
        several = workers[name]
        try:
            warmed[name] = [worker.ask("warm_up", batch_size=batch_size) for worker in several]
        except VariantError as error:
            _fail(failed, name, error)
    return warmed


def take_turns(
    workers: dict[str, list[Worker]],
    batch_size: int,
    budget: studies.Compare,
    seed: int = 0,
    failed: dict[str, str] | None = None,
) -> dict[str, list]:
    """Blocks of forwards in rounds, every variant once a round, in an order drawn anew: {name: [[ms, ...], ...]}.

    A variant's turn goes to one of its processes at random: two processes of the same program differ by a percent, by where
    their memory lies, and that must not pass for a difference between variants. Ends after ``budget.rounds`` or
    ``budget.seconds``, but not before FEWEST_ROUNDS. One that fails has no more turns and no blocks; see ``warm_up``.
    """
    random, blocks = np.random.default_rng(seed), {name: [] for name in workers}
    workers, begin = dict(workers), time.perf_counter()
    for done in range(budget.rounds):
        if not workers or (done >= FEWEST_ROUNDS and time.perf_counter() - begin > budget.seconds):
            break
        for name in random.permutation(list(workers)):
            worker = workers[name][random.integers(len(workers[name]))]
            try:
                blocks[name].append(worker.ask("block", batch_size=batch_size, forwards=budget.forwards))
            except VariantError as error:
                _fail(failed, str(name), error)
                del workers[name], blocks[name]
    return blocks


def pair(a: list[list[float]], b: list[list[float]]) -> intervals.Ratio:
    """The ratio of two variants' blocks of the same rounds; a block counts with its median."""
    return intervals.ratio(np.median(a, axis=1), np.median(b, axis=1))


def measure(study: studies.Study, device: str | None = None) -> dict:
    """Start ``study.compare.processes`` processes for every variant and peer, and let them take turns at every batch size.

    Returns:
        blocks_ms: {batch size: {variant: [rounds][forwards] milliseconds}}; warm_up: {batch size: {variant: what its first
        process says, see ``workers.Bench.warm_up``}}; attention_launched: by variant; peers: what each describes; failed:
        {variant, or "variant at batch size": reason} for those that cannot run here at all, or not at that size.
    """
    failed, described, blocks, begun, begin = {}, {}, {}, {}, time.perf_counter()

    def tell(what: str) -> None:
        print(f"{what}, {time.perf_counter() - begin:.0f} s from the start", flush=True)

    benches = dict.fromkeys(study.variants, Bench) | dict.fromkeys(study.peers, peers.Bench)
    with ExitStack() as stack:
        workers = {
            name: [stack.enter_context(Worker(study, name, device, bench)) for _ in range(study.compare.processes)]
            for name, bench in benches.items()
        }
        for worker in chain.from_iterable(workers.values()):  # all load at once
            worker.send("describe")
        for name, several in list(workers.items()):
            try:
                described[name], *_ = [worker.receive() for worker in several]
            except VariantError as error:
                failed[name] = one_line(error)
                del workers[name]
                tell(f"{name} failed: {failed[name]}")
            else:
                tell(f"{name} loaded")
        for size in study.batch_sizes:
            here: dict[str, str] = {}
            warmed = warm_up(workers, size, here)
            begun[str(size)] = {name: answers[0] for name, answers in warmed.items()}
            tell(f"batch {size}: {len(warmed)} ready")
            ready = {name: workers[name] for name in warmed}
            blocks[str(size)] = take_turns(ready, size, study.compare, study.seed, here)
            failed |= {f"{name} at batch {size}": reason for name, reason in here.items()}
            for name, reason in here.items():
                tell(f"{name} failed at batch {size}: {reason}")
            rounds = len(next(iter(blocks[str(size)].values()), []))
            tell(f"batch {size}: {len(blocks[str(size)])} side by side, {rounds} rounds")
    launched = {name: found["attention_launched"] for name, found in described.items() if name in study.variants}
    about = {name: found for name, found in described.items() if name in study.peers}
    return {
        "blocks_ms": blocks, "warm_up": begun, "attention_launched": launched, "peers": about, "failed": failed,
    }  # fmt: skip


def run(study: studies.Study, device: str | None = None) -> Path:
    """Measure a study's variants and peers side by side; write ``records/compare.json``, ``ratios.csv`` and ``times.csv``.

    Returns the path of the ratios.
    """
    records.check_machine(study)
    for name in {variants.get(name).checkpoint for name in [*study.variants, *[variants.CONTROL] * bool(study.peers)]}:
        if not study.checkpoint(name).is_dir():
            raise UserError(
                f"no checkpoint at {study.checkpoint(name)}: make it with 'python -m vitnb run finetune -p study {study.typed}'"
            )
    started = records.start("compare", study.typed, variants=study.variants, peers=study.peers, device=device)
    found = measure(study, device)
    logits = accuracy.kept_logits(study)
    record = started.save(**found, answers=accuracy.answers(logits), engines=accuracy.engines(logits))
    for name, table in (("ratios", ratios(record)), ("times", times(record))):
        records.write_whole(study.outputs / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    return study.outputs / "ratios.csv"


def _order(record: dict) -> list[str]:
    """The variants of a record in the registry's order, then its peers (a record made before there were any has none)."""
    asked = record["asked"]
    return [name for name in variants.REGISTRY if name in asked["variants"]] + asked.get("peers", [])


def times(record: dict) -> pd.DataFrame:
    """The p50 of each variant and peer over all its timed forwards, with its 95% interval; blanks for what failed."""
    rows = []
    for size, blocks in record["blocks_ms"].items():
        for name in _order(record):
            row = {"variant": name, "batch_size": int(size), "samples": 0}
            if name in blocks:
                samples = np.concatenate(blocks[name])
                ((p50, low, high),) = intervals.percentiles(samples, [0.5])
                row |= {"p50_ms": p50, "low": low, "high": high, "samples": len(samples)}
            rows.append(row)
    return pd.DataFrame(rows, columns=TIME_COLUMNS)


def ratios(record: dict) -> pd.DataFrame:
    """Every pair of variants and peers at every batch size: how many times longer a takes than b, with its interval.

    The interval is at intervals.PAIR_LEVEL; a pair of which one failed has blanks.
    """
    rows = []
    for size, blocks in record["blocks_ms"].items():
        for b, a in combinations(_order(record), 2):
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
