"""Running a notebook headless: parameters are checked before a kernel starts, errors end in one line.

A whole study: Snakemake runs what is not done yet, in the order that the ``Snakefile`` says.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from vitnb import variants
from vitnb.errors import UserError, VariantError, suggest
from vitnb.study import ROOT, Study, load_study

FOLDER = ROOT / "notebooks"


TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def notebook_path(name: str) -> Path:
    """The path of a notebook by its name; raises UserError with the nearest right name."""
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    if name not in known:
        raise UserError(f"no notebook '{name}': {suggest(name, known)}")
    return FOLDER / f"{name}.ipynb"


def parse_parameters(path: Path, given: list[tuple[str, str]]) -> tuple[dict[str, object], dict[str, object]]:
    """Typed parameters from pairs of words, by the annotations in the notebook's parameters cell.

    Returns the given ones, and all of them with the notebook's defaults.

    Raises UserError for an unknown name (with the nearest right one), a wrong type, a variant or a study.
    """
    known = papermill.inspect_notebook(str(path))
    parameters = {}
    for name, text in given:
        if name not in known:
            raise UserError(f"{path.stem} has no parameter '{name}': {suggest(name, known)}")
        kind = known[name]["inferred_type_name"].split("|")[0].strip()
        parameters[name] = _typed(name, text, kind)
    defaults = {name: ast.literal_eval(about["default"]) for name, about in known.items()}
    asked = defaults | parameters
    study = load_study(asked["study"])
    if study.requires:
        # Late, as torch takes seconds: a notebook's kernel imports it anyway.
        from vitnb import devices

        devices.check_requirements(study)
    study.sizes(asked.get("batch_size"))
    study.trainings(asked.get("seeds"))
    if asked.get("variant") is not None:
        variants.parse(asked["variant"])
    return parameters, asked


def _typed(name: str, text: str, kind: str) -> object:
    if kind == "str":
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if kind == "float" and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 1e-3 for a string
        except ValueError:
            pass
    if not isinstance(value, TYPES[kind]) or (kind == "int" and isinstance(value, bool)):
        raise UserError(f"parameter '{name}' must be {'true or false' if kind == 'bool' else kind}, got '{text}'")
    return value


def run_notebook(name: str, given: list[tuple[str, str]], allow_failed: bool = False) -> Path:
    """Run a notebook with parameters; the executed copy goes to ``outputs/<study>/notebooks``.

    Args:
        allow_failed: a variant that cannot run ends in its record, not in an error, so that a study goes on.

    Raises:
        UserError: bad parameters or data, before or while it runs.
        VariantError: the variant failed (its record says why), unless ``allow_failed``.
    """
    path = notebook_path(name)
    parameters, asked = parse_parameters(path, given)
    study = load_study(asked["study"])
    label = "-".join([name, *(str(Path(str(v)).name) for k, v in parameters.items() if k != "study")])
    output = study.outputs / "notebooks" / f"{label.replace(':', '-')}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"vitnb: {label} of study {study.name}", flush=True)
    # The kernel must import the same vitnb, also where it is not installed.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        papermill.execute_notebook(
            str(path),
            str(output),
            parameters,
            kernel_name="python3",
            cwd=str(Path.cwd()),
            progress_bar=sys.stderr.isatty(),
            stdout_file=sys.stdout,
            extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
        )
    except PapermillExecutionError as error:
        _explain(error, output, allow_failed)
    except DeadKernelError:
        _dead(name, study, asked, allow_failed)
    return output


def _explain(error: PapermillExecutionError, output: Path, allow_failed: bool) -> None:
    """Turn a failing cell into the error that it was, in one line."""
    if error.ename == "UserError":
        raise UserError(error.evalue) from None
    if error.ename == "VariantError":
        if not allow_failed:
            raise VariantError(f"{error.evalue} (its row stays in the table)") from None
        print(f"vitnb: this variant failed, and its row says so: {error.evalue}", flush=True)
        return
    said = (error.evalue.strip() or "no message").splitlines()[0]
    raise UserError(
        f"cell {error.exec_count} failed with {error.ename}: {said}; the whole trace is in {output}"
    ) from None


def _dead(name: str, study: Study, asked: dict, allow_failed: bool) -> None:
    """A kernel that was killed leaves no record: write the failed one for it."""
    reason = VariantError(
        "the notebook's kernel died, most likely out of memory: lower batch_size, or close other programs"
    )
    from vitnb.records.run import Run  # late: see above

    if name == "evaluate":
        Run(name, study, asked).fail(reason)
        if allow_failed:
            print(f"vitnb: {reason}", flush=True)
            return
    raise reason


SNAKEMAKE_OPTIONS = "--cores all --rerun-triggers mtime input params --quiet rules host --keep-incomplete"


def run_study(name: str, dry_run: bool = False) -> Path:
    """Run the study ``name`` (or the YAML file of that path) to its report, whose path is returned.

    Args:
        dry_run: only list the jobs.

    Raises UserError for a bad study, for missing images or a missing base, and for a job that stopped.
    """
    study = load_study(name)
    from vitnb import devices
    from vitnb.data.splits import load_layout
    from vitnb.models import pretrained

    devices.check_requirements(study)
    if not study.pretrain:  # else the first job makes it
        pretrained.find_base(study)
    load_layout(study)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(ROOT), *SNAKEMAKE_OPTIONS.split(), "--config", f"study={name}"]
    # The jobs must import the same vitnb, also where it is not installed.
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command + ["--dry-run"] * dry_run, env=os.environ | {"PYTHONPATH": python_path}, check=False)
    if done.returncode:
        raise UserError(
            f"study {study.name} stopped; the line above says why. What is done is kept: run it again to go on"
        )
    return study.outputs / "report.html"
