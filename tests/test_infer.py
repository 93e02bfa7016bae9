"""Inference on a folder with everything that people leave in folders."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import shape
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vitnb import data, figures, infer, models, variants
from vitnb.errors import UserError

BAD = {"b/cut.jpg", "b/text.png", "b/empty.png"}


@pytest.fixture
def folder(tmp_path):
    root, random = tmp_path / "pictures", np.random.RandomState(9)
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    for i in range(70):  # more than one batch
        shape("ring", random).save(root / "a" / f"{i:02d}.png")
    plain = shape("cross", random, 200)
    plain.save(root / "b" / "good.jpg")
    plain.convert("CMYK").save(root / "b" / "print.jpg")
    plain.convert("L").save(root / "b" / "grey.bmp")
    plain.save(root / "b" / "moving.gif", save_all=True, append_images=[shape("ring", random, 200)])
    Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257).save(root / "b" / "deep.png")
    (root / "b" / "cut.jpg").write_bytes((root / "b" / "good.jpg").read_bytes()[:1500])
    (root / "b" / "text.png").write_text("hello")
    (root / "b" / "empty.png").write_bytes(b"")
    return root


@pytest.fixture
def loaded(mini):
    return models.load(mini, variants.get("fp32-sdpa"))


def test_every_file_has_its_row_and_bad_ones_their_reason(mini, loaded, folder):
    root, paths = infer.sources(mini, str(folder))
    rows, speed = infer.classify(loaded, paths, root)
    names = [row["path"] for row in rows]
    assert names == sorted(names) and len(names) == 78 and speed > 0
    assert {row["path"] for row in rows if row["error"]} == BAD
    for row in rows:
        assert bool(row["error"]) != bool(row["top1"]), "a row has either names or a reason"
        assert str(folder) not in row["error"]


def test_names_and_probabilities_are_plain_transformers(mini, loaded, folder):
    checkpoint = mini.checkpoint("merged")
    model, processor = (
        AutoModelForImageClassification.from_pretrained(checkpoint).eval(),
        AutoImageProcessor.from_pretrained(checkpoint),
    )
    rows, _ = infer.classify(loaded, *infer.sources(mini, str(folder))[::-1])
    for row in rows:
        if row["error"]:
            continue
        with torch.inference_mode():
            logits = model(**processor(data.read(folder / row["path"]), return_tensors="pt")).logits[0]
        ps, order = logits.softmax(-1).sort(descending=True)
        for k in range(4):
            assert float(row[f"p{k + 1}"]) == pytest.approx(ps[k].item(), abs=1e-4)
            if k == 0 and ps[0] - ps[1] > 1e-3:
                assert row["top1"] == model.config.id2label[order[0].item()]
        assert row["top5"] == row["p5"] == "", "the model knows four classes"


def test_the_csv_reads_back(mini, loaded, folder, tmp_path):
    rows, _ = infer.classify(loaded, *infer.sources(mini, str(folder))[::-1])
    table = pd.read_csv(infer.write_csv(rows, tmp_path / "out" / "p.csv"), keep_default_na=False)
    assert list(table.columns) == infer.COLUMNS and len(table) == 78
    assert set(table.path[table.error != ""]) == BAD
    good = table[table.error == ""]
    probabilities = good[["p1", "p2", "p3", "p4"]].astype(float).to_numpy()
    assert (np.diff(probabilities) <= 0).all() and np.abs(probabilities.sum(1) - 1).max() < 5e-4


def test_the_test_split_is_the_default(mini):
    root, paths = infer.sources(mini, None)
    assert len(paths) == 24 and all(path.is_relative_to(root) and "/test/" in path.as_posix() for path in paths)


def test_folders_without_images(mini, tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        infer.sources(mini, str(tmp_path))
    with pytest.raises(UserError, match="no folder"):
        infer.sources(mini, str(tmp_path / "nowhere"))


def test_a_folder_without_a_readable_picture(mini, loaded, tmp_path):
    """Every row has its reason, and the figure is empty; the notebook goes on to its table and its record."""
    (tmp_path / "text.png").write_text("hello")
    rows, _ = infer.classify(loaded, *infer.sources(mini, str(tmp_path))[::-1])
    assert [row["path"] for row in rows] == ["text.png"] and rows[0]["error"]
    assert not any(axis.images for axis in figures.gallery(*infer.pictures(rows, tmp_path)).axes)


def test_pictures_for_the_eye(mini, loaded, folder):
    rows, _ = infer.classify(loaded, *infer.sources(mini, str(folder))[::-1])
    images, titles, right = infer.pictures(rows, folder, 10)
    assert len(images) == len(titles) == len(right) == 10 and not any(right), "no folder here bears a class's name"
