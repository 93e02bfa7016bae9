"""Comparing variants and peers: live processes of each, asked in turn for short blocks, so that all meet the same moments.

A shared machine is faster in one minute and slower in the next. Side by side, both variants of a pair get the same minutes,
and the ratio of their times stands still where the times themselves do not.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pandas as pd

from vitnb import accuracy, checkpoints, intervals, peers, records, studies, turns, variants
from vitnb.errors import UserError, VariantError, one_line
from vitnb.unfinished import Unfinished
from vitnb.workers import Bench, Worker

RATIO_COLUMNS = ["a", "b", "batch_size", "ratio", "low", "high", "samples"]
TIME_COLUMNS = ["variant", "batch_size", "p50_ms", "low", "high", "samples"]


def pair(a: list[list[float]], b: list[list[float]]) -> intervals.Ratio:
    """The ratio of two variants' blocks of the same rounds; a block counts with its median."""
    return intervals.ratio(np.median(a, axis=1), np.median(b, axis=1))


def _describe(workers: dict[str, list[Worker]], tell: Callable) -> tuple[dict, dict[str, str]]:
    """Load all at once: what the first process of each name says of itself, and the reasons of those that cannot be loaded."""
    described, failed = {}, {}
    for worker in chain.from_iterable(workers.values()):
        worker.send("describe")
    for name, several in workers.items():
        try:
            described[name], *_ = [worker.receive() for worker in several]
        except VariantError as error:
            failed[name] = one_line(error)
        tell(f"{name} failed: {failed[name]}" if name in failed else f"{name} loaded")
    return described, failed


def _side_by_side(workers: dict[str, list[Worker]], batch_size: int, study: studies.Study, tell: Callable) -> dict:
    """One batch size: warm_up, blocks_ms and failed, by variant; see ``measure``."""
    failed: dict[str, str] = {}
    turns.prepare(workers, batch_size, failed, lambda name: tell(f"batch {batch_size}: {name} had its first forward"))
    warmed = turns.warm_up({name: workers[name] for name in workers if name not in failed}, batch_size, failed)
    blocks = turns.take({name: workers[name] for name in warmed}, batch_size, study.compare, study.seed, failed)
    for name, reason in failed.items():
        tell(f"batch {batch_size}: {name} failed: {reason}")
    tell(f"batch {batch_size}: {len(blocks)} side by side, {len(next(iter(blocks.values()), []))} rounds")
    return {"warm_up": {name: first for name, (first, *_) in warmed.items()}, "blocks_ms": blocks, "failed": failed}


def measure(study: studies.Study, device: str | None = None, done: Unfinished | None = None) -> dict:
    """Start ``study.compare.processes`` processes for every variant and peer, and let them take turns at every batch size.

    Args:
        done: where each finished batch size is kept, and not measured again; None: nowhere.

    Returns:
        blocks_ms: {batch size: {variant: [rounds][forwards] milliseconds}}; warm_up: {batch size: {variant: what its first
        process says, see ``workers.Bench.warm_up``}}; attention_launched: by variant; peers: what each describes; failed:
        {variant, or "variant at batch size": reason} for those that cannot run here at all, or not at that size.
    """
    done, begin = done or Unfinished(None), time.perf_counter()

    def tell(what: str) -> None:
        print(f"{what}, {time.perf_counter() - begin:.0f} s from the start", flush=True)

    benches = dict.fromkeys(study.variants, Bench) | dict.fromkeys(study.peers, peers.Bench)
    with ExitStack() as stack:
        workers = {
            name: [stack.enter_context(Worker(study, name, device, bench)) for _ in range(study.compare.processes)]
            for name, bench in benches.items()
        }
        described, failed = _describe(workers, tell)
        workers = {name: several for name, several in workers.items() if name not in failed}
        sizes = {
            size: done.get(lambda size=size: _side_by_side(workers, size, study, tell), batch_size=size)
            for size in study.batch_sizes
        }
    for size, found in sizes.items():
        failed |= {f"{name} at batch {size}": reason for name, reason in found["failed"].items()}
    return {
        "blocks_ms": {str(size): found["blocks_ms"] for size, found in sizes.items()},
        "warm_up": {str(size): found["warm_up"] for size, found in sizes.items()},
        "attention_launched": {
            name: about["attention_launched"] for name, about in described.items() if name in study.variants
        },
        "peers": {name: about for name, about in described.items() if name in study.peers},
        "failed": failed,
    }


def unfinished(started: records.Run) -> Unfinished:
    """The store of the batch sizes that a run has done: times belong to one machine, one code and one set of exports."""
    study, here = started.study, started.record["machine"]
    return Unfinished(
        started.unfinished, asked=started.record["asked"], budget=vars(study.compare), seed=study.seed,
        checkpoints={name: checkpoints.fingerprint(study.checkpoint(name)) for name in exports(study)},
        machine=[here[key] for key in ("cpu", "gpu_uuid", "driver", "code_sha256")],
    )  # fmt: skip


def exports(study: studies.Study) -> list[str]:
    """The exports that the variants and peers of a study are loaded from."""
    return sorted(
        {variants.get(name).checkpoint for name in [*study.variants, *[variants.CONTROL] * bool(study.peers)]}
    )


def run(study: studies.Study, device: str | None = None) -> Path:
    """Measure a study's variants and peers side by side; write ``records/compare.json``, ``ratios.csv`` and ``times.csv``.

    Returns the path of the ratios.
    """
    records.check_machine(study)
    for name in exports(study):
        if not study.checkpoint(name).is_dir():
            raise UserError(
                f"no checkpoint at {study.checkpoint(name)}: make it with 'python -m vitnb run finetune -p study {study.typed}'"
            )
    started = records.start("compare", study.typed, variants=study.variants, peers=study.peers, device=device)
    found = measure(study, device, unfinished(started))
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
