"""The table of checks: each parameter's limits, and who uses the table."""

import json

import pytest

from vitnb import notebooks
from vitnb.errors import UserError
from vitnb.records.parameters import CHECKS, check_parameter, check_parameters


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("rank", [1, 8], [0, -1]),
        ("alpha", [1], [0, -1]),
        ("epochs", [1], [0]),
        ("processes", [1, 8], [0, -2]),
        ("seeds", [1], [0]),
        ("batch_size", [1], [0]),
        ("steps", [1], [0]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("targets", ["all", "mlp", "q_proj, v_proj"], ["", "a,", "a b", "a;b"]),
        ("base_precision", ["fp32", "nf4", "int8"], ["fp16", "", "NF4"]),
        ("by", ["layer", "linear"], ["head", ""]),
        ("images", ["."], ["no/such/folder", __file__]),
    ],
)
def test_limits(name, right, wrong):
    check_parameter(name, None)  # the study decides
    for value in right:
        check_parameter(name, value)
    for value in wrong:
        with pytest.raises(UserError) as told:
            check_parameters({"other": 0, name: value})
        assert name in str(told.value) and len(str(told.value).splitlines()) == 1


def test_the_seed_of_the_last_training_counts():
    check_parameters({"seed": 2**32 - 3, "seeds": 3})
    with pytest.raises(UserError, match="seed must be"):
        check_parameters({"seed": 2**32 - 3, "seeds": 4})


def test_every_parameter_of_a_notebook_has_a_check():
    """Of numbers and words: a new parameter needs one here or below."""
    checked_elsewhere = {"study", "variant", "device", "gradient_checkpointing"}
    for path in notebooks.FOLDER.glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                names = [line.split(":")[0] for line in cell["source"]]
                assert set(names) <= CHECKS.keys() | checked_elsewhere, path.name
