"""Rules of the house: which file may import which, and what notebooks look like.

The wall: code that reads records (analysis, figures, report) never imports code that
measures (models, training, measure), nor PyTorch.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from vitnb.study import ROOT

PACKAGE = ROOT / "vitnb"
PUBLISHED = ROOT / "outputs" / "published"
REPORTED = sorted(path.parent.name for path in PUBLISHED.glob("*/summary.csv"))
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
NOTEBOOKS = ("finetune", "evaluate", "ablate", "infer")

HEAVY = {"torch", "transformers", "bitsandbytes", "peft", "accelerate", "torchvision"}
MEASURING_ROOMS = ("models", "training", "measure", "mixed_precision", "anatomy")
MEASURING_FILES = ("vitnb.data.dataset", "vitnb.devices", "vitnb.inference")
READING_ROOMS = ("analysis", "figures", "report")
READING_FILES = (
    *("vitnb.records.reader", "vitnb.records.files", "vitnb.statistics"),
    *("vitnb.study", "vitnb.variants", "vitnb.errors", "vitnb.processes"),
)

LONGEST_CHAIN = 12
TOP_MODULES = 12
INFER_MODULES = 28
NOTEBOOK_LINES = 60

# Raises on any import of a library that measures, then runs a command.
WITHOUT_HEAVY = f"""
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(name + " imported on the reading side")

sys.meta_path.insert(0, Wall())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process that imports this vitnb."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


# --- The wall, at run time ---


@pytest.mark.parametrize("study", REPORTED)
def test_a_published_report_needs_records_alone(study, tmp_path):
    """Without torch, records give every table byte for byte, and every figure."""
    published, folder = PUBLISHED / study, tmp_path / study
    shutil.copytree(published, folder)
    written = [path for path in published.glob("*.csv") if not is_of_a_stage(path)]
    for path in written:
        (folder / path.name).unlink()
    (folder / "report.html").unlink()
    shutil.rmtree(folder / "figures")
    command = f"from vitnb.cli import main; sys.exit(main(['report', {study!r}]))"
    ended = run_python(WITHOUT_HEAVY + command, VITNB_OUTPUTS=str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {"summary.csv", "accuracy.csv", "claims.csv"} <= {p.name for p in written}
    for path in written:
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    figures = {path.name for path in (published / "figures").iterdir()}
    assert {path.name for path in (folder / "figures").iterdir()} == figures
    assert (folder / "report.html").stat().st_size > 100_000


def is_of_a_stage(path: Path) -> bool:
    """Return whether a table is written by a stage before the report."""
    return path.stem in ("ablation", "ratios", "times", "waterfall", "predictions")


def test_the_wall_itself_stops_an_import():
    ended = run_python(WITHOUT_HEAVY + "import vitnb.measure.latency")
    assert (
        ended.returncode == 1 and "torch imported on the reading side" in ended.stderr
    )


def test_a_process_that_reads_a_record_has_no_measuring_module():
    code = "import vitnb.records.reader, sys; print(*sys.modules)"
    modules = run_python(code).stdout.split()
    assert "vitnb.records.reader" in modules
    assert [name for name in modules if is_measuring(name)] == []


# --- The wall, in the source ---


def module_of(path: Path) -> str:
    """Return the dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_measuring(module: str) -> bool:
    rooms = tuple(f"vitnb.{room}" for room in MEASURING_ROOMS)
    return (
        module.partition(".")[0] in HEAVY
        or module in MEASURING_FILES
        or module.startswith(tuple(f"{room}." for room in rooms))
        or module in rooms
    )


def is_reading(module: str) -> bool:
    rooms = tuple(f"vitnb.{room}" for room in READING_ROOMS)
    return (
        module in READING_FILES
        or module in rooms
        or module.startswith(tuple(f"{room}." for room in rooms))
    )


def executed_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Return all nodes but those under ``if TYPE_CHECKING``."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from executed_nodes(child)


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of vitnb, and the heavy libraries, that a file imports.

    Late imports count; imports for annotations alone (``if TYPE_CHECKING``) do not.
    ``from vitnb.room import name`` is an import of the file ``vitnb/room/name.py`` if
    there is one, and of the room otherwise.
    """
    names = set()
    for node in executed_nodes(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in FILES else node.module)
    heavy = {name.partition(".")[0] for name in names} & HEAVY
    return frozenset((names & FILES.keys()) | heavy) - {module}


@cache
def graph() -> dict[str, frozenset[str]]:
    return {module: imports(module) for module in FILES}


def reach(module: str) -> dict[str, str]:
    """Return every module that a module reaches, with the module that imports it."""
    via, waiting = {}, [module]
    while waiting:
        current = waiting.pop()
        for name in imports(current) if current in FILES else ():
            if name not in via:
                via[name] = current
                waiting.append(name)
    return via


@pytest.mark.parametrize("module", [name for name in FILES if is_reading(name)])
def test_no_reading_module_reaches_a_measuring_one(module):
    assert {k: via for k, via in reach(module).items() if is_measuring(k)} == {}


def test_no_circle_of_imports():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_chains_of_imports_are_short():
    @cache
    def longest(module: str) -> tuple[str, ...]:
        chains = [longest(name) for name in imports(module) if name in FILES]
        return (module, *max(chains, key=len, default=()))

    chain = max((longest(module) for module in FILES), key=len)
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_few_modules_lie_outside_of_a_room():
    top = [path.name for path in PACKAGE.glob("*.py")]
    assert len(top) <= TOP_MODULES, top


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_tests_in_the_same_place(room):
    assert list((ROOT / "tests" / room).glob("test_*.py"))


# --- Notebooks ---


def code_cells(name: str) -> list[str]:
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_a_lesson(name):
    """No logic of its own, at most 60 lines of code, 4 to 6 rooms."""
    code = "\n".join(code_cells(name))
    tree = ast.parse(code)
    logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, logic)] == []
    assert len([line for line in code.splitlines() if line.strip()]) <= NOTEBOOK_LINES
    kinds = (ast.Import, ast.ImportFrom)
    lines = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, kinds)]
    assert len(lines) == 1 and lines[0].startswith("from vitnb import "), lines
    assert 4 <= len(lines[0].split(",")) <= 6, lines


def test_infer_loads_few_modules(mini, outputs, tmp_path):
    """On one picture, in a process of its own."""
    picture = next((Path(mini.data) / "test").rglob("*.png"))
    (tmp_path / "images").mkdir()
    shutil.copy(picture, tmp_path / "images")
    parameters = {
        "study": mini.typed,
        "variant": "fp32-sdpa",
        "images": str(tmp_path / "images"),
    }
    first, *cells = code_cells("infer")
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    count = "import sys; print('LOADED', *(m for m in sys.modules if m[:5] == 'vitnb'))"
    code = "\n".join([first, *lines, *cells, count])
    ended = run_python(code, VITNB_OUTPUTS=str(outputs), MPLBACKEND="agg")
    assert ended.returncode == 0, ended.stderr
    modules = ended.stdout.rpartition("LOADED ")[2].split()
    assert "vitnb.inference" in modules and len(modules) <= INFER_MODULES, modules


# --- Form ---

# Files with tables of numbers, which the formatter would spread over many lines.
TABLES_OF_NUMBERS = {"vitnb/data/drawing.py", "vitnb/data/species.py"}


def test_the_formatter_is_switched_off_for_tables_of_numbers_only():
    files = [*PACKAGE.rglob("*.py")]
    skipped = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if "# fmt: skip" in path.read_text() or "# fmt: off" in path.read_text()
    }
    assert skipped <= TABLES_OF_NUMBERS


@pytest.mark.parametrize("module", FILES)
def test_no_value_is_compared_with_itself(module):
    """A test for nan says so: math.isnan or pd.isna."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            assert len(set(sides)) == len(sides), ast.unparse(node)


@pytest.mark.parametrize("module", FILES)
def test_every_file_and_public_function_says_what_it_does(module):
    tree = ast.parse(FILES[module].read_text())
    assert len(ast.get_docstring(tree) or "") > 20
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [n for n in tree.body if isinstance(n, kinds) and n.name[0] != "_"]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
