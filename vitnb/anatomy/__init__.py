"""Anatomy of a wrong benchmark: the source study's nineteen defects, each as small as it can be made.

Every case computes two numbers, the one that the defect gives and the one that is right, from real work on a small
model: nothing is typed in. ``answers`` is about what a model is said to know, ``choices`` about picking the best of
noisy numbers, ``clocks`` and ``traces`` about time, ``sizes`` about bytes, and ``conduct`` about what nobody noticed.
"""



from vitnb.anatomy import answers, choices, clocks, conduct, sizes, traces
from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case

# The number of each defect -> the function that reproduces it: takes a Bench, returns a Case.
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
    """All nineteen, in order: about a minute on two CPU cores."""
    return [case(bench) for case in CASES.values()]


__all__ = [
    "CASES", "Bench", "Case", "all_cases", "answers", "choices", "clocks", "conduct", "figures", "lines", "sizes",
    "styled", "table", "traces",
]  # fmt: skip
