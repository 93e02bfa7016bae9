"""Comparing variants and peers: live processes of each, asked in turn for short blocks, so that all meet the same moments.

A shared machine is faster in one minute and slower in the next. Side by side, both variants of a pair get the same minutes,
and the ratio of their times stands still where the times themselves do not.

Turns: live processes of each variant, asked in rounds for short blocks of forwards, in an order drawn anew.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np

from vitnb import devices, variants
from vitnb.analysis import comparison
from vitnb.errors import UserError, VariantError, one_line
from vitnb.measure import accuracy, external
from vitnb.measure.worker import VariantServer, WorkerProcess
from vitnb.models import checkpoints
from vitnb.records import run as records_run
from vitnb.records.files import write_file
from vitnb.records.resume import ResumeCache
from vitnb.records.run import Run
from vitnb.study import Compare, Study


def _describe(workers: dict[str, list[WorkerProcess]], tell: Callable) -> tuple[dict, dict[str, str]]:
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


def _side_by_side(workers: dict[str, list[WorkerProcess]], batch_size: int, study: Study, tell: Callable) -> dict:
    """One batch size: warm_up, blocks_ms and failed, by variant; see ``measure``."""
    failed: dict[str, str] = {}
    first_forwards(workers, batch_size, failed, lambda name: tell(f"batch {batch_size}: {name} had its first forward"))
    warmed = warm_up_workers({name: workers[name] for name in workers if name not in failed}, batch_size, failed)
    blocks = time_interleaved({name: workers[name] for name in warmed}, batch_size, study.compare, study.seed, failed)
    for name, reason in failed.items():
        tell(f"batch {batch_size}: {name} failed: {reason}")
    tell(f"batch {batch_size}: {len(blocks)} side by side, {len(next(iter(blocks.values()), []))} rounds")
    return {"warm_up": {name: first for name, (first, *_) in warmed.items()}, "blocks_ms": blocks, "failed": failed}


def measure_comparison(study: Study, device: str | None = None, done: ResumeCache | None = None) -> dict:
    """Start ``study.compare.processes`` processes for every variant and peer, and let them take turns at every batch size.

    Args:
        done: where each finished batch size is kept, and not measured again; None: nowhere.

    Returns:
        blocks_ms: {batch size: {variant: [rounds][forwards] milliseconds}}; warm_up: {batch size: {variant: what its first
        process says, see ``workers.Bench.warm_up``}}; attention_launched: by variant; peers: what each describes; failed:
        {variant, or "variant at batch size": reason} for those that cannot run here at all, or not at that size.
    """
    done, begin = done or ResumeCache(None), time.perf_counter()

    def tell(what: str) -> None:
        print(f"{what}, {time.perf_counter() - begin:.0f} s from the start", flush=True)

    benches = dict.fromkeys(study.variants, VariantServer) | dict.fromkeys(study.peers, external.ExternalServer)
    with ExitStack() as stack:
        workers = {
            name: [stack.enter_context(WorkerProcess(study, name, device, bench)) for _ in range(study.compare.processes)]
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


def resume_cache(started: Run) -> ResumeCache:
    """The store of the batch sizes that a run has done: times belong to one machine, one code and one set of exports."""
    study, here = started.study, started.record["machine"]
    return ResumeCache(
        started.unfinished, asked=started.record["asked"], budget=vars(study.compare), seed=study.seed,
        checkpoints={name: checkpoints.fingerprint(study.checkpoint(name)) for name in needed_exports(study)},
        machine=[here[key] for key in ("cpu", "gpu_uuid", "driver", "code_sha256")],
    )  # fmt: skip


def needed_exports(study: Study) -> list[str]:
    """The exports that the variants and peers of a study are loaded from."""
    return sorted(
        {variants.parse(name).checkpoint for name in [*study.variants, *[variants.CONTROL] * bool(study.peers)]}
    )


def compare_study(study: Study, device: str | None = None) -> Path:
    """Measure a study's variants and peers side by side; write ``records/compare.json``, ``ratios.csv`` and ``times.csv``.

    Returns the path of the ratios.
    """
    devices.check_requirements(study)
    for name in needed_exports(study):
        if not study.checkpoint(name).is_dir():
            raise UserError(
                f"no checkpoint at {study.checkpoint(name)}: make it with 'python -m vitnb run finetune -p study {study.typed}'"
            )
    started = records_run.begin("compare", study.typed, variants=study.variants, peers=study.peers, device=device)
    found = measure_comparison(study, device, resume_cache(started))
    logits = accuracy.load_logits(study)
    record = started.save(**found, answers=accuracy.kl_to_baseline(logits), engines=accuracy.engine_agreement(logits))
    for name, table in (("ratios", comparison.ratio_table(record)), ("times", comparison.time_table(record))):
        write_file(study.outputs / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    return study.outputs / "ratios.csv"


FEWEST_ROUNDS = 20


def _fail(failed: dict[str, str] | None, name: str, error: VariantError) -> None:
    """Keep the reason, or raise the error again where nobody keeps it."""
    if failed is None:
        raise error
    failed[name] = one_line(error)


def first_forwards(
    workers: dict[str, list[WorkerProcess]], batch_size: int, failed: dict[str, str], ready: Callable[[str], None]
) -> None:
    """The first forward of every process at this batch size, all at once: what is compiled is compiled together.

    Args:
        failed: where the reasons of those that fail are kept; ready: told each name that does not, in the order of ``workers``.
    """
    asked: dict[str, list[WorkerProcess]] = {name: [] for name in workers}
    for name, several in workers.items():
        for worker in several:
            try:
                worker.send("prepare", batch_size=batch_size)
                asked[name].append(worker)
            except VariantError as error:
                _fail(failed, name, error)
    for name, several in asked.items():
        for worker in several:  # all of them: an answer that is left over would pass for the next question's
            try:
                worker.receive()
            except VariantError as error:
                _fail(failed, name, error)
        if name not in failed:
            ready(name)


def warm_up_workers(
    workers: dict[str, list[WorkerProcess]], batch_size: int, failed: dict[str, str] | None = None
) -> dict[str, list[dict]]:
    """Bring every process to a stable time at this batch size; what each answers, see ``workers.Bench.warm_up``.

    One that fails is left out, its reason in ``failed``; without such a dict its error is raised.
    """
    warmed = {}
    for name, several in workers.items():
        try:
            warmed[name] = [worker.ask("warm_up", batch_size=batch_size) for worker in several]
        except VariantError as error:
            _fail(failed, name, error)
    return warmed


def time_interleaved(
    workers: dict[str, list[WorkerProcess]],
    batch_size: int,
    budget: Compare,
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
