"""Studies: one question on one data set and one base model, each a YAML file under ``studies/``.

A study says what is compared and within which budget, and what is expected to come out, with a range.

Dataclasses from what YAML gives: every key known, every value of its field's type, every error in one line.
"""

import os
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import get_args, get_origin

import yaml

from vitnb.errors import UserError, one_line, suggest
from vitnb.variants import PLAN_NAME, SOURCE_STUDY, parse

ROOT = Path(__file__).resolve().parent.parent


# What a user might take instead of a variant of ours; ``peers`` builds them.
PEERS = ("timm-compile", "torchao-fp8-compile")


@dataclass(frozen=True)
class Finetune:
    """Budget of the training, in steps that every machine repeats, not in seconds."""

    epochs: int = 12
    patience: int = 4  # epochs without a better validation top-1 before the training stops
    batch_size: int = 32
    learning_rate: float = 1e-3  # peak of the one-cycle schedule (AdamW)
    dropout: float = 0.1  # in the adapters
    crop_scale: float = 0.6  # smallest area of a random crop, as a share of the image
    label_smoothing: float = 0.0  # share of the target that is spread over all classes (arXiv:1512.00567)
    seeds: int = 1  # trainings, each with a seed of its own; the first is exported (see ``repeats``)


@dataclass(frozen=True)
class Latency:
    """Budget of the timing of one variant at one batch size: whichever is reached first, but never under 20 samples."""

    samples: int = 1000
    seconds: float = 10.0


@dataclass(frozen=True)
class Compare:
    """Budget of the comparison at one batch size: whichever is reached first, but never under 20 rounds."""

    rounds: int = 60
    seconds: float = 60.0
    forwards: int = 2  # timed forwards of a variant in one round
    processes: int = 2  # live processes of each variant


@dataclass(frozen=True)
class Pretrain:
    """How a base is trained from scratch on the garden (see ``vitnb/pretrain.py``). The defaults are ``data/base``'s."""

    hidden_size: int = 128
    layers: int = 12
    heads: int = 2
    patch_size: int = 8  # pixels
    image_size: int = 64  # pixels a side that the model sees
    drawn_size: int = 64  # pixels a side that are drawn, then resized as the preprocessor resizes
    residual_scale: float = 1.0  # of the initial weights that end each branch; 0: blocks start as identities
    steps: int = 5000
    batch_size: int = 1024
    learning_rate: float = 3e-4  # peak: warm-up, then cosine to 0
    warmup_steps: int = 1000  # at most a quarter of the steps
    keep_tokens: float = 1.0  # share of the patches, drawn at random, that a step sees
    full_steps: int = 0  # the last steps, which see all patches
    minutes: float = 0.0  # stop early, with nothing written, if the steps would take longer; 0: no limit


@dataclass(frozen=True)
class Study:
    """One study; see ``studies/embedded.yaml`` for what each field holds."""

    name: str
    title: str
    question: str
    data: str
    base: str = ""  # left out where ``pretrain`` makes one
    get_data: str = ""  # one line that says where the images come from when they are missing
    requires: str = ""  # "gpu", or nothing
    seed: int = 0
    variants: list[str] = field(default_factory=lambda: list(SOURCE_STUDY))
    peers: list[str] = field(default_factory=list)  # of PEERS: they take turns with the variants
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    waterfall: list[int] = field(default_factory=list)  # batch sizes of the waterfall (see ``waterfall``); empty: none
    infer_variant: str = "nf4-sdpa"
    ablate_bits: list[int] = field(default_factory=lambda: [4, 8])
    plans: dict[str, float] = field(
        default_factory=dict
    )  # name of a plan -> bytes beyond uniform NF4, as a share (``planning``)
    pretrain: Pretrain | None = None
    finetune: Finetune = Finetune()
    latency: Latency = Latency()
    compare: Compare = Compare()
    expected: dict[str, list[float]] = field(default_factory=dict)  # name of a result -> [low, high]
    typed: str = ""  # how the user named the study, for messages that quote a command; set by ``load``

    @property
    def outputs(self) -> Path:
        """Where this study's results go: ``outputs/<study>``, or below ``$VITNB_OUTPUTS``."""
        return Path(os.environ.get("VITNB_OUTPUTS", ROOT / "outputs")).resolve() / self.name

    @property
    def own_base(self) -> Path:
        """The folder of the base that a study with ``pretrain`` makes."""
        return self.outputs / "base"

    def sizes(self, asked: int | None) -> list[int]:
        """The batch sizes to time: the one that was asked for, or the study's own; UserError below 1."""
        if asked is not None and asked < 1:
            raise UserError(f"batch_size must be at least 1, got {asked}")
        return self.batch_sizes if asked is None else [asked]

    def trainings(self, asked: int | None) -> int:
        """How many trainings: as many as were asked for, or the study's own; UserError below 1."""
        if asked is not None and asked < 1:
            raise UserError(f"seeds must be at least 1, got {asked}")
        return self.finetune.seeds if asked is None else asked

    def checkpoint(self, name: str) -> Path:
        """The folder of the export called ``merged``, ``nf4`` or ``int8``."""
        return self.outputs / "checkpoints" / name


def _check(study: Study, path: Path) -> None:
    """Raise UserError for a value of the right type that no study can have."""
    if study.name in ("", ".", "..") or Path(study.name).name != study.name:
        raise UserError(f"{path}: name is that of a folder below outputs/, got '{study.name}'")
    if study.requires not in ("", "gpu"):
        raise UserError(f"{path}: requires may be 'gpu' or left out, got '{study.requires}'")
    if not study.variants:
        raise UserError(f"{path}: variants must name at least one")
    for name in [*study.variants, study.infer_variant]:
        if (plan := parse(name).plan) and plan not in study.plans:
            raise UserError(
                f"{path}: '{name}' is of a plan that is not made here: add it, such as 'plans: {{{plan}: 0.12}}'"
            )
    for name in study.peers:
        if name not in PEERS:
            raise UserError(f"{path}: unknown peer '{name}': {suggest(name, PEERS)}")
    if not study.batch_sizes or min(study.batch_sizes) < 1:
        raise UserError(f"{path}: batch_sizes must be positive whole numbers, got {study.batch_sizes}")
    if study.waterfall and min(study.waterfall) < 1:
        raise UserError(f"{path}: waterfall must hold positive whole numbers, batch sizes, got {study.waterfall}")
    if not set(study.ablate_bits) <= {4, 8}:
        raise UserError(f"{path}: ablate_bits may hold 4 and 8, got {study.ablate_bits}")
    for name, share in study.plans.items():
        if not PLAN_NAME.fullmatch(name) or not 0 < share <= 10:
            raise UserError(
                f"{path}: plans: a name of letters and digits, and a share of bytes such as 0.12, got '{name}: {share}'"
            )
    if bool(study.base) == bool(study.pretrain):
        both = "has base and pretrain: leave one out" if study.base else "lacks base, or pretrain to make one"
        raise UserError(f"{path}: {both}")
    for part in ("finetune", "latency", "compare", *["pretrain"] * bool(study.pretrain)):
        for name, value in vars(getattr(study, part)).items():
            shares = {"crop_scale": 0 < value <= 1, "keep_tokens": 0 < value <= 1}
            shares |= dict.fromkeys(("dropout", "label_smoothing"), 0 <= value < 1)
            shares |= dict.fromkeys(("residual_scale", "full_steps", "minutes"), value >= 0)
            if not shares.get(name, value > 0):
                raise UserError(f"{path}: {part}: '{name}' cannot be {value}")
    if made := study.pretrain:
        for name, of, parts in (("heads", "hidden_size", made.heads), ("patch_size", "image_size", made.patch_size)):
            if getattr(made, of) % parts:
                raise UserError(f"{path}: pretrain: {name} {parts} does not divide {of} {getattr(made, of)}")
        if made.full_steps > made.steps:
            raise UserError(f"{path}: pretrain: full_steps {made.full_steps} are more than the steps, {made.steps}")
    for name, bounds in study.expected.items():
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            raise UserError(f"{path}: expected: '{name}' must be [low, high], got {bounds}")


def study_names() -> list[str]:
    """The studies under ``studies/``."""
    return sorted(path.stem for path in (ROOT / "studies").glob("*.yaml"))


def load_study(study: str) -> Study:
    """Load a study by its name under ``studies/``, or by the path of a YAML file.

    Raises UserError for an unknown name, an unknown key, a wrong type or an unknown variant.
    """
    path = Path(study) if str(study).endswith((".yaml", ".yml")) else ROOT / "studies" / f"{study}.yaml"
    if not path.is_file():
        raise UserError(f"no study '{study}': {suggest(study, study_names())}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}: not valid YAML: line {error.problem_mark.line + 1}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a study is a mapping of names to values")
    values = {"name": path.stem} | values | {"typed": str(study)}
    for key, kind in (("pretrain", Pretrain), ("finetune", Finetune), ("latency", Latency), ("compare", Compare)):
        if key in values:
            values[key] = from_mapping(kind, values[key], f"{path}: {key}")
    loaded = from_mapping(Study, values, str(path))
    _check(loaded, path)
    return loaded


def _is(value: object, wanted: type) -> bool:
    """Whether a value from YAML is of a field's type; true and false are no numbers."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is list:
        return isinstance(value, list) and all(_is(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, parts[0]) and _is(v, parts[1]) for k, v in value.items())
    return isinstance(value, (int, float) if wanted is float else wanted) and not isinstance(value, bool)


def from_mapping(kind: type, values: object, where: str):
    """Build the dataclass ``kind`` from a mapping; raises UserError for an unknown key, a wrong type or a missing one."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of names to values, got {values!r}")
    known, values = {f.name: f for f in fields(kind)}, dict(values)
    for key, value in list(values.items()):
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}': {suggest(key, known)}")
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
