"""Run a notebook or a measurement, and write its record.

A record is a JSON file. It holds the parameters, the results with their raw samples,
and the machine. It is written whole or not at all.
"""

import hashlib
import json
import random
import re
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from IPython import get_ipython

from vitnb import devices, variants
from vitnb.errors import (
    UserError,
    VariantError,
    as_known_error,
    describe_file_error,
    one_line,
)
from vitnb.records import SCHEMA, machine
from vitnb.records.files import array_digest, write_array, write_csv, write_file
from vitnb.records.identity import Dependency, identify
from vitnb.records.parameters import check_parameters
from vitnb.records.schema import SECTIONS, upgrade
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
        identity: what the results depend on, see ``depend_on``.
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
        about = machine.describe_machine()
        self.record = {
            "schema": SCHEMA,
            "notebook": notebook,
            "study": study.name,
            "name": self.name,
            "asked": asked,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "study_asked": asdict(study),
            "machine": about,
            "versions": machine.versions(),
        }
        self.identity = identify(self.device, about)
        self._arrays: dict[str, np.ndarray] = {}
        self._tables: dict[str, pd.DataFrame] = {}
        self._started = time.perf_counter()

    def depend_on(self, *things: Dependency) -> None:
        """Note what the results depend on, as soon as it is loaded.

        Args:
            things: loaded variants and splits.
        """
        self.identity = self.identity.depend_on(*things)

    def save_array(self, kind: str, values: np.ndarray) -> str:
        """Keep an array that is too large for a record, for a file of its own.

        The file is written together with the record.

        Args:
            kind: name of the folder, such as ``logits``.

        Returns:
            The path of the file, relative to the outputs of the study.
        """
        name = f"{kind}/{self.name}.npy"
        self._arrays[name] = values
        return name

    def save_table(self, kind: str, table: pd.DataFrame) -> str:
        """Keep a table of results, for a CSV file beside the folder of records.

        The file is written together with the record. Its name has what sets the run
        apart, as the record's name has.

        Args:
            kind: the first word of the file's name, such as ``predictions``.

        Returns:
            The name of the file.
        """
        apart = self.name.removeprefix(self.record["notebook"])
        name = f"{kind}{apart}.csv"
        self._tables[name] = table
        return name

    def save(self, **results) -> dict:
        """Write the record with its results, and return it as a reader will see it."""
        record = self._write({"status": "ok", "reason": ""} | results)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        with suppress(OSError):  # missing, or used by another measurement
            self.unfinished.parent.rmdir()
        return record

    def preview(self, **results) -> dict:
        """Return the record with its results as a reader will see it; write nothing.

        Tables that are saved with the record are computed from it.
        """
        return json.loads(self._text({"status": "ok", "reason": ""} | results))

    def fail(self, error: BaseException) -> dict:
        """Write a record without results that says why there are none."""
        return self._write({"status": "failed", "reason": one_line(error)})

    @property
    def earlier(self) -> Path | None:
        """The folder to keep what an earlier run of this name has left.

        It is None if there was none, or if it asked the same question.
        """
        before = self._record_before()
        if before is None or question(before) == self._question():
            return None
        return self._folder_for(before)

    def _question(self) -> dict:
        return question(self.record | {"identity": self.identity.as_record()})

    def _text(self, results: dict) -> str:
        """Return the record as JSON."""
        seconds = round(time.perf_counter() - self._started, 1)
        record = self.record | {"identity": self.identity.as_record()}
        arrays = {name: array_digest(values) for name, values in self._arrays.items()}
        record |= {"arrays": arrays, "tables": list(self._tables), "seconds": seconds}
        record |= results
        return json.dumps(record, default=_to_json, allow_nan=False, indent=1) + "\n"

    def _write(self, results: dict) -> dict:
        text = self._text(results)
        self._set_aside(failed=results["status"] == "failed")
        for name, values in self._arrays.items():
            write_array(self.study.outputs / name, values)
        for name, table in self._tables.items():
            write_csv(self.study.outputs / name, table)
        write_file(self.path, text)
        return json.loads(text)

    def _record_before(self) -> dict | None:
        """Return the record that this run would replace, if there is one."""
        try:
            return upgrade(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError):
            return None

    def _set_aside(self, failed: bool) -> None:
        """Move an earlier record away if this one does not take its place.

        It does not if it answers another question, or if it failed.
        """
        before = self._record_before()
        if before is None:
            return
        lost = failed and before["status"] == "ok"
        if not lost and question(before) == self._question():
            return
        folder = self._folder_for(before)
        files = [f"records/{self.path.name}", *before["arrays"], *before["tables"]]
        for name in files:
            path = self.study.outputs / name
            if path.exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(folder / name)
        told = folder.relative_to(self.study.outputs)
        print(f"the earlier record {self.name} is kept in {told}", flush=True)

    def _folder_for(self, before: dict) -> Path:
        """Return the folder to keep an earlier record in."""
        when = re.sub(r"\W", "", before["started"][:19])
        return self.study.outputs / "earlier" / f"{before['name']}-{when}"


def question(record: dict) -> dict:
    """Return what a record answers.

    It is what was asked, the parts of the study that matter for it, and the device.
    """
    sections = SECTIONS.get(record["notebook"], ())
    study = json.loads(json.dumps(record.get("study_asked", {}), default=str))
    return {
        "notebook": record["notebook"],
        "asked": json.loads(json.dumps(record["asked"], default=str)),
        "study": {name: study.get(name) for name in sections},
        "device": record["identity"]["device"],
    }


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
    elif notebook == "infer":
        if asked["variant"] != study.infer_variant:
            parts.append(variants.parse(asked["variant"]).file)
        if asked.get("images"):
            parts.append(folder_name(asked["images"]))
    elif notebook == "ablate":
        if asked.get("by", "layer") != "layer":
            parts.append(asked["by"])
    elif notebook == "plan":
        parts.append(asked["name"])
    elif notebook == "ceilings":
        parts.append(asked["machine"])
    seed = asked.get("seed")
    if notebook in ("evaluate", "infer", "ablate") and seed not in (None, study.seed):
        parts.append(f"seed{seed}")
    if asked.get("device"):
        parts.append(asked["device"])
    return "-".join(parts)


def folder_name(folder: str) -> str:
    """Return a name for a folder: its own, and a digest of its whole path.

    Two folders of one name have different names.
    """
    path = Path(folder).expanduser().resolve()
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


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
        UserError: an unknown study, a parameter that cannot be (see ``parameters``), or
            a study that needs a GPU on a machine without one.
    """
    _show_errors_in_one_line()
    loaded = load_study(study)
    devices.check_requirements(loaded)
    check_parameters(asked)
    run = Run(notebook, loaded, asked)
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    if run.variant:
        _VARIANT_RUNS.append(run)
    return run


def _show_errors_in_one_line() -> None:
    """Show known errors of a notebook in one line, and record a variant that fails.

    Running out of memory is the error of a library. The variant fails all the same. A
    file that cannot be written is a mistake of the user, and fails no variant.
    """
    shell = get_ipython()
    if shell is None:
        return

    def show(shell, kind, error, trace, tb_offset=None):
        if isinstance(error, OSError):
            if not (told := describe_file_error(error)):  # of a library: with its trace
                return shell.showtraceback((kind, error, trace))
            error = UserError(told)
        error = as_known_error(error)
        if isinstance(error, VariantError) and _VARIANT_RUNS:
            try:
                _VARIANT_RUNS[-1].fail(error)
            except UserError as unwritten:
                error = unwritten
        kind = type(error)
        shell._showtraceback(kind, error, [f"{kind.__name__}: {one_line(error)}"])

    known = (UserError, VariantError, torch.OutOfMemoryError, OSError)
    shell.set_custom_exc(known, show)


def _to_json(value: object):
    """Return values of NumPy, PyTorch and pathlib as JSON can hold them."""
    if isinstance(value, (np.generic, torch.Tensor)):
        return value.item() if value.ndim == 0 else value.tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}")
