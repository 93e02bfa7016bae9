"""A case: one defect, with the number that it gives and the number that it should have given."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd
from IPython.display import HTML


@dataclass(frozen=True)
class Case:
    """One reproduced defect.

    number: its row in the table of nineteen (the source study's defects).
    title, what: its name, and what was measured on what.
    unit: of both numbers.
    wrong, right: what the defective way gives, and what the sound way gives; both were computed.
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


def told(value: float | str) -> str:
    """A number as a reader wants it: whole ones whole, others with three digits that count, or two below 0.1."""
    if isinstance(value, str):
        return value
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.3g}"


def table(cases: Iterable[Case]) -> pd.DataFrame:
    """One row a case, by its number: wrong beside right, with the unit and the lesson."""
    rows = sorted(cases, key=lambda case: case.number)
    return pd.DataFrame(
        {
            "defect": [case.title for case in rows],
            "measured": [case.what for case in rows],
            "wrong": [told(case.wrong) for case in rows],
            "right": [told(case.right) for case in rows],
            "unit": [case.unit for case in rows],
            "lesson": [case.lesson for case in rows],
        },
        index=[case.number for case in rows],
    )


def styled(frame: pd.DataFrame) -> HTML:
    """A table for a notebook: whole texts, aligned to the left."""
    left = [{"selector": "th, td", "props": "text-align: left; vertical-align: top"}]
    name = f"{zlib.crc32(frame.to_csv().encode()):x}"  # a stored notebook changes only where its table does
    return HTML(frame.style.set_uuid(name).set_table_styles(left).to_html())


def lines(cases: Iterable[Case]) -> str:
    """The same in a line a case, for numbers that are equal on every machine."""
    return "\n".join(f"{case.title}: wrong {told(case.wrong)}, right {told(case.right)} {case.unit}" for case in cases)
