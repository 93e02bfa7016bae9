"""A study's file: what may stand in it, and each mistake in one line."""

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
import yaml

from vitnb import study
from vitnb.errors import UserError
from vitnb.study import (
    ROOT,
    Compare,
    Finetune,
    Latency,
    Pretrain,
    Study,
    load_study,
    study_names,
)

# Every field of every section: values that fit, and values beyond its limits.
COUNT, POSITIVE, NOT_NEGATIVE = (
    ([1, 2], [0, -1]),
    ([1e-9, 1, 2.5], [0, -0.1]),
    ([0, 0.0, 3.5], [-0.1, -1]),
)
SHARE, BELOW_ONE = ([1e-6, 0.5, 1], [0, 1.01, -0.5]), ([0, 0.5, 0.99], [1, 1.5, -0.1])
SECTIONS = {
    "finetune": Finetune,
    "latency": Latency,
    "compare": Compare,
    "pretrain": Pretrain,
}
LIMITS = {
    "finetune": {
        "epochs": COUNT,
        "patience": COUNT,
        "batch_size": COUNT,
        "learning_rate": POSITIVE,
        "dropout": BELOW_ONE,
        "crop_scale": SHARE,
        "label_smoothing": BELOW_ONE,
        "seeds": COUNT,
    },
    "latency": {"samples": COUNT, "seconds": POSITIVE},
    "compare": {
        "rounds": COUNT,
        "seconds": POSITIVE,
        "precision": POSITIVE,
        "forwards": COUNT,
        "processes": COUNT,
    },
    "pretrain": {
        "hidden_size": ([2, 4], [0, -2]),  # the two heads divide it
        "layers": COUNT,
        "heads": COUNT,
        "patch_size": COUNT,
        "image_size": ([8, 16], [0, -8]),  # the patches divide it
        "drawn_size": COUNT,
        "residual_scale": NOT_NEGATIVE,
        "steps": COUNT,
        "batch_size": COUNT,
        "learning_rate": POSITIVE,
        "warmup_steps": COUNT,
        "keep_tokens": SHARE,
        "full_steps": ([0, 7], [-1]),
        "minutes": NOT_NEGATIVE,
    },
}
FIELDS = [(section, key) for section, table in LIMITS.items() for key in table]


def is_count(section: str, key: str) -> bool:
    return isinstance(getattr(SECTIONS[section](), key), int)


@pytest.fixture
def read(tmp_path):
    """Load a study that is made of these lines and of what every study must have."""
    path = tmp_path / "mine.yaml"

    def load(text: str, leave_out: tuple = ()) -> Study:
        needed = {"title": "t", "question": "q", "data": "garden", "base": "data/base"}
        given = {line.split(":")[0] for line in text.splitlines()}
        lines = [
            f"{key}: {value}"
            for key, value in needed.items()
            if key not in given and key not in leave_out
        ]
        path.write_text("\n".join([*lines, text]) + "\n")
        return load_study(str(path))

    return load


@pytest.fixture
def refused(read, tmp_path):
    """Return the line in which a study is refused, without the file's path.

    The line must begin with that path.
    """

    def line(text: str, **asked) -> str:
        with pytest.raises(UserError) as told:
            read(text, **asked)
        said, path = str(told.value), f"{tmp_path / 'mine.yaml'}: "
        assert said.startswith(path) and "\n" not in said and "pydantic" not in said
        return said.removeprefix(path)

    return line


def without_base(section: str) -> tuple:
    return ("base",) if section == "pretrain" else ()


def test_the_table_of_limits_has_every_field():
    for section, kind in SECTIONS.items():
        assert list(LIMITS[section]) == [field.name for field in fields(kind)]


@pytest.mark.parametrize(("section", "key"), FIELDS)
def test_a_field_s_limits(read, refused, section, key):
    fit, beyond = LIMITS[section][key]
    for value in fit:
        loaded = read(f"{section}: {{{key}: {value}}}", without_base(section))
        assert getattr(getattr(loaded, section), key) == value
    for value in [*beyond, *([] if is_count(section, key) else [".nan", ".inf"])]:
        line = refused(
            f"{section}: {{{key}: {value}}}", leave_out=without_base(section)
        )
        assert line.startswith(
            f"{section}: '{key}' cannot be {str(value).removeprefix('.')}: it must be "
        )


@pytest.mark.parametrize(("section", "key"), FIELDS)
def test_a_field_s_type(read, refused, section, key):
    kind, asked = (
        ("int" if is_count(section, key) else "float"),
        {"leave_out": without_base(section)},
    )
    for value in (True, False, "many", [1], {"a": 1}, None):
        line = refused(f"{section}: {{{key}: {json.dumps(value)}}}", **asked)
        assert line == f"{section}: '{key}' must be {kind}, got {value!r}"
    if kind == "int":
        for value in ("1.0", "1.5", "1e3", "'1'"):
            assert f"{section}: '{key}' must be int, got " in refused(
                f"{section}: {{{key}: {value}}}", **asked
            )
    else:
        loaded = read(
            f"{section}: {{{key}: 5e-1}}", without_base(section)
        )  # to YAML a string
        assert getattr(getattr(loaded, section), key) == 0.5


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_in_a_section(refused, section):
    for key in LIMITS[section]:
        line = refused(f"{section}: {{{key}z: 1}}", leave_out=without_base(section))
        assert line == f"{section}: unknown key '{key}z': did you mean '{key}'?"
    assert refused(f"{section}: {{7: 1}}").startswith(
        f"{section}: unknown key '7': choose one of: "
    )
    assert refused(f"{section}: {{yes: 1}}").startswith(
        f"{section}: unknown key 'True': choose one of: "
    )


def test_an_unknown_key_of_a_study(refused):
    for field in fields(Study):
        assert (
            refused(f"{field.name}z: 1")
            == f"unknown key '{field.name}z': did you mean '{field.name}'?"
        )
    assert (
        refused("titel: x", leave_out=("title",))
        == "unknown key 'titel': did you mean 'title'?"
    )
    assert refused("true: 1").startswith("unknown key 'True': choose one of: name, ")


def test_missing_keys(refused):
    assert refused("title: x", leave_out=("question", "data")) == "lacks question, data"
    assert refused("seed: x", leave_out=("title",)) == "'seed' must be int, got 'x'"


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_is_no_mapping(refused, section):
    for value in (5, "x", [1], []):
        assert refused(f"{section}: {json.dumps(value)}") == (
            f"{section}: expected a mapping of names to values, got {value!r}"
        )


@pytest.mark.parametrize(
    "key",
    [
        "finetune",
        "latency",
        "compare",
        "pretrain",
        "variants",
        "peers",
        "batch_sizes",
        "waterfall",
        "ablate_bits",
        "plans",
        "expected",
    ],
)
def test_what_is_left_empty_is_as_if_it_were_not_there(read, key):
    assert read(f"{key}:") == read(f"{key}:\n  # nothing yet") == read("seed: 0")


def test_an_empty_pretrain_makes_no_base_and_an_empty_mapping_does(read, refused):
    assert (
        refused("pretrain:", leave_out=("base",))
        == "lacks base, or pretrain to make one"
    )
    assert read("pretrain: {}", ("base",)).pretrain == Pretrain()


def test_an_empty_list_of_variants_stays_a_mistake(refused):
    assert refused("variants: []") == "variants must name at least one, got []"
    assert (
        refused("batch_sizes: []")
        == "batch_sizes must be positive whole numbers, got []"
    )


@pytest.mark.parametrize(
    "key", ["name", "title", "question", "data", "base", "infer_variant"]
)
def test_a_name_that_is_left_empty_is_a_mistake(refused, key):
    assert refused(f"{key}:") == f"'{key}' must be str, got None"


@pytest.mark.parametrize(
    "text",
    ["3", "2024", "1.10", "007", "1_000", "0x10", "-1", ".5", "2024-01-31", ".inf"],
)
def test_a_name_that_looks_like_a_number_stays_as_it_is_written(read, refused, text):
    for key in ("name", "title", "question", "data", "base", "get_data"):
        assert getattr(read(f"{key}: {text}"), key) == text
    assert list(read(f"expected: {{{text}: [0, 1]}}").expected) == [text]
    for key in ("variants: [{}]", "infer_variant: {}"):
        assert f"unknown variant '{text}'" in refused(key.format(text))
    assert refused(f"peers: [{text}]").startswith(f"unknown peer '{text}': ")


def test_plans_whose_names_look_like_numbers(read):
    loaded = read(
        "plans: {12: 0.1, 1.10: 1e-1, 007: 1}\nvariants: [plan:12-sdpa, plan:1.10-sdpa]"
    )
    assert loaded.plans == {"12": 0.1, "1.10": 0.1, "007": 1}


@pytest.mark.parametrize("word", ["true", "no", "Off"])
def test_true_and_false_are_no_names(read, refused, word):
    value = yaml.safe_load(word)
    for text, key in (
        (f"title: {word}", "title"),
        (f"name: {word}", "name"),
        (f"variants: [{word}]", "variants"),
        (f"plans: {{{word}: 0.1}}", "plans"),
        (f"expected: {{{word}: [0, 1]}}", "expected"),
    ):
        line = refused(text)
        assert (
            line.startswith(f"'{key}' must be ")
            and str(value) in line
            and line.endswith(" needs quotes")
        )
    assert read(f"title: '{word}'\nplans: {{'{word}': 1}}").title == word


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1.0", "'seed' must be int, got 1.0"),
        ("requires: gpus", "requires may be 'gpu' or left out, got 'gpus'"),
        ("ablate_bits: [4, 6]", "ablate_bits may hold 4 and 8, got [4, 6]"),
        ("ablate_bits: [0]", "ablate_bits may hold 4 and 8, got [0]"),
        ("ablate_bits: [16]", "ablate_bits may hold 4 and 8, got [16]"),
        ("ablate_bits: [4.0]", "'ablate_bits' must be list[int], got [4.0]"),
        (
            "waterfall: [1, 0]",
            "waterfall must hold positive whole numbers, batch sizes, got [1, 0]",
        ),
        ("batch_sizes: [-1]", "batch_sizes must be positive whole numbers, got [-1]"),
        (
            "plans: {p: 10.5}",
            "plans: a name of letters and digits, and a share of bytes such as 0.12, "
            "got 'p: 10.5'",
        ),
        ("plans: {p: x}", "'plans' must be dict[str, float], got {'p': 'x'}"),
        ("plans: {p: true}", "'plans' must be dict[str, float], got {'p': True}"),
        (
            "plans: {p: .nan}",
            "'plans' cannot be {'p': nan}: it must be a finite number",
        ),
        (
            "expected: {a: [0, .nan]}",
            "'expected' cannot be {'a': [0, nan]}: it must be a finite number",
        ),
        ("expected: {a: [1, 0]}", "expected: 'a' must be [low, high], got [1, 0]"),
        ("expected: {a: [1]}", "expected: 'a' must be [low, high], got [1]"),
        ("name: a/b", "name is that of a folder below outputs/, got 'a/b'"),
        ("title: {a: b}", "'title' must be str, got {'a': 'b'}"),
        (
            "variants: [fp32-sdp]",
            "unknown variant 'fp32-sdp': did you mean 'fp32-sdpa'?",
        ),
        ("seed: 2024-13-01", "not valid YAML: month must be in 1..12"),
    ],
)
def test_what_a_study_cannot_hold(refused, text, line):
    assert refused(text) == line


def test_numbers_stay_as_they_are_written(read):
    """Whole numbers stay whole: records hold the values as they were written.

    A pretraining is made again where its settings read otherwise.
    """
    loaded = read(
        "finetune: {dropout: 0, learning_rate: 1e-3}\nexpected: {a: [0, 1e-5]}"
    )
    assert (
        json.dumps([loaded.finetune.dropout, loaded.finetune.learning_rate])
        == "[0, 0.001]"
    )
    assert json.dumps(loaded.expected) == '{"a": [0, 1e-05]}'


@pytest.mark.parametrize("name", study_names())
def test_a_study_is_read_again_from_its_fields(name, tmp_path):
    """Processes that share a training read JSON: 1e-05 there is a string to YAML."""
    loaded, path = load_study(name), tmp_path / "again.yaml"
    path.write_text(
        json.dumps(
            {key: value for key, value in asdict(loaded).items() if value is not None}
        )
    )
    assert replace(load_study(str(path)), typed=name) == loaded


def test_what_code_makes_is_taken_as_it_is(read):
    """Files are checked; a value that code makes is taken as it is."""
    loaded = read("seed: 1")
    assert (
        replace(loaded, finetune=replace(loaded.finetune, epochs=0)).finetune.epochs
        == 0
    )
    assert Latency(seconds=0.0).seconds == 0.0 and Study(
        "x", "", "", "", variants=["1.5"]
    ).variants == ["1.5"]


def test_the_module_brings_no_torch():
    words = [
        sys.executable,
        "-c",
        f"import sys, {study.__name__}; print('torch' in sys.modules)",
    ]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr
