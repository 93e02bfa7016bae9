"""A case: one defect, with the number that it gives and the right number."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd
from IPython.display import HTML


@dataclass(frozen=True)
class Case:
    """One reproduced defect.

    number: row in the table of the source study's nineteen defects.
    title: name of the defect.
    what: what was measured, on what.
    unit: unit of both numbers.
    wrong: the number of the defective way, computed.
    right: the number of the sound way, computed.
    lesson: the habit that makes the defect impossible or visible.
    extra: whatever else was computed, for figures and tests.
    """

    number: int
    title: str
    what: str
    unit: str
    wrong: float | str
    right: float | str
    lesson: str
    extra: dict = field(default_factory=dict)


def format_number(value: float | str) -> str:
    """Format a number for a reader.

    A whole number has no decimals. Others have three significant digits, or two
    below 0.1.
    """
    if isinstance(value, str):
        return value
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.3g}"


def table(cases: Iterable[Case]) -> pd.DataFrame:
    """Return one row for each case, by its number: wrong beside right."""
    rows = sorted(cases, key=lambda case: case.number)
    return pd.DataFrame(
        {
            "defect": [case.title for case in rows],
            "measured": [case.what for case in rows],
            "wrong": [format_number(case.wrong) for case in rows],
            "right": [format_number(case.right) for case in rows],
            "unit": [case.unit for case in rows],
            "lesson": [case.lesson for case in rows],
        },
        index=[case.number for case in rows],
    )


def styled(frame: pd.DataFrame) -> HTML:
    """Return a table for a notebook, with whole texts, aligned to the left."""
    left = [
        {"selector": "th, td", "props": "text-align: left; vertical-align: top"},
    ]
    # With a fixed name, a stored notebook changes only where its table does.
    name = f"{zlib.crc32(frame.to_csv().encode()):x}"
    return HTML(frame.style.set_uuid(name).set_table_styles(left).to_html())


def lines(cases: Iterable[Case]) -> str:
    """Return one line for each case, for numbers that are equal on every machine."""
    return "\n".join(
        f"{case.title}: wrong {format_number(case.wrong)}, "
        f"right {format_number(case.right)} {case.unit}"
        for case in cases
    )
