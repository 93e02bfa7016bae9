"""Anatomy of a wrong benchmark: the source study's nineteen defects, in small.

Every case computes two numbers from real work on a small model: the one that the defect
gives, and the right one. No number is typed in. ``answers`` is about predictions,
``choices`` about picking the best of noisy numbers, ``clocks`` and ``traces`` about
time, ``sizes`` about bytes, and ``conduct`` about failures that nobody noticed.
"""

from vitnb.anatomy import answers, choices, clocks, conduct, figures, sizes, traces
from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case, lines, styled, table

# Number of a defect -> the function that reproduces it: takes a Bench, returns a Case.
CASES = {
    1: answers.preprocessing,
    2: answers.frozen_head,
    3: answers.loose_loading,
    4: clocks.another_model,
    5: clocks.two_factors,
    6: clocks.same_kernel,
    7: sizes.divided,
    8: traces.means_for_totals,
    9: traces.by_name,
    10: sizes.crowded,
    11: clocks.early_percentile,
    12: answers.folder_numbers,
    13: choices.chosen_on,
    14: choices.best_layer,
    15: conduct.head_too,
    16: conduct.nothing_kept,
    17: conduct.swallowed,
    18: conduct.out_of_order,
    19: conduct.pickled,
}


def all_cases(bench: Bench) -> list[Case]:
    """Reproduce all nineteen, in order: about a minute on two CPU cores."""
    return [reproduce(bench) for reproduce in CASES.values()]


__all__ = [
    "CASES",
    "Bench",
    "Case",
    "all_cases",
    "answers",
    "choices",
    "clocks",
    "conduct",
    "figures",
    "lines",
    "sizes",
    "styled",
    "table",
    "traces",
]
