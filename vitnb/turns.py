"""Turns: live processes of each variant, asked in rounds for short blocks of forwards, in an order drawn anew."""

import time
from collections.abc import Callable

import numpy as np

from vitnb import studies
from vitnb.errors import VariantError, one_line
from vitnb.workers import Worker

FEWEST_ROUNDS = 20


def _fail(failed: dict[str, str] | None, name: str, error: VariantError) -> None:
    """Keep the reason, or raise the error again where nobody keeps it."""
    if failed is None:
        raise error
    failed[name] = one_line(error)


def prepare(
    workers: dict[str, list[Worker]], batch_size: int, failed: dict[str, str], ready: Callable[[str], None]
) -> None:
    """The first forward of every process at this batch size, all at once: what is compiled is compiled together.

    Args:
        failed: where the reasons of those that fail are kept; ready: told each name that does not, in the order of ``workers``.
    """
    asked: dict[str, list[Worker]] = {name: [] for name in workers}
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


def warm_up(
    workers: dict[str, list[Worker]], batch_size: int, failed: dict[str, str] | None = None
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


def take(
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
