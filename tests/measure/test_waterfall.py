"""The waterfall on a CPU: each step keeps its row, and numbers follow from raw data."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from vitnb import cli, statistics, variants
from vitnb.analysis import tables
from vitnb.analysis.waterfall import (
    COLUMNS,
    TECHNIQUE_NOTES,
    gain_verdict,
    waterfall_table,
)
from vitnb.errors import UserError, VariantError
from vitnb.figures.waterfall import waterfall as draw_waterfall
from vitnb.measure import waterfall
from vitnb.measure.worker import LocalVariant
from vitnb.models import loader
from vitnb.models.fused.vit import TECHNIQUES
from vitnb.report import page
from vitnb.study import Study, load_study

ROOT = Path(__file__).resolve().parents[2]
FUSED = [name for name in TECHNIQUES if name != "one pass"]


@pytest.fixture(scope="module")
def one_thread():
    """Forwards this small take turns faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def study(mini, mini_yaml, tmp_path_factory) -> Study:
    """The mini study with a waterfall, and records of its own."""
    values = yaml.safe_load(mini_yaml.read_text())
    values |= {
        "waterfall": [1, 3],
        "compare": {"rounds": 14, "seconds": 1.0, "forwards": 2},
    }
    path = tmp_path_factory.mktemp("waterfall") / "falls.yaml"
    path.write_text(yaml.safe_dump(values))
    made = load_study(str(path))
    made.outputs.mkdir()
    (made.outputs / "checkpoints").symlink_to(mini.outputs / "checkpoints")
    return made


@pytest.fixture(scope="module")
def loads() -> list[tuple[str, frozenset[str] | None]]:
    """The models that ``record`` loads: variant, and the techniques that reached it."""
    return []


@pytest.fixture(scope="module")
def record(study, loads, one_thread) -> dict:
    """What ``vitnb waterfall`` writes, on a CPU also where there is a GPU."""
    load = loader.load_variant

    def spy(study, variant, **options):
        loaded = load(study, variant, **options)
        loads.append((variant.name, getattr(loaded.model, "techniques", None)))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "load_variant", spy)
        assert cli.main(["waterfall", study.typed, "--device", "cpu"]) == 0
    (path,) = (study.outputs / "records").glob("waterfall*.json")
    return json.loads(path.read_text())


@pytest.fixture
def short(monkeypatch) -> list[str]:
    """The first four steps of one ladder alone."""
    steps = waterfall.LADDERS["16 bits"][:4]
    monkeypatch.setattr(waterfall, "LADDERS", {"16 bits": steps})
    return [step.name for step in steps]


def test_a_ladder_adds_one_technique_a_step():
    for steps in waterfall.LADDERS.values():
        assert steps[0].variant == variants.BASELINE
        for before, after in pairwise(steps):
            assert after.technique in TECHNIQUE_NOTES and variants.parse(after.variant)
            if before.techniques is not None:
                assert [*after.techniques] == [*before.techniques, after.technique]
            else:
                assert after.techniques in (None, ())
    assert [*waterfall.LADDERS["16 bits"][-1].techniques] == FUSED
    assert [*waterfall.LADDERS["4 bits"][-1].techniques] == [*TECHNIQUES]
    assert set(TECHNIQUE_NOTES) == {
        step.technique for steps in waterfall.LADDERS.values() for step in steps
    }


def test_every_step_has_a_row_at_every_batch_size(record, study):
    table = pd.read_csv(
        study.outputs / "waterfall-cpu.csv", keep_default_na=False, na_values=[""]
    )
    wanted = [
        (ladder, step.technique, step.variant, size)
        for ladder, steps in waterfall.LADDERS.items()
        for size in (1, 3)
        for step in steps
    ]
    columns = ["ladder", "step", "variant", "batch_size"]
    assert list(table[columns].itertuples(index=False, name=None)) == wanted
    assert table.p50_ms.notna().all() and (table.p50_ms > 0).all()
    assert (table.gain < 1).any(), "a row that loses"
    remade = waterfall_table(record)
    assert list(table.columns) == list(remade.columns) == COLUMNS
    np.testing.assert_allclose(table.gain, remade.gain)


def test_each_model_is_loaded_once_with_its_techniques(record, loads):
    steps = {
        step.name: step for several in waterfall.LADDERS.values() for step in several
    }
    wanted = []
    for step in steps.values():
        techniques = None
        if "fused" in step.variant:
            every = step.techniques is None
            techniques = frozenset(TECHNIQUES if every else step.techniques)
        wanted.append((step.variant, techniques))
    assert loads == wanted and [name for name, _ in wanted].count("fp32-sdpa") == 1


def hodges_lehmann(a, b) -> float:
    """Return the ratio of a's times to b's, round by round, with plain loops."""
    logs = [math.log(np.median(x) / np.median(y)) for x, y in zip(a, b, strict=True)]
    return math.exp(
        np.median(
            [
                (logs[i] + logs[j]) / 2
                for i in range(len(logs))
                for j in range(i, len(logs))
            ]
        )
    )


def test_gains_and_costs_follow_from_the_raw_record(record):
    table = waterfall_table(record)
    for ladder, steps in waterfall.LADDERS.items():
        for size in ("1", "3"):
            rows = table[
                (table.ladder == ladder) & (table.batch_size == int(size))
            ].reset_index()
            blocks = [record["blocks_ms"][size][step.name] for step in steps]
            assert {np.shape(block) for block in blocks} == {(14, 2)}, (
                "every step once a round, two forwards counted"
            )
            assert math.isnan(rows.gain[0]) and rows.total_gain[0] == 1
            for i in range(1, len(steps)):
                row = rows.loc[i]
                assert row.gain == pytest.approx(
                    hodges_lehmann(blocks[i - 1], blocks[i])
                )
                assert row.total_gain == pytest.approx(
                    hodges_lehmann(blocks[0], blocks[i])
                )
                assert (
                    row.gain_low < row.gain < row.gain_high
                    and row.over == steps[i - 1].name
                )
                assert row.p50_ms == pytest.approx(np.median(np.ravel(blocks[i])))
                found = record["steps"][steps[i].name]
                assert (
                    row.kl == pytest.approx(np.mean(found["kl_by_image"]))
                    and row.kl_low <= row.kl <= row.kl_high
                )
                assert row.resident_mb == found["resident_bytes"] / 2**20
    first = record["steps"]["fp32-sdpa"]["first_class"]
    other = json.loads(json.dumps(record))
    other["steps"]["nf4-sdpa"]["first_class"] = [first[0] + 1, first[1] + 1, *first[2:]]
    moved = waterfall_table(other).set_index("variant").changed
    assert set(moved["nf4-sdpa"]) == {2 / len(first)} and set(moved["fp32-sdpa"]) == {
        0.0
    }


def test_what_steps_cost(record, mini):
    rows = (
        waterfall_table(record)
        .drop_duplicates(["variant", "techniques"])
        .set_index(["variant", "techniques"])
    )
    kl, every = rows.kl, ", ".join(TECHNIQUES)
    assert kl["fp32-sdpa", ""] == 0 < kl["bf16-sdpa", ""] < kl["nf4-sdpa", ""]
    assert kl["nf4-sdpa-fused", every] == pytest.approx(kl["nf4-sdpa", ""], rel=0.2), (
        "a technique changes no answers"
    )
    assert record["images"] == len(record["steps"]["nf4-sdpa"]["kl_by_image"]) == 20
    mb = rows.resident_mb
    assert (
        mb["nf4-sdpa", ""]
        < mb["int8-sdpa", ""]
        < mb["bf16-sdpa", ""]
        < mb["fp32-sdpa", ""]
    )
    fused = loader.load_variant(mini, variants.parse("nf4-sdpa-fused"))
    assert (
        rows.scratch_mb["nf4-sdpa-fused", every]
        == fused.model.scratch_bytes / 2**20
        > 0
    )
    assert rows.scratch_mb["nf4-sdpa", ""] == 0


def test_an_engine_that_fell_back_says_so(record):
    table = waterfall_table(record)
    graphs = table[table.variant.str.endswith("-graph")]
    assert len(graphs) == 8 and set(graphs.engine_ran) == {"eager"}
    assert graphs.reason.str.contains("NVIDIA GPU").all()
    fused = table[table.variant == "bf16-sdpa-fused"]
    assert set(fused.engine_ran) == {"fused, in PyTorch's operators"}
    assert fused.reason.str.contains("no Triton").all()


def test_an_engine_that_fell_back_at_one_batch_size_says_so_at_this_size_alone():
    record = planted({"a": 1.5, "b": 1.1})
    record["blocks_ms"]["1"] = record["blocks_ms"]["8"]
    record["failed"]["1"] = {}
    for name, about in record["steps"].items():
        ran = {"engine_ran": {"1": "eager", "8": "eager"}}
        record["steps"][name] = about | ran
    step = waterfall.LADDERS["4 bits"][1].name
    record["steps"][step] = record["steps"][step] | {
        "engine_ran": {"1": "graph", "8": "eager"},
        "engine_reason": {"8": "no CUDA graph: out of luck"},
    }
    table = waterfall_table(record).set_index(["step", "batch_size"]).loc["4 bits, NF4"]
    assert dict(table.engine_ran) == {1: "graph", 8: "eager"}
    assert dict(table.reason) == {1: "", 8: "no CUDA graph: out of luck"}


def break_logits(loaded, sizes: set[int]) -> None:
    """Let a model answer its last image with NaN in batches of these sizes."""

    def break_last(module, inputs, output):
        if len(output.logits) in sizes:
            output.logits[-1, 0] = float("nan")

    loaded.model.register_forward_hook(break_last)


@pytest.mark.parametrize("sizes", [{20}, {3}])
def test_logits_that_are_not_finite_are_a_failed_step(
    study, short, one_thread, monkeypatch, sizes
):
    """In the answers of all 20 images, or at one of the timed batch sizes alone."""
    load = loader.load_variant

    def broken(study, variant, **options):
        loaded = load(study, variant, **options)
        if variant.name == "bf16-sdpa":
            break_logits(loaded, sizes)
        return loaded

    monkeypatch.setattr(loader, "load_variant", broken)
    record = waterfall.measure_waterfall(study, torch.device("cpu"))
    json.dumps(record, allow_nan=False)
    table = waterfall_table(record).set_index(["variant", "batch_size"])
    count, fails_at = (1, {3}) if sizes == {3} else (1, {1, 3})
    for size in (1, 3):
        row = table.loc["bf16-sdpa", size]
        assert math.isnan(row.p50_ms) == (size in fails_at)
        if size in fails_at:
            told = f"the logits of {count} of {max(sizes)} images are not finite"
            assert row.reason.startswith(told)
    assert table.p50_ms["fp32-sdpa", 3] > 0


def test_a_step_that_fails_keeps_its_row_and_the_next_is_over_the_last_that_ran(
    study, short, one_thread, monkeypatch, tmp_path
):
    """One cannot be loaded; another has no memory at the larger batch size alone."""
    load, time_block = loader.load_variant, LocalVariant.time_block

    def refuse(study, variant, **options):
        if variant.name == "bf16-sdpa-graph":
            raise VariantError("not on this machine\nand more")
        return load(study, variant, **options)

    def exhausted(self, batch_size, forwards):
        if (self.loaded.variant.name, batch_size) == ("bf16-sdpa", 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return time_block(self, batch_size, forwards)

    monkeypatch.setattr(loader, "load_variant", refuse)
    monkeypatch.setattr(LocalVariant, "time_block", exhausted)
    record = json.loads(
        json.dumps(waterfall.measure_waterfall(study, torch.device("cpu")))
    )
    table = waterfall_table(record).set_index(["batch_size", "variant"])
    assert len(table) == 8 and short[2] == "bf16-sdpa-graph"
    for size in (1, 3):
        row = table.loc[size, "bf16-sdpa-graph"]
        assert (
            row.reason == "not on this machine"
            and math.isnan(row.p50_ms)
            and math.isnan(row.kl)
        )
        blocks, last = (
            record["blocks_ms"][str(size)],
            "bf16-sdpa" if size == 1 else "fp32-sdpa",
        )
        after = table.loc[size, "bf16-sdpa-fused"]
        assert after.over == last and after.gain == pytest.approx(
            hodges_lehmann(blocks[last], blocks[short[3]])
        )
    short_of_memory = table.loc[3, "bf16-sdpa"]
    assert short_of_memory.reason.startswith("out of memory: lower batch_size")
    assert math.isnan(short_of_memory.gain)
    assert short_of_memory.kl > 0 and table.loc[1, "bf16-sdpa"].gain > 0
    draw_waterfall(record).savefig(tmp_path / "failed.png")
    assert "not on this machine" in set(
        tables.format_waterfall(waterfall_table(record)).reason
    )


@pytest.mark.parametrize("when", ["loading", "answering", "before its blocks"])
def test_without_the_first_step_there_is_no_whole(
    study, short, one_thread, monkeypatch, when
):
    """And, where it has not even answered, no cost."""
    place, name = {
        "loading": (loader, "load_variant"),
        "answering": (waterfall, "compute_logits"),
        "before its blocks": (waterfall, "start_blocks"),
    }[when]
    whole = getattr(place, name)

    def refuse(first, *others, **options):
        if "fp32-sdpa" in (
            others[0].name if when == "loading" else first.loaded.variant.name
        ):
            raise RuntimeError("kernel image is not available")
        return whole(first, *others, **options)

    monkeypatch.setattr(place, name, refuse)
    table = waterfall_table(waterfall.measure_waterfall(study, torch.device("cpu")))
    rows = table[table.batch_size == 1]
    assert rows.reason.iloc[0] == "RuntimeError: kernel image is not available"
    assert rows.total_gain.isna().all() and list(rows.gain.notna()) == [
        False,
        False,
        True,
        True,
    ]
    assert (
        rows.kl.notna().all() if when == "before its blocks" else rows.kl.isna().all()
    )


def test_where_nothing_runs_there_is_no_record(study, monkeypatch):
    monkeypatch.setattr(
        loader,
        "load_variant",
        lambda *_, **__: (_ for _ in ()).throw(VariantError("nothing runs")),
    )
    with pytest.raises(
        UserError, match="no step of the waterfall can run here: nothing runs"
    ):
        waterfall.measure_waterfall(study, torch.device("cpu"))


def test_a_users_error_stops_it(study, short, monkeypatch):
    monkeypatch.setattr(
        loader,
        "load_variant",
        lambda *_, **__: (_ for _ in ()).throw(UserError("no checkpoint")),
    )
    with pytest.raises(UserError, match=r"^no checkpoint$"):
        waterfall.measure_waterfall(study, torch.device("cpu"))


def planted(gains: dict[str, float]) -> dict:
    """Return a record of one ladder with known gains.

    The first step takes 10 ms. All rounds drift alike.
    """
    random, times = np.random.default_rng(0), [10.0]
    for gain in gains.values():
        times.append(times[-1] / gain)
    steps = [waterfall.FIRST, *waterfall.LADDERS["4 bits"][1 : len(times)]]
    drift = np.exp(random.normal(0, 0.05, (30, 1)))
    blocks = {
        step.name: (time * drift * np.exp(random.normal(0, 0.002, (30, 2)))).tolist()
        for step, time in zip(steps, times, strict=True)
    }
    described = {
        "kl_by_image": [0.0, 0.1],
        "first_class": [1, 2],
        "engine_ran": {"8": "eager"},
        "engine_reason": {},
        "resident_bytes": 2**20,
        "scratch_bytes": 0,
    }
    return {
        "ladders": {"4 bits": [asdict(s) | {"name": s.name} for s in steps]},
        "steps": {step.name: described for step in steps},
        "blocks_ms": {"8": blocks},
        "failed": {"8": {}},
        "images": 2,
    }


def test_a_known_waterfall_is_judged_as_it_is():
    gains = {"faster": 2.0, "slower": 0.8, "no difference": 1.0, "again faster": 1.04}
    record = planted(gains)
    table = waterfall_table(record)
    assert [gain_verdict(row) for row in table.itertuples()] == [
        "",
        "faster",
        "slower",
        "no difference",
        "faster",
    ]
    assert list(table.gain[1:]) == pytest.approx(list(gains.values()), rel=0.003)
    assert table.total_gain.iloc[-1] == pytest.approx(
        math.prod(gains.values()), rel=0.003
    )
    assert all(
        statistics.outside_margin(row.gain_low, row.gain_high, df=0)
        for row in table[1:3].itertuples()
    )
    axis = draw_waterfall(record).axes[0]
    beside = [text.get_text() for text in axis.texts][: len(table)]
    for text, gain in zip(
        beside, ("ms", "2.00x", "0.80x", "no difference", "1.04x"), strict=True
    ):
        assert text.endswith(gain), text
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    assert labels[1:4] == [
        "4 bits, NF4",
        "CUDA graph (ran eager)",
        "rearranged (ran eager)",
    ]
    bars = [patch.get_width() for patch in axis.patches]
    assert bars == pytest.approx(list(table.p50_ms)), "from 0, as long as the time"


def test_a_gain_that_another_process_might_undo_is_none():
    """All steps run in one process: 1.5% may be where its memory lies, 3% are more."""
    table = waterfall_table(planted({"small": 1.015, "large": 1.03}))
    small, large = list(table.itertuples())[1:]
    assert small.gain_low > 1.01 and gain_verdict(small) == "no difference"
    assert gain_verdict(large) == "faster"
    shown = tables.format_waterfall(table)["in words"]
    assert list(shown) == [
        "",
        "no difference beyond what one process can show",
        "faster",
    ]
    record = planted({"large": 1.5})
    for blocks in record["blocks_ms"]["8"].values():
        del blocks[6:]
    assert gain_verdict(list(waterfall_table(record).itertuples())[1]) == (
        "too few rounds"
    )


def test_the_report_gains_its_sections_and_is_else_as_it_was(
    record, tmp_path, monkeypatch
):
    """The published embedded study has neither a waterfall nor a base of its own."""
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    shutil.copytree(ROOT / "outputs" / "published" / "embedded", tmp_path / "embedded")
    embedded = load_study("embedded")
    before = page.write_report(embedded).read_text()
    assert (
        "One technique after the other" not in before
        and "<h2>The base</h2>" not in before
    )
    asked = {"pretrain": {"steps": 1200, "batch_size": 50}}
    history = [
        {"step": 600 * i, "loss": 3.0 / i, "held_out_top1": 0.4 * i} for i in (1, 2)
    ]
    base = {
        "study_asked": asked,
        "history": history,
        "held_out_top1": 0.8125,
        "held_out_images": 4096,
        "minutes": 7.25,
        "device": "some GPU",
        "parameters": 303301632,
        "notebook": "pretrain",
        "name": "pretrain",
    }
    # Without a checkpoint, as the mini study's are not those of the published one.
    identity = record["identity"] | {"checkpoints": {}, "data": {}}
    shown = record | {"identity": identity, "name": "waterfall"}
    for name, found in (("waterfall", shown), ("pretrain", shown | base)):
        (embedded.outputs / "records" / f"{name}.json").write_text(json.dumps(found))
    after = page.write_report(embedded).read_text()
    for text in (
        "One technique after the other",
        *TECHNIQUE_NOTES.values(),
        "no CUDA graph: they need an NVIDIA GPU",
        "on 20 validation images",
        "The base</h2>",
        "1,200 steps, 60,000 images",
        "7.2 minutes on some GPU",
        "0.812",
        "4,096 fresh drawings",
    ):
        assert text.replace("'", "&#39;") in after, text
    assert after.count("data:image/png") == before.count("data:image/png") + 2


def test_a_study_without_one_is_told_so(capsys, mini):
    assert cli.main(["waterfall", mini.typed]) == 1
    assert capsys.readouterr().err.strip() == (
        "vitnb: study 'mini' has no waterfall: give it batch sizes, "
        "such as 'waterfall: [1, 32]'"
    )


@pytest.mark.parametrize("value", [[0], [1, -2], 4, ["1"], [1.5], [True]])
def test_a_wrong_waterfall_is_refused_in_one_line(mini_yaml, tmp_path, value):
    path = tmp_path / "wrong.yaml"
    path.write_text(mini_yaml.read_text() + f"waterfall: {json.dumps(value)}\n")
    with pytest.raises(UserError, match="waterfall") as refused:
        load_study(str(path))
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_a_whole_study_measures_it_where_it_is_asked(study, tmp_path):
    """Where it is not, test_study lists every record that there is."""
    env = os.environ | {"VITNB_OUTPUTS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "vitnb", "study", study.typed, "--dry-run"]
    planned = subprocess.run(
        words, env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert planned.returncode == 0, planned.stderr
    assert "waterfall" in {
        line.split()[0] for line in planned.stdout.splitlines() if line.strip()
    }
