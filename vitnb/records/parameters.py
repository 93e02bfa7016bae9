"""What the parameters of notebooks and commands may be: one table of checks.

``vitnb run`` checks before a kernel starts, ``records.run.begin`` at the top of a
notebook, and the functions that take the parameters check again. All use this table.
A device and a variant are checked by what makes them: ``devices.select_device`` and
``variants.parse``.
"""

import re
from collections.abc import Callable
from pathlib import Path

from vitnb.errors import UserError

BASE_PRECISIONS = ("fp32", "nf4", "int8")  # of the frozen base while training
ABLATED_PARTS = ("layer", "linear")
COUNTS = ("rank", "alpha", "epochs", "processes", "seeds", "batch_size", "steps")
LARGEST_SEED = 2**32 - 1  # NumPy takes no larger one
TARGETS = re.compile(r"\s*\w+\s*(,\s*\w+\s*)*")


def check_parameter(name: str, value: object) -> None:
    """Raise UserError if a parameter cannot have a value.

    None leaves the choice to the study. A parameter that the table lacks may be
    anything.
    """
    if value is not None and name in CHECKS:
        CHECKS[name](name, value)


def check_parameters(asked: dict[str, object]) -> None:
    """Raise UserError for the first parameter that cannot have its value."""
    for name, value in asked.items():
        check_parameter(name, value)
    seed, seeds = asked.get("seed"), asked.get("seeds")
    if seed is not None and seeds is not None:
        check_parameter("seed", seed + seeds - 1)  # of the last training


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")


def _check_seed(name: str, value: int) -> None:
    if not 0 <= value <= LARGEST_SEED:
        raise UserError(f"{name} must be in 0 to {LARGEST_SEED}, got {value}")


def _check_choice(*choices: str) -> Callable[[str, str], None]:
    *others, last = choices

    def check(name: str, value: str) -> None:
        if value not in choices:
            told = f"{', '.join(others)} or {last}"
            raise UserError(f"{name} must be {told}, got '{value}'")

    return check


def _check_targets(name: str, value: str) -> None:
    if not TARGETS.fullmatch(value):
        raise UserError(
            f"{name} must be all, or names separated by commas such as q_proj,v_proj, "
            f"got '{value}'"
        )


def _check_folder(name: str, value: str) -> None:
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: '{name}' takes a folder of pictures, "
            "or nothing for the test split"
        )


CHECKS: dict[str, Callable[[str, object], None]] = {
    **dict.fromkeys(COUNTS, _check_count),
    "seed": _check_seed,
    "targets": _check_targets,
    "base_precision": _check_choice(*BASE_PRECISIONS),
    "by": _check_choice(*ABLATED_PARTS),
    "images": _check_folder,
}
