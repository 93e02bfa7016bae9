"""Time several models interleaved: short blocks of each, in rounds.

In each round, every model times one short block of forwards, in an order drawn anew. A
shared machine is faster in one minute and slower in the next. Interleaved models meet
the same minutes, so the ratio of their times is stable where the times are not.
"""

import time
from typing import Protocol

import numpy as np

from vitnb.errors import UserError, as_known_error, one_line
from vitnb.study import Compare

FEWEST_ROUNDS = 20


class Timed(Protocol):
    """A model that can be timed, in this process or in another one.

    ``worker.LocalVariant``, ``worker.WorkerProcess`` and ``external.ExternalVariant``
    are of this kind.
    """

    def warm_up(self, batch_size: int) -> dict:
        """Run forwards until their time is stable, and describe the warm-up."""
        ...

    def time_block(self, batch_size: int, forwards: int) -> list[float]:
        """Time some forwards in a row, in milliseconds each."""
        ...


def record_failure(failed: dict[str, str] | None, name: str, error: Exception) -> None:
    """Store the reason why a variant failed.

    Args:
        failed: {variant: reason}, which gains an entry; None: the error is raised.

    Raises:
        UserError: the error is the user's, which concerns all variants.
    """
    known = as_known_error(error)
    if failed is None or isinstance(known, UserError):
        raise known from None
    failed[name] = one_line(known)


def warm_up_workers(
    timed: dict[str, list[Timed]],
    batch_size: int,
    failed: dict[str, str] | None = None,
) -> dict[str, list[dict]]:
    """Bring every model to a stable time at a batch size, one after the other.

    Args:
        failed: see ``record_failure``. A variant that fails is left out.

    Returns:
        {variant: what each of its processes says, see ``LocalVariant.warm_up``}.
    """
    warmed = {}
    for name, several in timed.items():
        try:
            warmed[name] = [one.warm_up(batch_size) for one in several]
        except Exception as error:
            record_failure(failed, name, error)
    return warmed


def time_interleaved(
    timed: dict[str, list[Timed]],
    batch_size: int,
    budget: Compare,
    seed: int = 0,
    failed: dict[str, str] | None = None,
) -> dict[str, list[list[float]]]:
    """Time blocks of forwards in rounds, every variant once a round.

    The order is drawn anew for each round. So is the process whose turn it is: two
    processes of one program differ by a percent, by where their memory lies, and this
    must not pass for a difference between variants. The rounds end after
    ``budget.rounds`` or ``budget.seconds``, but not before FEWEST_ROUNDS.

    Args:
        timed: {variant: its processes}.
        failed: see ``record_failure``. A variant that fails loses its blocks.

    Returns:
        {variant: [rounds][forwards] milliseconds}.
    """
    random = np.random.default_rng(seed)
    timed = dict(timed)
    blocks: dict[str, list[list[float]]] = {name: [] for name in timed}
    begin = time.perf_counter()
    for rounds in range(budget.rounds):
        out_of_time = time.perf_counter() - begin > budget.seconds
        if not timed or (rounds >= FEWEST_ROUNDS and out_of_time):
            break
        for name in random.permutation(list(timed)).tolist():
            one = timed[name][random.integers(len(timed[name]))]
            try:
                blocks[name].append(one.time_block(batch_size, budget.forwards))
            except Exception as error:
                record_failure(failed, name, error)
                del timed[name], blocks[name]
    return blocks
