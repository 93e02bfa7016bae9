"""Dataclasses from what YAML gives: every key known, every value of its field's type, every error in one line."""

from contextlib import suppress
from dataclasses import MISSING, fields
from typing import get_args, get_origin

from vitnb.errors import UserError, nearest


def _is(value: object, wanted: type) -> bool:
    """Whether a value from YAML is of a field's type; true and false are no numbers."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is list:
        return isinstance(value, list) and all(_is(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, parts[0]) and _is(v, parts[1]) for k, v in value.items())
    return isinstance(value, (int, float) if wanted is float else wanted) and not isinstance(value, bool)


def build(kind: type, values: object, where: str):
    """Build the dataclass ``kind`` from a mapping; raises UserError for an unknown key, a wrong type or a missing one."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of names to values, got {values!r}")
    known, values = {f.name: f for f in fields(kind)}, dict(values)
    for key, value in list(values.items()):
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}': {nearest(key, known)}")
        wanted = known[key].type
        if wanted is float and isinstance(value, str):  # YAML takes 1e-3 for a string
            with suppress(ValueError):
                value = values[key] = float(value)
        if not _is(value, wanted):
            name = wanted if get_args(wanted) else wanted.__name__
            raise UserError(f"{where}: '{key}' must be {name}, got {value!r}")
    lacking = [
        f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if lacking:
        raise UserError(f"{where}: lacks {', '.join(lacking)}")
    return kind(**values)
