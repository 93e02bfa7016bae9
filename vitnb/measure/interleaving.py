"""Time several models interleaved: short blocks of each, in rounds.

In each round, every model times one short block of forwards, in an order drawn anew. A
shared machine is faster in one minute and slower in the next. Interleaved models meet
the same minutes, so the ratio of their times is stable where the times are not.
"""

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vitnb import statistics
from vitnb.errors import UserError, as_known_error, one_line
from vitnb.study import Compare

FEWEST_ROUNDS = 20
LOOK_EVERY = 10  # rounds, from FEWEST_ROUNDS on


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


@dataclass
class Rounds:
    """The times of interleaved rounds.

    blocks: {variant: [rounds][forwards] milliseconds}. turns: {variant: [rounds] index
    of the process that had the round}. ended: why there were no more rounds.
    """

    blocks: dict[str, list[list[float]]]
    turns: dict[str, list[int]]
    ended: str = ""


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


def draw_turns(processes: int, random: np.random.Generator) -> list[int]:
    """Return the indices of all processes, in random order.

    After each such cycle of rounds, every process has had as many as the others.
    """
    return random.permutation(processes).tolist()


def are_precise(rounds: Rounds, precision: float) -> bool:
    """Tell whether the time of every process is known as precisely as asked.

    Only the spread of a process's own rounds counts. A rule that looked at differences
    between processes, or between variants, would end when these happen to look small or
    large, and p-values would no longer be what they say.

    Args:
        precision: the largest standard error, as a share of the time.
    """
    medians = {name: np.median(some, axis=1) for name, some in rounds.blocks.items()}
    fitted = statistics.fit_process_times(medians, rounds.turns)
    return max(fitted.standard_errors().values()) <= precision


def time_interleaved(
    timed: dict[str, list[Timed]],
    batch_size: int,
    budget: Compare,
    seed: int = 0,
    failed: dict[str, str] | None = None,
) -> Rounds:
    """Time blocks of forwards in rounds, every variant once a round.

    The order is drawn anew for each round. So is the process whose turn it is, such
    that all processes of a variant have equally many rounds: two processes of one
    program differ by a percent, by where their memory lies, and this must not pass for
    a difference between variants. The rounds end as soon as they are precise, see
    ``are_precise``, after ``budget.rounds`` or after ``budget.seconds``, but not before
    FEWEST_ROUNDS.

    Args:
        timed: {variant: its processes}.
        failed: see ``record_failure``. A variant that fails loses its blocks.
    """
    random = np.random.default_rng(seed)
    timed = dict(timed)
    done = Rounds({name: [] for name in timed}, {name: [] for name in timed})
    waiting: dict[str, list[int]] = {name: [] for name in timed}
    begin = time.perf_counter()
    for count in range(budget.rounds):
        if not timed:
            break
        if count >= FEWEST_ROUNDS:
            if time.perf_counter() - begin > budget.seconds:
                done.ended = f"after {budget.seconds:g} s"
                break
            looked_at = count % LOOK_EVERY == 0
            if looked_at and are_precise(done, budget.precision):
                done.ended = f"as precise as {budget.precision:.2%}"
                break
        for name in random.permutation(list(timed)).tolist():
            waiting[name] = waiting[name] or draw_turns(len(timed[name]), random)
            turn = waiting[name].pop()
            one = timed[name][turn]
            try:
                done.blocks[name].append(one.time_block(batch_size, budget.forwards))
                done.turns[name].append(turn)
            except Exception as error:
                record_failure(failed, name, error)
                del timed[name], done.blocks[name], done.turns[name]
    else:
        done.ended = f"after {budget.rounds} rounds"
    return done
