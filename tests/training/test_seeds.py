"""Seeds: each is a training of its own, and the first is exported."""

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitnb import cli
from vitnb.analysis import learning, summary
from vitnb.errors import UserError
from vitnb.report.page import write_report
from vitnb.study import load_study
from vitnb.training import distributed, loop, lora
from vitnb.training.seeds import train_seeds

ADAPTERS = {
    "rank": 4,
    "alpha": 8,
    "targets": "mlp",
    "base_precision": "nf4",
    "gradient_checkpointing": True,
}


def learned(model) -> torch.Tensor:
    return torch.cat(
        [p.detach().flatten().clone() for p in model.parameters() if p.requires_grad]
    )


def test_every_seed_gives_what_a_training_with_it_gives(mini, shapes, monkeypatch):
    """The oracle is one training after another, each started by hand.

    The mini study has dropout, which draws from PyTorch's generator.
    """
    train, valid, processor = shapes
    assert mini.finetune.dropout > 0
    weights, alive, asked, really = [], [], [], distributed.train_shared

    def watched(model, *args, **options):
        gc.collect()
        alive.append(sum(other() is not None for other in asked))
        asked.append(weakref.ref(model))
        history = really(model, *args, **options)
        weights.append(learned(model))
        return history

    monkeypatch.setattr(distributed, "train_shared", watched)
    oracle, ends = [], []
    for seed in (5, 6, 7):
        torch.manual_seed(seed)
        model = lora.add_adapters(mini, train.class_names, **ADAPTERS)
        oracle.append(loop.train(model, mini, processor, train, valid, seed=seed))
        ends.append(learned(model))
    torch.rand(11)  # whatever was drawn before
    rows = train_seeds(
        mini, processor, train, valid, oracle[0], seed=5, seeds=3, **ADAPTERS
    )
    assert all(
        torch.equal(found, wanted)
        for found, wanted in zip(weights, ends[1:], strict=True)
    )
    assert not torch.equal(weights[0], weights[1])
    for row, history, seed in zip(rows, oracle, (5, 6, 7), strict=True):
        curve = [epoch["valid_top1"] for epoch in history]
        assert (row["seed"], row["epochs"], row["valid_top1"]) == (seed, 2, max(curve))
        assert row["epoch"] == 1 + int(np.argmax(curve)) and row["seconds"] > 0
    assert alive == [0, 0], "no model is kept while the next is trained"


def test_how_many(mini, shapes, monkeypatch):
    """The study's number holds where none is given; options reach every training."""
    train, valid, processor = shapes
    asked = []
    monkeypatch.setattr(lora, "add_adapters", lambda *_, seed: seed)
    first = [{"epoch": 1, "valid_top1": 0.5, "seconds": 2.0, "peak_bytes": None}]
    monkeypatch.setattr(
        distributed,
        "train_shared",
        lambda model, *_, seed, epochs, processes: (
            asked.append((model, seed, epochs, processes)),
            first,
        )[1],
    )
    study = replace(mini, finetune=replace(mini.finetune, seeds=2))
    given = {"seed": 3, "epochs": 9, "processes": 4}
    for seeds, count in ((None, 2), (1, 1), (4, 4)):
        asked.clear()
        rows = train_seeds(study, processor, train, valid, first, seeds=seeds, **given)
        assert asked == [(3 + i, 3 + i, 9, 4) for i in range(1, count)]
        assert rows == [
            {"seed": 3 + i, "valid_top1": 0.5, "epoch": 1, "epochs": 1, "seconds": 2.0}
            for i in range(count)
        ]
    with pytest.raises(UserError, match="seeds must be at least 1, got 0"):
        train_seeds(study, processor, train, valid, first, seeds=0)


def rows(*found: float) -> list[dict]:
    return [{"seed": 4 + i, "valid_top1": top1} for i, top1 in enumerate(found)]


def test_the_spread_is_that_of_a_sample():
    found = [0.803, 0.8213, 0.8117, 0.79]
    results = learning.seed_results(rows(*found))
    assert results == pytest.approx(
        {"mean valid top1": np.mean(found), "valid top1 sd": np.std(found, ddof=1)}
    )
    # By hand: 0.8 and 0.81 have the mean 0.805 and the deviation 0.01 / sqrt(2).
    assert learning.describe_seeds(rows(0.81, 0.8)) == (
        "validation top-1 over 2 seeds: 0.805 +- 0.007 (sd), 0.800 to 0.810; "
        "seed 4, which is exported, has 0.810"
    )
    assert (
        learning.seed_results(rows(0.8)) == {}
        and "with seed 4: 0.800; one training has no spread"
        in learning.describe_seeds(rows(0.8))
    )


def test_a_number_of_seeds_that_makes_no_sense(mini_yaml, tmp_path, capsys):
    assert (
        cli.main(["run", "finetune", "-p", "study", str(mini_yaml), "-p", "seeds", "0"])
        == 1
    )
    assert capsys.readouterr().err == "vitnb: seeds must be at least 1, got 0\n"
    path = tmp_path / "mini.yaml"
    for count in ("0", "1.5"):
        path.write_text(
            mini_yaml.read_text().replace(
                "finetune: {", f"finetune: {{seeds: {count}, "
            )
        )
        with pytest.raises(UserError, match=f"finetune: 'seeds' .*{count}"):
            load_study(str(path))


def test_the_notebook_exports_the_first_and_tells_of_all(
    mini_yaml, tmp_path, monkeypatch, run_cells, capsys
):
    """Beside runs of the notebook with each seed alone; then the report."""
    found = {}
    for name, asked in (("all", {"seeds": 3}), ("first", {}), ("second", {"seed": 1})):
        monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path / name))
        run_cells("finetune", study=str(mini_yaml), **asked)
        found[name] = json.loads(
            (tmp_path / name / "mini" / "records" / "finetune.json").read_text()
        )
    several, first, second = found.values()
    assert (
        several["checkpoint_sha256"]
        == first["checkpoint_sha256"]
        != second["checkpoint_sha256"]
    )
    plain = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in record["seeds"]]
        for record in found.values()
    ]
    assert plain[0][:2] == [plain[1][0], plain[2][0]] and [
        row["seed"] for row in plain[0]
    ] == [0, 1, 2]
    curves = [
        [row["valid_top1"] for row in record["history"]] for record in (first, second)
    ]
    assert [row["valid_top1"] for row in plain[0][:2]] == [
        max(curve) for curve in curves
    ]
    assert several["asked"]["seeds"] == 3 and first["asked"]["seeds"] is None
    assert learning.describe_seeds(several["seeds"]) in capsys.readouterr().out
    top1 = [row["valid_top1"] for row in several["seeds"]]
    assert summary.finetune_results(several)["valid top1 sd"] == pytest.approx(
        np.std(top1, ddof=1)
    )
    assert "valid top1 sd" not in summary.finetune_results(first)
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path / "all"))
    run_cells("evaluate", study=str(mini_yaml), variant="fp32-sdpa", batch_size=1)
    page = write_report(load_study(str(mini_yaml))).read_text()
    assert learning.describe_seeds(several["seeds"])[1:] in page
