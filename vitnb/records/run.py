"""Run a notebook or a measurement, and write its record.

A record is a JSON file. It holds the parameters, the results with their raw samples,
and the machine. It is written whole or not at all.
"""

import json
import random
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from IPython import get_ipython

from vitnb import devices, variants
from vitnb.errors import UserError, VariantError, as_known_error, one_line
from vitnb.records import machine
from vitnb.records.files import write_array, write_file
from vitnb.study import Study, load_study


class Run:
    """One run: its parameters, and the record that it writes.

    Args:
        notebook: name of the notebook or of the measurement.
        asked: the parameters. They stand in the record.

    Attributes:
        name: of the record, see ``record_name``.
        path: of the record.
        unfinished: folder for results of a measurement that was killed, see ``resume``.
        device: the device that was asked for, or the GPU if there is one.
        batch_sizes: to measure, of ``evaluate`` alone.
    """

    def __init__(self, notebook: str, study: Study, asked: dict):
        self.study = study
        if asked.get("seed") is None:
            asked["seed"] = study.seed
        self.seed = asked["seed"]
        self.variant = None
        if asked.get("variant"):
            self.variant = variants.parse(asked["variant"])
        self.device = devices.select_device(asked.get("device"))
        self.name = record_name(notebook, study, asked)
        self.path = study.outputs / "records" / f"{self.name}.json"
        self.unfinished = study.outputs / "unfinished" / self.name
        if notebook == "evaluate":
            self.batch_sizes = study.sizes(asked.get("batch_size"))
            asked["batch_sizes"] = self.batch_sizes
        self.record = {
            "notebook": notebook,
            "study": study.name,
            "name": self.name,
            "asked": asked,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "study_asked": asdict(study),
            "machine": machine.describe_machine(),
            "versions": machine.versions(),
        }
        self._started = time.perf_counter()

    def save_array(self, kind: str, values: np.ndarray) -> str:
        """Write an array that is too large for a record to a file of its own.

        Args:
            kind: name of the folder, such as ``logits``.

        Returns:
            The path of the file, relative to the outputs of the study.
        """
        name = f"{kind}/{self.name}.npy"
        write_array(self.study.outputs / name, values)
        return name

    def save(self, **results) -> dict:
        """Write the record with its results, and return it as a reader will see it."""
        record = self._write({"status": "ok", "reason": ""} | results)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        with suppress(OSError):  # missing, or used by another measurement
            self.unfinished.parent.rmdir()
        return record

    def fail(self, error: BaseException) -> dict:
        """Write a record without results that says why there are none."""
        return self._write({"status": "failed", "reason": one_line(error)})

    def _write(self, results: dict) -> dict:
        seconds = round(time.perf_counter() - self._started, 1)
        record = self.record | {"seconds": seconds} | results
        text = json.dumps(record, default=_to_json, allow_nan=False, indent=1)
        write_file(self.path, text + "\n")
        return json.loads(text)


def record_name(notebook: str, study: Study, asked: dict) -> str:
    """Return the name of a record: the notebook, and what sets this run apart.

    Two runs share a record if they ask the same question of a study. Then the later run
    replaces the record. ``infer`` with the variant that the study names is called
    ``infer``, because the report shows this record.
    """
    parts = [notebook]
    if notebook == "evaluate":
        parts.append(variants.parse(asked["variant"]).file)
        if asked.get("batch_size"):
            parts.append(f"b{asked['batch_size']}")
        if asked.get("device"):
            parts.append(asked["device"])
    elif notebook == "infer":
        if asked["variant"] != study.infer_variant:
            parts.append(variants.parse(asked["variant"]).file)
        if asked.get("images"):
            parts.append(Path(asked["images"]).expanduser().resolve().name)
    elif notebook == "ablate":
        if asked.get("by", "layer") != "layer":
            parts.append(asked["by"])
    elif notebook == "plan":
        parts.append(asked["name"])
    return "-".join(parts)


# Runs of a variant in this process. An error that ends a notebook belongs to the last.
_VARIANT_RUNS: list[Run] = []


def begin(notebook: str, study: str, **asked) -> Run:
    """Load a study, check that this machine can run it, and seed all generators.

    Args:
        notebook: name of the notebook or of the measurement.
        study: a name under ``studies/``, or the path of a YAML file.
        asked: the other parameters. They stand in the record. ``seed=None`` takes the
            seed of the study.

    Raises:
        UserError: an unknown study or variant, or a study that needs a GPU on a machine
            without one.
    """
    _show_errors_in_one_line()
    loaded = load_study(study)
    devices.check_requirements(loaded)
    run = Run(notebook, loaded, asked)
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    if run.variant:
        _VARIANT_RUNS.append(run)
    return run


def _show_errors_in_one_line() -> None:
    """Show known errors of a notebook in one line, and record a variant that fails.

    Running out of memory is the error of a library. The variant fails all the same.
    """
    shell = get_ipython()
    if shell is None:
        return

    def show(shell, kind, error, trace, tb_offset=None):
        error = as_known_error(error)
        if isinstance(error, VariantError) and _VARIANT_RUNS:
            _VARIANT_RUNS[-1].fail(error)
        kind = type(error)
        shell._showtraceback(kind, error, [f"{kind.__name__}: {one_line(error)}"])

    shell.set_custom_exc((UserError, VariantError, torch.OutOfMemoryError), show)


def _to_json(value: object):
    """Return values of NumPy, PyTorch and pathlib as JSON can hold them."""
    if isinstance(value, (np.generic, torch.Tensor)):
        return value.item() if value.ndim == 0 else value.tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}")
