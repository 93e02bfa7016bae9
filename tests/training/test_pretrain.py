"""Pretraining: patch dropout, drawings as Pillow resizes them, and a whole base."""

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter
from transformers import AutoImageProcessor, AutoModel, ViTImageProcessorPil

from vitnb import cli
from vitnb.data import dataset, garden
from vitnb.data import images as images_module
from vitnb.data.images import read_image
from vitnb.data.splits import load_split
from vitnb.errors import UserError
from vitnb.models import checkpoints, pretrained
from vitnb.processes import child_environment
from vitnb.study import Pretrain, load_study
from vitnb.training import pretrain, pretrain_vit

ROOT = Path(__file__).resolve().parents[2]
TINY = Pretrain(
    hidden_size=32,
    layers=3,
    heads=2,
    patch_size=8,
    image_size=32,
    drawn_size=16,
    steps=6,
    batch_size=8,
    keep_tokens=0.25,
    full_steps=2,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return pretrain_vit.build_vit(replace(TINY, layers=4, hidden_size=64)).eval()


@pytest.fixture
def pixels():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_with_all_tokens_it_is_the_model_s_own_forward(model, pixels):
    everything = torch.arange(16).expand(5, 16)
    with torch.inference_mode():
        wanted = model(pixel_values=pixels).logits
        torch.testing.assert_close(
            pretrain_vit.forward_subset(model, pixels), wanted, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            pretrain_vit.forward_subset(model, pixels, everything),
            wanted,
            atol=1e-5,
            rtol=0,
        )


def test_dropped_tokens_count_for_nothing(model, pixels):
    """The oracle is the model's own forward with a mask over the dropped patches."""
    kept = pretrain_vit.sample_patches(5, 16, 6, torch.Generator().manual_seed(2))
    seen = torch.zeros(5, 17, dtype=torch.long)
    seen[:, 0] = 1
    seen.scatter_(1, kept + 1, 1)
    with torch.inference_mode():
        found = pretrain_vit.forward_subset(model, pixels, kept)
        model.set_attn_implementation("eager")  # ours ignores masks
        wanted, whole = (
            model(pixel_values=pixels, attention_mask=seen).logits,
            model(pixel_values=pixels).logits,
        )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (found - whole).abs().max() > 1e-2, (
        "a mask that changes nothing is no oracle"
    )


def test_the_choice_is_uniform_without_repeats():
    chosen = pretrain_vit.sample_patches(4000, 16, 6, torch.Generator().manual_seed(0))
    assert chosen.shape == (4000, 6) and all(
        len(set(row)) == 6 for row in chosen.tolist()
    )
    counts = chosen.flatten().bincount(minlength=16)
    assert (
        len(counts) == 16
        and (counts - 1500).abs().max() < 6 * (4000 * 6 / 16 * 10 / 16) ** 0.5
    )
    again = pretrain_vit.sample_patches(4000, 16, 6, torch.Generator().manual_seed(0))
    assert torch.equal(chosen.sort().values, again.sort().values)


@pytest.mark.parametrize(("share", "patches"), [(1.0, 16), (0.25, 4), (0.001, 1)])
def test_how_many_are_kept(model, share, patches):
    assert pretrain_vit.num_kept(model, share) == patches


@pytest.mark.parametrize(("drawn", "side"), [(64, 224), (64, 64), (64, 40), (33, 100)])
def test_pixels_are_those_of_the_saved_preprocessor(drawn, side):
    """Pillow rounds once more: one grey level of 255 at most, hardly any on average."""
    images = garden.pretraining_batch(6, torch.Generator().manual_seed(0), drawn)[0]
    processor = ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    wanted = processor(
        [Image.fromarray(image) for image in images.numpy()], return_tensors="pt"
    )["pixel_values"]
    found = pretrain.to_pixels(images, side)
    off = (found - wanted).abs() * 127.5
    assert found.shape == (6, 3, side, side) and off.max() < 1.01 and off.mean() < 0.3
    assert drawn != side or off.max() < 1e-3


def test_half_of_the_drawings_are_mirrored_and_none_of_the_held_out_ones():
    asked = replace(TINY, batch_size=256, drawn_size=32)
    plain, labels = garden.pretraining_batch(1024, torch.Generator().manual_seed(4), 32)
    for mirror in (False, True):
        batches = pretrain.drawn_batches(
            asked, torch.Generator().manual_seed(4), 0, mirror
        )
        some = [next(batches) for _ in range(4)]
        found, named = (torch.cat(part) for part in zip(*some, strict=True))
        wanted = pretrain.to_pixels(plain, 32)
        same, turned = (
            (found == w).flatten(1).all(1) for w in (wanted, wanted.flip(3))
        )
        assert torch.equal(named, labels) and (same | turned).all()
        assert 400 < turned.sum() < 624 if mirror else same.all()


def test_blocks_that_start_as_identities(pixels):
    still = pretrain_vit.build_vit(replace(TINY, residual_scale=0.0)).eval()
    with torch.inference_mode():
        stream = still.vit.layernorm(still.vit.embeddings(pixels))
        assert torch.equal(still.vit(pixels).last_hidden_state, stream)
    pretrain_vit.forward_subset(still, pixels).square().sum().backward()
    for layer in still.vit.layers:
        for last in (layer.attention.o_proj, layer.mlp.fc2):
            assert last.weight.grad.abs().max() > 0, "what starts at zero must learn"


def test_one_compilation_serves_all_blocks_and_a_compiler_that_fails_is_done_without(
    pixels, capsys
):
    torch._dynamo.reset()
    counter, made = CompileCounter(), pretrain_vit.build_vit(TINY)
    plain = pretrain_vit.forward_subset(made, pixels)
    pretrain_vit.compile_layers(made, 8, 4, backend=counter)
    assert counter.frame_count == 1
    torch.testing.assert_close(
        pretrain_vit.forward_subset(made, pixels), plain, atol=1e-5, rtol=0
    )
    assert counter.frame_count == 2, "another number of tokens is compiled for itself"
    before = counter.frame_count
    pretrain.held_out_top1(made, iter([(pixels, torch.zeros(5, dtype=torch.long))]), 1)
    assert counter.frame_count == before, "an evaluation compiled"
    assert all(parameter.grad is None for parameter in made.parameters())

    def broken(*_):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    pretrain_vit.compile_layers(made, 8, 4, backend=broken)
    assert "eager" in capsys.readouterr().out
    torch.testing.assert_close(
        pretrain_vit.forward_subset(made, pixels), plain, atol=1e-5, rtol=0
    )


def test_steps_that_take_too_long():
    """Ten steps take 20 s, others 1 s, the last 100 take 4 s: 1,310 s for 1,000.

    290 steps take 600 s.
    """
    asked = replace(TINY, steps=1000, full_steps=100, minutes=10.0)
    with pytest.raises(
        UserError,
        match=r"^1000 steps would take 21\.8 minutes, "
        r"more than 10: about 290 would fit$",
    ):
        pretrain.check_time_budget(asked, 4.0, 30, 40.0, 20.0)
    pretrain.check_time_budget(replace(asked, minutes=22.0), 4.0, 30, 40.0, 20.0)
    pretrain.check_time_budget(replace(asked, minutes=0.0), 4.0, 30, 40.0, 20.0)
    pretrain.check_time_budget(asked, 4.0, 1000, 1e6, 1e6)  # done is done


def test_the_defaults_are_those_of_the_embedded_base():
    """The card of the base was written together with the base."""
    card, asked = (ROOT / "data" / "base" / "README.md").read_text(), Pretrain()
    config = json.loads((ROOT / "data" / "base" / "config.json").read_text())
    assert config["hidden_size"] == asked.hidden_size
    assert config["num_hidden_layers"] == asked.layers
    assert config["num_attention_heads"] == asked.heads
    assert config["patch_size"] == asked.patch_size
    assert config["image_size"] == asked.image_size
    assert (
        config["intermediate_size"] == 4 * asked.hidden_size
        and asked.drawn_size == asked.image_size
    )
    assert (
        f"{asked.steps:,} x {asked.batch_size}" in card
        and f"peak learning rate {asked.learning_rate:g}," in card
    )
    assert (
        f"warm-up {asked.warmup_steps} steps" in card
        and f"weight decay {pretrain.WEIGHT_DECAY:g}" in card
    )
    assert (
        asked.keep_tokens,
        asked.full_steps,
        asked.residual_scale,
        asked.minutes,
    ) == (1.0, 0, 1.0, 0.0)


def test_it_learns(monkeypatch):
    """Train on four species instead of 800."""
    garden.pretraining_batch(1, torch.Generator())  # all 800 are kept for other tests
    monkeypatch.setattr(garden, "PRETRAINING_SPECIES", 4)
    asked = replace(
        TINY,
        steps=200,
        batch_size=32,
        drawn_size=32,
        learning_rate=3e-3,
        residual_scale=0.0,
        keep_tokens=0.5,
    )
    _, found = pretrain.train_base(asked, device="cpu")
    assert found["held_out_top1"] > 0.7 and found["held_out_images"] == 128
    assert [row["step"] for row in found["history"]] == [100, 200] and found["history"][
        0
    ]["images_per_second"] > 0


def test_the_last_steps_see_every_patch(monkeypatch):
    seen, logits = [], pretrain_vit.forward_subset

    def spied(model, pixels, kept=None):
        if model.training:
            seen.append(16 if kept is None else kept.shape[1])
        return logits(model, pixels, kept)

    monkeypatch.setattr(pretrain_vit, "forward_subset", spied)
    pretrain.train_base(TINY, device="cpu")
    assert seen == [4, 4, 4, 4, 16, 16]
    seen.clear()
    pretrain.train_base(replace(TINY, keep_tokens=1.0, full_steps=0), device="cpu")
    assert seen == [16] * 6


STUDY = """
title: t
question: q
data: garden
pretrain: {{hidden_size: 32, layers: 2, heads: 2, patch_size: 8, image_size: 32,
           drawn_size: 16, steps: {steps}, batch_size: 8, keep_tokens: 0.25,
           full_steps: 2, minutes: {minutes}}}
"""


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path / "out"))
    path = tmp_path / "own.yaml"
    path.write_text(STUDY.format(steps=6, minutes=0))
    return path


def test_a_study_s_own_base(study, tmp_path, capsys):
    loaded = load_study(str(study))
    with pytest.raises(
        UserError,
        match="no base model at .*own/base: "
        f"make it with 'python -m vitnb pretrain {study}'",
    ):
        pretrained.find_base(loaded)
    assert cli.main(["pretrain", str(study)]) == 0
    folder = tmp_path / "out" / "own" / "base"
    assert pretrained.find_base(loaded) == str(
        folder
    ) and capsys.readouterr().out.endswith(f"vitnb: {folder}\n")
    assert {path.name for path in folder.iterdir()} == {
        ".vitnb",
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    base, processor = (
        AutoModel.from_pretrained(folder, add_pooling_layer=False),
        AutoImageProcessor.from_pretrained(folder),
    )
    assert base.config.num_hidden_layers == 2 and processor.size["height"] == 32
    assert pretrained.load_base(loaded, ["a", "b", "c"]).config.num_labels == 3
    record = json.loads(
        (tmp_path / "out" / "own" / "records" / "pretrain.json").read_text()
    )
    assert (
        record["status"] == "ok"
        and record["study_asked"]["pretrain"]["keep_tokens"] == 0.25
    )
    assert record["base_sha256"] == checkpoints.fingerprint(folder)
    assert record["parameters"] == sum(p.numel() for p in base.parameters())
    (row,) = record["history"]
    assert row["step"] == 6 and set(row) == {
        "step",
        "loss",
        "held_out_top1",
        "images_per_second",
        "minutes",
    }
    card = (folder / "README.md").read_text()
    assert (
        "25% of the patches" in card
        and "at 16 px" in card
        and f"`python -m vitnb pretrain {study}`" in card
    )
    assert not re.search(r"[{}]", card)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["pretrain", str(study)]) == 1
    assert "exists: remove it" in capsys.readouterr().err and before == {
        p: p.read_bytes() for p in folder.iterdir()
    }


def test_one_seed_gives_the_same_base(study):
    asked = load_study(str(study)).pretrain
    first, again, other = (
        pretrain.train_base(asked, seed=seed, device="cpu")[0].state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_a_base_that_would_take_too_long_leaves_nothing(study, tmp_path, capsys):
    study.write_text(STUDY.format(steps=100_000, minutes=0.02))
    assert cli.main(["pretrain", str(study)]) == 1
    line = capsys.readouterr().err
    assert (
        "100000 steps would take" in line
        and "would fit" in line
        and len(line.splitlines()) == 1
    )
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_save_that_breaks_leaves_nothing(model, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(ViTImageProcessorPil, "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        pretrain_vit.save_base(model, "card", tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("pretrain: {step: 3}", "did you mean 'steps'?"),
        ("pretrain: {steps: 1.5}", "'steps' must be int"),
        ("pretrain: {keep_tokens: 0}", "'keep_tokens' cannot be 0"),
        ("pretrain: {keep_tokens: 1.1}", "'keep_tokens' cannot be 1.1"),
        (
            "pretrain: {steps: 5, full_steps: 6}",
            "full_steps 6 are more than the steps, 5",
        ),
        ("pretrain: {heads: 3}", "heads 3 does not divide hidden_size 128"),
        ("pretrain: {patch_size: 7}", "patch_size 7 does not divide image_size 64"),
        ("pretrain:", "lacks base"),
        ("pretrain: {}\nbase: data/base", "has base and pretrain: leave one out"),
        ("", "lacks base, or pretrain to make one"),
    ],
)
def test_a_pretrain_section_that_cannot_be(tmp_path, line, fix):
    path = tmp_path / "s.yaml"
    path.write_text(f"title: t\nquestion: q\ndata: garden\n{line}\n")
    with pytest.raises(UserError) as told:
        load_study(str(path))
    assert (
        fix in str(told.value)
        and str(path) in str(told.value)
        and "\n" not in str(told.value)
    )


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["embedded"], "has no pretrain section: its base is data/base"),
        (["embedded", "--steps", "3"], "leave the options out, or the study"),
        (["--out", "x"], "no NVIDIA GPU"),
    ],
)
def test_commands_that_cannot_be(words, fix, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["pretrain", *words]) == 1
    assert fix in capsys.readouterr().err


def test_a_batch_read_by_threads_is_the_batch_read_by_one(mini, monkeypatch):
    images = dataset.PixelDataset(
        load_split(mini, "train"),
        checkpoints.load_processor(pretrained.find_base(mini)),
        seed=3,
        crop_scale=0.5,
    )
    images.epoch, read, batches = 2, read_image, {}
    for cores in (2, 64):
        readers = set()
        monkeypatch.setattr(
            images_module.os,
            "sched_getaffinity",
            lambda _, cores=cores: set(range(cores)),
        )
        monkeypatch.setattr(
            dataset,
            "read_image",
            lambda path, seen=readers: (seen.add(threading.get_ident()), read(path))[1],
        )
        batches[cores] = [*dataset.make_batches(images, 16, shuffle_seed=1)]
        assert (readers == {threading.get_ident()}) == (cores == 2)
    for (one, names), (other, same) in zip(*batches.values(), strict=True):
        assert torch.equal(one, other) and torch.equal(names, same)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_it_compiles_and_stays_finite(capsys):
    _, found = pretrain.train_base(
        replace(TINY, hidden_size=128, batch_size=64, steps=40), device="cuda"
    )
    assert "torch.compile failed" not in capsys.readouterr().out
    assert 0 < found["loss"] < 10 and found["device"] == torch.cuda.get_device_name()


def planned(path: Path) -> set[str]:
    """Return the jobs that ``vitnb study`` would run."""
    done = subprocess.run(
        [sys.executable, "-m", "vitnb", "study", str(path), "--dry-run"],
        env=child_environment(),
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^(\w+) +\d+$", done.stdout, re.MULTILINE)
    return {*counts} - {"total"}


def test_a_study_makes_its_base_first_and_keeps_it(study, mini_yaml):
    shapes = re.search("data: .*", mini_yaml.read_text())[0]
    study.write_text(
        study.read_text().replace("data: garden", shapes) + "variants: [fp32-sdpa]\n"
    )
    others = {"finetune", "evaluate", "compare", "ablate", "infer", "report", "all"}
    assert planned(study) == others | {"pretrain"}
    assert cli.main(["pretrain", str(study)]) == 0
    study.write_text(study.read_text().replace("title: t", "title: another"))
    assert planned(study) == others
    assert "pretrain" not in planned(mini_yaml)
