"""Two records side by side: what was asked of each, and what ran.

Values are compared as text. What an older record does not hold is no difference: it is
not known.
"""

from dataclasses import dataclass
from pathlib import Path

from vitnb.records.schema import SECTIONS

# Parts of an identity that times depend on, and answers do not.
MACHINE = ("host", "cores", "threads", "device", "device_id", "driver")
MAPPINGS = {"checkpoints": "checkpoint", "data": "images", "packages": "package"}
NOT_SET = "not set"
LONGEST_ID = 12  # of a GPU, such as GPU-321d8b25
# What every record of today names, and an older one may not.
NAMED = ("host", "checkpoint", "images")


@dataclass(frozen=True)
class Side:
    """One of two records, and the folder of outputs that it lies in."""

    record: dict
    folder: Path


@dataclass(frozen=True)
class Values:
    """Named values of two records.

    Attributes:
        differ: {name: (A's, B's)}.
        same: names of equal values.
        unknown: names of values that an older record does not hold.
    """

    differ: dict[str, tuple[str, str]]
    same: list[str]
    unknown: list[str]


def compare_asked(a: dict, b: dict) -> Values:
    """Compare what was asked of two records.

    It is the parameters, and the parts of the study that the notebook depends on.
    """
    first, second = _asked(a), _asked(b)
    for name in [name for name in first if name in second]:
        values = first.pop(name), second.pop(name)
        are_sections = [isinstance(value, dict) for value in values]
        for one, value in zip((first, second), values, strict=True):
            if all(are_sections):
                one |= {f"{name} {key}": inner for key, inner in value.items()}
            else:  # a section that only one study has is one value
                one[name] = "set" if isinstance(value, dict) else value
    return _compare_values(a, b, first, second)


def compare_ran(a: dict, b: dict) -> Values:
    """Compare what ran, and on what: identity, commit, kernels, engines, Linears.

    Of variants and batch sizes that only one record has, nothing is said here.
    """
    identity = _compare_values(a, b, _identity(a), _identity(b))
    first, second = _observed(a), _observed(b)
    common = [name for name in first if name in second]
    observed = _compare_values(
        *(a, b, *({name: one[name] for name in common} for one in (first, second)))
    )
    return Values(
        identity.differ | observed.differ,
        identity.same + observed.same,
        identity.unknown + observed.unknown,
    )


def _compare_values(a: dict, b: dict, first: dict, second: dict) -> Values:
    """Compare values of two records, {name: value}."""
    differ, same, unknown = {}, [], []
    old = [_is_old(one) for one in (a, b)]
    of_one_kind = a["notebook"] == b["notebook"]
    for name in first | second:
        values = [one.get(name) for one in (first, second)]
        if values[0] == values[1] and values[0] is not None:
            same.append(name)
        elif None in values and not of_one_kind:
            continue  # the other notebook has no such value
        elif any(v is None and is_old for v, is_old in zip(values, old, strict=True)):
            unknown.append(name)
        else:
            texts = tuple(_show(*order) for order in (values, values[::-1]))
            if set(texts) != {NOT_SET, "none"}:  # no wish, and none that could be had
                differ[name] = texts
    return Values(differ, same, unknown)


def _is_old(record: dict) -> bool:
    """Tell whether a record was written before records named all that ran."""
    return "written_as" in record


# --- What was asked, and what ran ---


def _asked(record: dict) -> dict[str, object]:
    """Return {name: value} of all that was asked; the value of a section is a dict."""
    study = record["study_asked"]
    sections = SECTIONS.get(record["notebook"], ())
    of_study = {f"study's {name}": study[name] for name in sections if name in study}
    values = {"notebook": record["notebook"]} | record["asked"] | of_study
    # A wish that was left out is known to be none.
    return {name: NOT_SET if value is None else value for name, value in values.items()}


def _identity(record: dict) -> dict[str, object]:
    identity = record["identity"]
    values = {
        f"{one} {key}": shorten(value) if one != "package" else value
        for name, one in MAPPINGS.items()
        for key, value in identity[name].items()
    }
    if identity["code"]:
        values["code"] = shorten(identity["code"])
    if commit := record["machine"].get("commit"):
        dirty = " with changes" if record["machine"]["dirty"] else ""
        values["commit"] = f"{commit[:7]}{dirty}"
    for name in ("dtype", "device_kind", *MACHINE):
        value = identity[name]
        # Older records do not name a CPU's units.
        if value and not (name == "device_kind" and value == "cpu"):
            values[name.replace("_", " ")] = value
    if "device id" in values:
        values["device id"] = values["device id"][:LONGEST_ID]
    if _is_old(record):
        of_kind = {name.partition(" ")[0] for name in values}
        values |= {name: None for name in NAMED if name not in of_kind}
    return values


def _observed(record: dict) -> dict[str, object]:
    """Return what a record observed of its kernels, engines, Linears and images."""
    observed = ("linears_quantized", "linears_kept", "parameters", "split", "proven_on")
    values = {
        name.replace("_", " "): record[name] for name in observed if name in record
    }
    if record["status"] == "ok":
        values |= OBSERVED.get(record["notebook"], lambda record: {})(record)
    counts = record.get("images")
    if isinstance(counts, dict):
        values |= {f"number of {split} images": n for split, n in counts.items()}
    return values


def _observed_of_evaluation(record: dict) -> dict[str, object]:
    values = {"attention launched": record["attention_launched"]}
    for trace in record["traces"]:
        name = f"attention kernel at batch {trace['batch_size']}"
        values[name] = trace["attention_ran"]
    for size, engine in record["engine_ran"].items():
        reason = record["engine_reason"].get(size)
        told = f"{engine} ({reason})" if reason else engine
        values[f"engine at batch {size}"] = told
    return values


def _observed_of_comparison(record: dict) -> dict[str, object]:
    launched = record["attention_launched"]
    values = {f"attention launched by {name}": one for name, one in launched.items()}
    for size, warmed in record["warm_up"].items():
        for name, one in warmed.items():
            if engine := one.get("engine_ran"):  # older records lack it
                values[f"engine of {name} at batch {size}"] = engine
    return values


def _observed_of_waterfall(record: dict) -> dict[str, object]:
    return {
        f"engine of {name} at batch {size}": engine
        for name, step in record["steps"].items()
        for size, engine in step["engine_ran"].items()
    }


def _observed_of_training(record: dict) -> dict[str, object]:
    return {f"trained {name}": count for name, count in record["trained"].items()}


OBSERVED = {
    "evaluate": _observed_of_evaluation,
    "compare": _observed_of_comparison,
    "waterfall": _observed_of_waterfall,
    "finetune": _observed_of_training,
}


# --- Whether two records are of the same images and machine ---


def other_images(a: dict, b: dict, same_labels: bool) -> str:
    """Return why two records are not of the same images; empty if they are.

    Older records do not name their images: the study's data and the labels stand for
    them.
    """
    first, second = (one["identity"]["data"] for one in (a, b))
    if first and second:
        same = first == second
    else:
        same = a["study_asked"]["data"] == b["study_asked"]["data"]
    return "" if same and same_labels else "other images"


def other_machine(a: dict, b: dict) -> str:
    """Name what the machines of two records differ in, as far as it is known.

    It is empty if nothing differs.
    """
    differ = [
        name
        for name in MACHINE
        if a["identity"][name]
        and b["identity"][name]
        and a["identity"][name] != b["identity"][name]
    ]
    # Another GPU's number says no more than its name, if that differs too.
    if "device" in differ and "device_id" in differ:
        differ.remove("device_id")
    names = ", ".join(name.replace("_", " ") for name in differ)
    return f"different machines ({names})" if names else ""


# --- Text of values ---


def shorten(digest: object) -> str:
    """Return the first characters of a long digest."""
    return str(digest)[:8]


def _show(value: object, other: object) -> str:
    """Return a value as text; of two lists, what this one has and the other lacks."""
    if value in (None, "", "-"):  # "-": of a package
        return "none"
    if isinstance(value, list):
        if isinstance(other, list) and len(value) + len(other) > 6:
            own = [str(item) for item in value if item not in other]
            if own:
                return f"{len(value)}, with {', '.join(own)}"
            if len(value) != len(other):
                return f"{len(value)}"
        return ", ".join(map(str, value)) or "none"
    return str(value)
