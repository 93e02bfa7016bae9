"""environment.yml, pyproject.toml and constraints.txt tell the same story."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def ranges(lines: list[str]) -> dict[str, str]:
    found = [Requirement(line) for line in lines]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier)
        for requirement in found
    }


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_conda_and_pip_ask_for_the_same():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    from_pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    conda = ranges([entry for entry in listed if isinstance(entry, str)] + from_pip)
    python = SpecifierSet(conda.pop("python"))
    assert set(SpecifierSet(project()["requires-python"])) <= set(python), (
        "conda may narrow the range, never widen it"
    )
    assert (
        python.contains("3.11.4")
        and not python.contains("3.14")
        and conda.pop("pip") == ""
    )
    assert conda == ranges(
        project()["dependencies"] + project()["optional-dependencies"]["gpu"]
    )
    assert "flash-attn" in conda


def test_what_the_project_is_made_of_is_there():
    asked = {
        "torch",
        "transformers",
        "bitsandbytes",
        "flash-attn",
        "peft",
        "jupyterlab",
        "papermill",
        "nbval",
        "seaborn",
        "scikit-learn",
    }
    assert asked <= set(
        ranges(project()["dependencies"] + project()["optional-dependencies"]["gpu"])
    )


def test_every_dependency_is_pinned_inside_its_range():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[canonicalize_name(name)] = version
    for line in project()["dependencies"]:
        requirement = Requirement(line)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), (
            f"{requirement} does not allow the pinned {pin}"
        )
