"""Run one notebook headless (papermill).

Parameters are checked before a kernel starts, and every error ends in one line.
"""

import ast
import hashlib
import os
import re
import sys
from pathlib import Path

import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from vitnb import variants
from vitnb.errors import UserError, VariantError, suggest
from vitnb.processes import child_environment
from vitnb.records.parameters import check_parameters
from vitnb.study import ROOT, Study, load_study

FOLDER = ROOT / "notebooks"
TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def notebook_path(name: str) -> Path:
    """Return the path of a notebook; raise UserError with the nearest right name."""
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    if name not in known:
        raise UserError(f"no notebook '{name}': {suggest(name, known)}")
    return FOLDER / f"{name}.ipynb"


def parse_parameters(
    path: Path, given: list[tuple[str, str]]
) -> tuple[dict[str, object], dict[str, object]]:
    """Return typed parameters from pairs of words.

    The annotations in the notebook's parameters cell say the types.

    Returns:
        The given parameters, and all parameters with the notebook's defaults.

    Raises:
        UserError: an unknown name (with the nearest right one), a wrong type, a study
            that does not exist, or a value that cannot be (see ``parameters``).
    """
    known = papermill.inspect_notebook(str(path))
    parameters = {}
    for name, text in given:
        if name not in known:
            hint = suggest(name, known)
            raise UserError(f"{path.stem} has no parameter '{name}': {hint}")
        kind = known[name]["inferred_type_name"].split("|")[0].strip()
        parameters[name] = _parse_value(name, text, kind)
    asked = {
        name: ast.literal_eval(about["default"]) for name, about in known.items()
    } | parameters
    study = load_study(asked["study"])
    if study.requires:
        # Late, as torch takes seconds: a notebook's kernel imports torch anyway.
        from vitnb import devices

        devices.check_requirements(study)
    check_parameters(asked)
    if asked.get("variant") is not None:
        variants.parse(asked["variant"])
    if asked.get("device") is not None:
        from vitnb import devices

        devices.select_device(asked["device"])
    if (asked.get("processes") or 1) > 1:
        from vitnb.training import distributed  # late, too

        distributed.check_processes(study, asked["processes"])
    return parameters, asked


def _parse_value(name: str, text: str, kind: str) -> object:
    if kind == "str":
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if kind == "float" and type(value) in (int, str):
        try:
            return float(value)  # YAML takes 1e-3 for a string
        except ValueError:
            pass
    if type(value) is not TYPES[kind]:
        wanted = "true or false" if kind == "bool" else kind
        raise UserError(f"parameter '{name}' must be {wanted}, got '{text}'")
    return value


def run_notebook(
    name: str, given: list[tuple[str, str]], allow_failed: bool = False
) -> Path:
    """Run a notebook with parameters and return the path of the executed copy.

    The copy goes to ``outputs/<study>/notebooks``.

    Args:
        allow_failed: a variant that cannot run ends in its record, not in an error, so
            that a study goes on.

    Raises:
        UserError: bad parameters or data, before or while the notebook runs.
        VariantError: the variant failed (its record says why), unless ``allow_failed``.
    """
    path = notebook_path(name)
    parameters, asked = parse_parameters(path, given)
    study = load_study(asked["study"])
    label = run_label(name, parameters)
    output = study.outputs / "notebooks" / f"{label}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"vitnb: {label} of study {study.name}", flush=True)
    # papermill hands this process's environment to the kernel.
    os.environ["PYTHONPATH"] = child_environment()["PYTHONPATH"]
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
        _raise_as_it_was(error, output, allow_failed)
    except DeadKernelError:
        _record_dead_kernel(name, study, asked, allow_failed)
    return output


def run_label(name: str, parameters: dict[str, object]) -> str:
    """Return the name of an executed copy: two questions never share one.

    It holds the notebook, the variant, and every other parameter with its name. A value
    with other signs than letters, digits, dots and underscores gets a digest.
    """
    words = [name]
    for key, value in parameters.items():
        if key == "study":
            continue
        text = str(value)
        if key == "variant":
            words.append(text.replace(":", "-"))
            continue
        plain = re.sub(r"[^\w.]+", "-", Path(text).name)[:40]
        if plain != text:
            plain += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        words.append(f"{key}-{plain}")
    return "-".join(words)


def _raise_as_it_was(
    error: PapermillExecutionError, output: Path, allow_failed: bool
) -> None:
    """Raise a failing cell's error again, in one line."""
    if error.ename == "UserError":
        raise UserError(error.evalue) from None
    if error.ename == "VariantError":
        if not allow_failed:
            raise VariantError(f"{error.evalue} (its row stays in the table)") from None
        print(
            f"vitnb: this variant failed, and its row says so: {error.evalue}",
            flush=True,
        )
        return
    message = (error.evalue.strip() or "no message").splitlines()[0]
    raise UserError(
        f"cell {error.exec_count} failed with {error.ename}: {message}; "
        f"the whole trace is in {output}"
    ) from None


def _record_dead_kernel(
    name: str, study: Study, asked: dict, allow_failed: bool
) -> None:
    """Write the record that a killed kernel could not write, and raise its reason."""
    from vitnb.records.run import Run  # late, as torch takes seconds

    reason = VariantError(
        "the notebook's kernel died, most likely out of memory: "
        "lower batch_size, or close other programs"
    )
    if name == "evaluate":
        Run(name, study, asked).fail(reason)
        if allow_failed:
            print(f"vitnb: {reason}", flush=True)
            return
    raise reason
