"""Studies: one question on one data set and one base model, each a YAML file.

A study says what is compared and within which budget, and what is expected to come out,
with a range. Types and limits stand beside the fields. They are checked where a file is
read: a value that code makes, such as by ``dataclasses.replace``, is taken as it is.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    WrapValidator,
)

from vitnb import variants
from vitnb.errors import UserError, one_line, suggest
from vitnb.records.parameters import LARGEST_SEED, check_parameter

ROOT = Path(__file__).resolve().parent.parent
# What a user might take instead of a variant of ours; ``measure.external`` builds them.
PEERS = ("timm-compile", "torchao-fp8-compile")
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


def _number(value: Any, check: Any) -> Any:
    """Check a number and return it as it was written: 0 stays 0, for the records."""
    if isinstance(value, str):  # YAML takes 1e-3 for a string
        with suppress(ValueError):
            value = float(value)
    check(value)
    return value


def _folder(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"name is that of a folder below outputs/, got '{name}'")
    return name


def _peer(name: str) -> str:
    if name not in PEERS:
        raise ValueError(f"unknown peer '{name}': {suggest(name, PEERS)}")
    return name


def _shares(plans: dict[str, float]) -> dict[str, float]:
    for name, share in plans.items():
        if not variants.PLAN_NAME.fullmatch(name) or not 0 < share <= 10:
            raise ValueError(
                "plans: a name of letters and digits, and a share of bytes such as "
                f"0.12, got '{name}: {share}'"
            )
    return plans


def _ranges(expected: dict[str, list[float]]) -> dict[str, list[float]]:
    for name, bounds in expected.items():
        if len(bounds) != 2 or not bounds[0] <= bounds[1]:
            raise ValueError(f"expected: '{name}' must be [low, high], got {bounds}")
    return expected


# Strict: true and false are no numbers, and a float is no int.
Integer = Annotated[int, Strict()]
Count = Annotated[Integer, Field(gt=0)]
Bits = Annotated[Integer, Field(ge=4, le=8, multiple_of=4)]  # 4 or 8
Number = Annotated[float, Strict(), WrapValidator(_number)]
Seed = Annotated[Integer, Field(ge=0, le=LARGEST_SEED)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(gt=0, le=1)]
ShareBelowOne = Annotated[Number, Field(ge=0, lt=1)]
Folder = Annotated[str, AfterValidator(_folder)]
Peer = Annotated[str, AfterValidator(_peer)]
Names = Annotated[list[str], Field(min_length=1)]
Sizes = Annotated[list[Count], Field(min_length=1)]
Plans = Annotated[dict[str, Number], AfterValidator(_shares)]
Ranges = Annotated[dict[str, list[Number]], AfterValidator(_ranges)]


@dataclass(frozen=True)
class Finetune:
    """Budget of the training, in steps that every machine repeats, not in seconds."""

    __pydantic_config__ = CONFIG

    epochs: Count = 12
    patience: Count = 4  # epochs without a better validation top-1
    batch_size: Count = 32
    learning_rate: Positive = 1e-3  # peak of the one-cycle schedule (AdamW)
    dropout: ShareBelowOne = 0.1  # in the adapters
    crop_scale: Share = 0.6  # smallest area of a random crop
    # Share of the target that is spread over all classes (arXiv:1512.00567).
    label_smoothing: ShareBelowOne = 0.0
    seeds: Count = 1  # trainings; the first is exported


@dataclass(frozen=True)
class Latency:
    """Budget of the timing of one variant at one batch size.

    It ends with whichever is reached first, but never under 20 samples.
    """

    __pydantic_config__ = CONFIG

    samples: Count = 1000
    seconds: Positive = 10.0


@dataclass(frozen=True)
class Compare:
    """Budget of the comparison at one batch size.

    It ends with whichever is reached first, but never under 20 rounds. ``precision`` is
    the standard error of a process's time over its own rounds, as a share of the time.
    With one process of each variant, differences below 2% are not called.
    """

    __pydantic_config__ = CONFIG

    rounds: Count = 300
    seconds: Positive = 60.0
    precision: Positive = 0.002
    forwards: Count = 2  # timed forwards of a variant in one round
    processes: Count = 2  # live processes of each variant


@dataclass(frozen=True)
class Pretrain:
    """How a base is trained from scratch on the garden; defaults: ``data/base``'s."""

    __pydantic_config__ = CONFIG

    hidden_size: Count = 128
    layers: Count = 12
    heads: Count = 2
    patch_size: Count = 8  # pixels
    image_size: Count = 64  # pixels a side that the model sees
    # Pixels a side that are drawn, then resized as the preprocessor resizes.
    drawn_size: Count = 64
    # Of the initial weights that end each branch; 0: blocks start as identities.
    residual_scale: NotNegative = 1.0
    steps: Count = 5000
    batch_size: Count = 1024
    learning_rate: Positive = 3e-4  # peak: warm-up, then cosine to 0
    warmup_steps: Count = 1000  # at most a quarter of the steps
    # Share of the patches, drawn at random, that a step sees.
    keep_tokens: Share = 1.0
    full_steps: Annotated[Integer, Field(ge=0)] = (
        0  # the last steps, which see all patches
    )
    # Stop early, with nothing written, if the steps would take longer; 0: no limit.
    minutes: NotNegative = 0.0


@dataclass(frozen=True)
class Study:
    """One study; see ``studies/embedded.yaml`` for what each field holds."""

    __pydantic_config__ = CONFIG

    name: Folder
    title: str
    question: str
    data: str
    base: str = ""  # left out where ``pretrain`` makes one
    get_data: str = ""  # a line that says where to get the images if they are missing
    requires: Literal["", "gpu"] = ""
    seed: Seed = 0
    variants: Names = field(default_factory=lambda: list(variants.SOURCE_STUDY))
    peers: list[Peer] = field(default_factory=list)  # take turns with the variants
    batch_sizes: Sizes = field(default_factory=lambda: [1])
    # Batch sizes of the waterfall; empty: none.
    waterfall: list[Count] = field(default_factory=list)
    infer_variant: str = "nf4-sdpa"
    ablate_bits: list[Bits] = field(default_factory=lambda: [4, 8])
    # Name of a plan -> bytes beyond uniform NF4, as a share.
    plans: Plans = field(default_factory=dict)
    pretrain: Pretrain | None = None
    finetune: Finetune = Finetune()
    latency: Latency = Latency()
    compare: Compare = Compare()
    expected: Ranges = field(default_factory=dict)  # name of a result -> [low, high]
    typed: str = ""  # the user's name for it, for messages; ``load_study`` sets it

    @property
    def outputs(self) -> Path:
        """Return the folder of the results, below ``outputs`` or ``$VITNB_OUTPUTS``."""
        root = Path(os.environ.get("VITNB_OUTPUTS", ROOT / "outputs"))
        return root.resolve() / self.name

    @property
    def own_base(self) -> Path:
        """Return the folder of the base that a study with ``pretrain`` makes."""
        return self.outputs / "base"

    def sizes(self, asked: int | None) -> list[int]:
        """Return the batch sizes to time; UserError for one below 1."""
        check_parameter("batch_size", asked)
        return self.batch_sizes if asked is None else [asked]

    def trainings(self, asked: int | None) -> int:
        """Return how many trainings to do; UserError below 1."""
        check_parameter("seeds", asked)
        return self.finetune.seeds if asked is None else asked

    def checkpoint(self, name: str) -> Path:
        """Return the folder of the export called ``merged``, ``nf4`` or ``int8``."""
        return self.outputs / "checkpoints" / name


# What a list of a study must be, or a choice: pydantic would tell of one item alone.
LIMITS = {
    "requires": "requires may be 'gpu' or left out",
    "variants": "variants must name at least one",
    "batch_sizes": "batch_sizes must be positive whole numbers",
    "waterfall": "waterfall must hold positive whole numbers, batch sizes",
    "ablate_bits": "ablate_bits may hold 4 and 8",
}
# Which problem is told of first; what is not listed is in the middle.
ORDER = {"unexpected_keyword_argument": 0, "invalid_key": 0, "missing": 2}
KINDS = (Pretrain, Finetune, Latency, Compare)
SECTIONS = {kind.__name__.lower(): kind for kind in KINDS}
HINTS = {kind: get_type_hints(kind) for kind in (Study, *KINDS)}
NAMES = [key for key, hint in HINTS[Study].items() if hint in (str, list[str])]


class _Loader(yaml.SafeLoader):
    """Reads YAML, and keeps a name that looks like a number or a date as it is written.

    Keys are names everywhere. True and false stay what they are: whether ``no`` is
    meant as a word is not to be guessed.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        for key, value in node.value:
            names = [key]
            if key.value in NAMES:
                names += value.value if value.id == "sequence" else [value]
            for name in names:
                if name.tag.endswith((":int", ":float", ":timestamp")):
                    name.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _told(error: ValidationError, values: dict) -> str:
    """Tell of the first problem in one line.

    Unknown keys come first: a mistyped key is often the one that is missing.
    """
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: ORDER.get(problem["type"], 1))
    (key, *rest), section, kind = first["loc"], "", Study
    if key in SECTIONS and rest:
        section, kind, values, key = f"{key}: ", SECTIONS[key], values[key], rest[0]
    if ORDER.get(first["type"]) == 0:
        name = first["input"] if first["type"] == "invalid_key" else key
        return f"{section}unknown key '{name}': {suggest(name, HINTS[kind])}"
    if first["type"] == "missing":
        return f"lacks {', '.join(problem['loc'][0] for problem in problems)}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    value = values[key]
    if first["type"] == "dataclass_type":
        return f"{key}: expected a mapping of names to values, got {value!r}"
    if first["type"].endswith("_type"):
        hint = HINTS[kind][key]
        wanted = hint if get_args(hint) else hint.__name__
        told = f"{section}'{key}' must be {wanted}, got {value!r}"
        if first["type"] == "string_type" and isinstance(first["input"], bool):
            told += ": a name that YAML takes for true or false needs quotes"
        return told
    if key in LIMITS:
        return f"{LIMITS[key]}, got {value!r}"
    must = first["msg"].replace("Input should", "it must")
    return f"{section}'{key}' cannot be {value}: {must}"


def _check(study: Study) -> None:
    """Raise UserError for fields that do not go together."""
    for name in [*study.variants, study.infer_variant]:
        if (plan := variants.parse(name).plan) and plan not in study.plans:
            raise UserError(
                f"'{name}' is of a plan that is not made here: add it, such as "
                f"'plans: {{{plan}: 0.12}}'"
            )
    if study.base and study.pretrain:
        raise UserError("has base and pretrain: leave one out")
    if not study.base and not study.pretrain:
        raise UserError("lacks base, or pretrain to make one")
    if made := study.pretrain:
        for part, whole in (("heads", "hidden_size"), ("patch_size", "image_size")):
            parts, size = getattr(made, part), getattr(made, whole)
            if size % parts:
                told = f"{part} {parts} does not divide {whole} {size}"
                raise UserError(f"pretrain: {told}")
        if made.full_steps > made.steps:
            told = f"{made.full_steps} are more than the steps, {made.steps}"
            raise UserError(f"pretrain: full_steps {told}")


def study_names() -> list[str]:
    """Return the names of the studies under ``studies/``."""
    return sorted(path.stem for path in (ROOT / "studies").glob("*.yaml"))


def load_study(study: str) -> Study:
    """Load a study by its name under ``studies/``, or by the path of a YAML file.

    A section, a list or a mapping that is left empty is as if it were not there.

    Raises UserError for an unknown name and for a file with a mistake.
    """
    path = ROOT / "studies" / f"{study}.yaml"
    if str(study).endswith((".yaml", ".yml")):
        path = Path(study)
    if not path.is_file():
        raise UserError(f"no study '{study}': {suggest(study, study_names())}")
    values = _read(path)
    values = {"name": path.stem} | values | {"typed": str(study)}
    for key, hint in HINTS[Study].items():
        may_be_empty = key in SECTIONS or get_origin(hint) in (list, dict)
        if may_be_empty and key in values and values[key] is None:
            del values[key]
    try:
        loaded = TypeAdapter(Study).validate_python(values)
        _check(loaded)
    except ValidationError as error:
        raise UserError(f"{path}: {_told(error, values)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return loaded


def _read(path: Path) -> dict:
    try:
        values = yaml.load(path.read_text(), _Loader)
    except yaml.MarkedYAMLError as error:
        told = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise UserError(f"{path}: not valid YAML: {told}") from None
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a 13th month
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a study is a mapping of names to values")
    return values
