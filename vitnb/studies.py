"""Studies: one question on one data set and one base model, each a YAML file under ``studies/``.

A study says what is compared and within which budget, and what is expected to come out, with a range.
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from vitnb import variants
from vitnb.errors import UserError, nearest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finetune:
    """Budget of the training, in steps that every machine repeats, not in seconds."""

    epochs: int = 12
    patience: int = 4  # epochs without a better validation top-1 before the training stops
    batch_size: int = 32
    learning_rate: float = 1e-3  # peak of the one-cycle schedule (AdamW)
    crop_scale: float = 0.6  # smallest area of a random crop, as a share of the image


@dataclass(frozen=True)
class Latency:
    """Budget of the timing of one variant at one batch size: whichever is reached first."""

    samples: int = 1000
    seconds: float = 10.0


@dataclass(frozen=True)
class Study:
    """One study; see ``studies/embedded.yaml`` for what each field holds."""

    name: str
    title: str
    question: str
    data: str
    base: str
    get_data: str = ""  # one line that says where the images come from when they are missing
    requires: str = ""  # "gpu", or nothing
    seed: int = 0
    variants: list[str] = field(default_factory=lambda: list(variants.REGISTRY))
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    infer_variant: str = "nf4-sdpa"
    ablate_bits: list[int] = field(default_factory=lambda: [4, 8])
    finetune: Finetune = Finetune()
    latency: Latency = Latency()
    expected: dict[str, list[float]] = field(default_factory=dict)  # name of a result -> [low, high]

    @property
    def outputs(self) -> Path:
        """Where this study's results go: ``outputs/<study>``, or below ``$VITNB_OUTPUTS``."""
        return Path(os.environ.get("VITNB_OUTPUTS", ROOT / "outputs")).resolve() / self.name

    def sizes(self, asked: int | None) -> list[int]:
        """The batch sizes to time: the one that was asked for, or the study's own; UserError below 1."""
        if asked is not None and asked < 1:
            raise UserError(f"batch_size must be at least 1, got {asked}")
        return self.batch_sizes if asked is None else [asked]

    def checkpoint(self, name: str) -> Path:
        """The folder of the export called ``merged``, ``nf4`` or ``int8``."""
        return self.outputs / "checkpoints" / name


def _typed(kind: type, values: object, where: str):
    """Build the dataclass ``kind`` from a mapping; raises UserError for an unknown key, a wrong type or a missing one."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of names to values, got {values!r}")
    known = {f.name: f for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}': {nearest(key, known)}")
        wanted = known[key].type
        if wanted in (int, float, str) and not isinstance(value, (int, float) if wanted is float else wanted):
            raise UserError(f"{where}: '{key}' must be {wanted.__name__}, got {value!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None


def names() -> list[str]:
    """The studies under ``studies/``."""
    return sorted(path.stem for path in (ROOT / "studies").glob("*.yaml"))


def load(study: str) -> Study:
    """Load a study by its name under ``studies/``, or by the path of a YAML file.

    Raises UserError for an unknown name, an unknown key, a wrong type or an unknown variant.
    """
    path = Path(study) if str(study).endswith((".yaml", ".yml")) else ROOT / "studies" / f"{study}.yaml"
    if not path.is_file():
        raise UserError(f"no study '{study}': {nearest(study, names())}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a study is a mapping of names to values")
    values = {"name": path.stem} | values
    for key, kind in (("finetune", Finetune), ("latency", Latency)):
        if key in values:
            values[key] = _typed(kind, values[key], f"{path}: {key}")
    loaded = _typed(Study, values, str(path))
    for name in [*loaded.variants, loaded.infer_variant]:
        variants.get(name)
    if not all(isinstance(size, int) and size > 0 for size in loaded.batch_sizes):
        raise UserError(f"{path}: batch_sizes must be positive whole numbers, got {loaded.batch_sizes}")
    if not set(loaded.ablate_bits) <= {4, 8}:
        raise UserError(f"{path}: ablate_bits may hold 4 and 8, got {loaded.ablate_bits}")
    return loaded
