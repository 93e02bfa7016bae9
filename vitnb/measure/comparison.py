"""Compare variants side by side by interleaved timing.

Every variant lives in processes of its own. In each round, every variant times one
short block of forwards, in an order drawn anew. A shared machine is faster in one
minute and slower in the next. Interleaved variants meet the same minutes, so the ratio
of their times is stable where the times are not.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from vitnb import devices, variants
from vitnb.analysis import comparison
from vitnb.data.splits import load_split
from vitnb.errors import UserError, VariantError
from vitnb.measure import accuracy
from vitnb.measure.external import load_external_variant
from vitnb.measure.interleaving import (
    record_failure,
    time_interleaved,
    warm_up_workers,
)
from vitnb.measure.worker import (
    WorkerProcess,
    load_local_variant,
    start_interpreter,
)
from vitnb.models import checkpoints
from vitnb.records import run as records_run
from vitnb.records.identity import Checkpoints
from vitnb.records.resume import ResumeCache
from vitnb.records.run import Run
from vitnb.study import Study

Workers = dict[str, list[WorkerProcess]]  # the live processes of each variant
Report = Callable[[str], None]  # prints a line on the progress


def call_all(
    workers: Workers, method: str, failed: dict[str, str], **options
) -> Iterator[tuple[str, list]]:
    """Call a method in every process, in all of them at once.

    Yields:
        A variant and the answers of its processes, as soon as all of these answered, in
        the order of ``workers``. A variant that fails is left out, see
        ``record_failure``.
    """
    called: Workers = {name: [] for name in workers}
    for name, several in workers.items():
        for worker in several:
            try:
                worker.send(method, **options)
                called[name].append(worker)
            except VariantError as error:
                record_failure(failed, name, error)
    for name, several in called.items():
        answers = []
        # All are read: an answer left over would pass for the answer to the next call.
        for worker in several:
            try:
                answers.append(worker.receive())
            except VariantError as error:
                record_failure(failed, name, error)
        if name not in failed:
            yield name, answers


def load_all(workers: Workers, report: Report) -> tuple[dict, dict[str, str]]:
    """Load all variants at once.

    Returns:
        {variant: what its first process describes}, {variant: why it cannot be loaded}.
    """
    described: dict[str, dict] = {}
    failed: dict[str, str] = {}
    for name, answers in call_all(workers, "describe", failed):
        described[name] = answers[0]
        report(f"{name} loaded")
    for name, reason in failed.items():
        report(f"{name} failed: {reason}")
    return described, failed


def first_forwards(
    workers: Workers, batch_size: int, failed: dict[str, str], report: Report
) -> None:
    """Run the first forward of every process at once, so that all compile together."""
    calls = call_all(workers, "first_forward", failed, batch_size=batch_size)
    for name, _ in calls:
        report(f"batch {batch_size}: {name} had its first forward")


def compare_batch_size(
    workers: Workers,
    batch_size: int,
    study: Study,
    report: Report,
    described: dict[str, dict],
    unloaded: dict[str, str],
) -> dict:
    """Compare all variants at one batch size.

    Args:
        described, unloaded: what ``load_all`` returned. They are kept with the times: a
            comparison that goes on later loads anew, and another variant may fail.

    Returns:
        warm_up, blocks_ms, turns, failed: by variant; ended: a text; see
        ``measure_comparison``.
        described, unloaded: as given.
    """
    failed: dict[str, str] = {}
    first_forwards(workers, batch_size, failed, report)
    ready = {name: workers[name] for name in workers if name not in failed}
    warmed = warm_up_workers(ready, batch_size, failed)
    warmed = drop_mixed_engines(warmed, failed)
    ready = {name: workers[name] for name in warmed}
    done = time_interleaved(ready, batch_size, study.compare, study.seed, failed)
    for name, reason in failed.items():
        report(f"batch {batch_size}: {name} failed: {reason}")
    rounds = len(next(iter(done.blocks.values()), []))
    together = f"{len(done.blocks)} side by side, {rounds} rounds, ended {done.ended}"
    report(f"batch {batch_size}: {together}")
    return {
        "warm_up": {name: answers[0] for name, answers in warmed.items()},
        "blocks_ms": done.blocks,
        "turns": done.turns,
        "ended": done.ended,
        "failed": failed,
        "described": described,
        "unloaded": unloaded,
    }


def drop_mixed_engines(
    warmed: dict[str, list[dict]], failed: dict[str, str]
) -> dict[str, list[dict]]:
    """Leave out variants whose processes run different engines.

    Their times would be those of no engine. ``failed`` gains the reasons.

    Args:
        warmed: {variant: what each of its processes says}.
    """
    alike = {}
    for name, answers in warmed.items():
        engines = {answer.get("engine_ran") for answer in answers}
        if len(engines) == 1:
            alike[name] = answers
            continue
        reasons = " ".join(answer["engine_reason"] for answer in answers).strip()
        ran = " and ".join(sorted(engines))
        failed[name] = f"its processes ran different engines, {ran}: {reasons}"
    return alike


def gather_failures(by_size: dict[int, dict]) -> dict[str, str]:
    """Return why variants are missing, of all batch sizes together.

    Args:
        by_size: {batch size: what ``compare_batch_size`` returned}.

    Returns:
        {variant that could not be loaded for any batch size, or "variant at batch
        size": reason}.
    """
    failed: dict[str, str] = {}
    for name in by_size[max(by_size)]["unloaded"]:
        reasons = [measured["unloaded"].get(name) for measured in by_size.values()]
        if all(reasons):
            failed[name] = reasons[-1]
    for size, measured in by_size.items():
        for name, reason in (measured["unloaded"] | measured["failed"]).items():
            if name not in failed:
                failed[f"{name} at batch {size}"] = reason
    return failed


def _progress_report() -> Report:
    """Return a function that prints a line with the seconds from now on."""
    begin = time.perf_counter()

    def report(line: str) -> None:
        seconds = time.perf_counter() - begin
        print(f"{line}, {seconds:.0f} s from the start", flush=True)

    return report


def _start_workers(
    study: Study,
    device: str | None,
    stack: ExitStack,
    loads: dict[str, Callable] | None,
) -> Workers:
    """Start the processes of every variant and external model; the stack ends them."""
    if loads is None:
        loads = dict.fromkeys(study.variants, load_local_variant)
        loads |= dict.fromkeys(study.peers, load_external_variant)
    names = [name for name in loads for _ in range(study.compare.processes)]
    pipes: list[Connection | None] = [None for _ in names]
    if devices.select_device(device).type == "cpu" and len(names) > 1:
        process, pipes = start_interpreter(len(names))
        stack.callback(process.wait)  # after the pipes are closed
    workers: Workers = {name: [] for name in loads}
    for name, pipe in zip(names, pipes, strict=True):
        worker = WorkerProcess(study, name, device, loads[name], pipe)
        workers[name].append(stack.enter_context(worker))
    return workers


def measure_comparison(
    study: Study,
    device: str | None = None,
    cache: ResumeCache | None = None,
    exports: Checkpoints | None = None,
    loads: dict[str, Callable] | None = None,
) -> dict:
    """Compare all variants and external models of a study at all of its batch sizes.

    Each has ``study.compare.processes`` live processes.

    Args:
        cache: stores each finished batch size, so that a killed comparison goes on with
            the next one; None: nothing is stored.
        exports: the checkpoints that must be loaded; None: not checked.
        loads: {variant: what makes it, see ``WorkerProcess``}; None: as the study says.

    Returns:
        blocks_ms: {batch size: {variant: [rounds][forwards] milliseconds}}.
        turns: {batch size: {variant: [rounds] index of the process}}.
        ended: {batch size: why there were no more rounds}.
        warm_up: {batch size: {variant: what its first process says, see
            ``LocalVariant.warm_up``}}.
        attention_launched: by variant.
        peers: what each external model describes.
        failed: {variant, or "variant at batch size": reason}.
    """
    cache = cache or ResumeCache(None)
    report = _progress_report()
    by_size = {}
    with ExitStack() as stack:
        workers = _start_workers(study, device, stack, loads)
        described, unloaded = load_all(workers, report)
        if exports:
            check_unchanged(described, exports)
        workers = {name: workers[name] for name in workers if name in described}
        for size in study.batch_sizes:
            measure = partial(
                *(compare_batch_size, workers, size, study, report),
                *(described, unloaded),
            )
            by_size[size] = cache.get(measure, batch_size=size)
    for measured in by_size.values():  # a batch size of an earlier run knows more
        described = measured["described"] | described
    return {
        "blocks_ms": {str(size): one["blocks_ms"] for size, one in by_size.items()},
        "turns": {str(size): one["turns"] for size, one in by_size.items()},
        "ended": {str(size): one["ended"] for size, one in by_size.items()},
        "warm_up": {str(size): one["warm_up"] for size, one in by_size.items()},
        "attention_launched": {
            name: described[name]["attention_launched"]
            for name in study.variants
            if name in described
        },
        "peers": {name: described[name] for name in study.peers if name in described},
        "failed": gather_failures(by_size),
    }


def needed_exports(study: Study) -> list[str]:
    """Return the exports that a study's variants and external models load from."""
    names = list(study.variants)
    if study.peers:
        names.append(variants.CONTROL)
    return sorted({variants.parse(name).checkpoint for name in names})


def _check_exports(study: Study) -> None:
    """Raise UserError if an export that the study needs is missing."""
    for name in needed_exports(study):
        folder = study.checkpoint(name)
        if not folder.is_dir():
            raise UserError(
                f"no checkpoint at {folder}: make it with "
                f"'python -m vitnb run finetune -p study {study.typed}'"
            )


def resume_cache(run: Run) -> ResumeCache:
    """Return the store of the batch sizes that a run has finished.

    Stored times are valid for one machine, one code and one set of exports.
    """
    return ResumeCache(
        run.unfinished,
        run.identity.times_key(),
        asked=run.record["asked"],
        budget=vars(run.study.compare),
        seed=run.study.seed,
    )


def read_exports(study: Study) -> Checkpoints:
    """Return the exports that a study's comparison loads, with their checksums."""
    sums = {
        name: checkpoints.fingerprint(study.checkpoint(name))
        for name in needed_exports(study)
    }
    return Checkpoints(sums)


def check_unchanged(described: dict[str, dict], exports: Checkpoints) -> None:
    """Check that the variants have loaded the exports that the times are stored under.

    Args:
        described: {variant: what it describes}.

    Raises UserError if a checkpoint was replaced in between.
    """
    for name, about in described.items():
        loaded = about.get("checkpoint_sha256")
        export = variants.parse(name).checkpoint if loaded else ""
        if loaded and loaded != exports.sums[export]:
            raise UserError(
                f"the checkpoint of {name} was replaced while it was loaded: "
                "wait for the fine-tuning to end, and run it again"
            )


def compare_study(study: Study, device: str | None = None) -> Path:
    """Compare a study's variants and external models side by side.

    Writes ``records/compare.json``, ``ratios.csv`` and ``times.csv``. With a device in
    their names, they stand beside those of another device.

    Returns:
        The path of the ratios.

    Raises:
        UserError: an export is missing, or the study needs a GPU and there is none.
    """
    devices.check_requirements(study)
    _check_exports(study)
    run = records_run.begin(
        "compare",
        study.typed,
        variants=study.variants,
        peers=study.peers,
        device=device,
    )
    exports = read_exports(study)
    run.depend_on(exports, load_split(study, "test"))
    measured = measure_comparison(study, device, resume_cache(run), exports)
    logits = accuracy.load_logits(study, run.identity)
    record = run.preview(**measured)
    run.save_table("times", comparison.time_table(record))
    table = run.save_table("ratios", comparison.ratio_table(record))
    run.save(
        **measured,
        answers=accuracy.kl_to_baseline(logits),
        engines=accuracy.engine_agreement(logits),
    )
    return study.outputs / table
