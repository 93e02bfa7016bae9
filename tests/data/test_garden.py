"""The garden: the same bytes everywhere, 102 species, a folder whole or absent.

After a change of the look: view the flowers, print the new digest with
`PYTHONPATH=. python tests/data/test_garden.py`, and store it below.
"""

import functools
import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitnb.data import drawing, garden, species

DIGEST = "88eb879e2b1bebc8c8535d26434b35cf478f2a24137e93092ea7ba6b129ebec9"
SPLITS = ("train", "valid", "test")


@functools.cache
def images(name: str) -> tuple[np.ndarray, np.ndarray]:
    return garden.draw_split(name)


def digest() -> str:
    """sha256 over the images and labels of the three splits."""
    total = hashlib.sha256()
    for name in SPLITS:
        for array in images(name):
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def test_same_bytes_as_ever():
    assert digest() == DIGEST, "the study's images changed; see the top of this file"


def test_same_bytes_in_another_process_thread_count_and_chunk():
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, "7"]
    printed = subprocess.run(
        command, env=env, capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == [digest()]


@pytest.mark.parametrize("name", SPLITS)
def test_shapes_and_counts(name):
    pixels, labels = images(name)
    count = {"train": 10, "valid": 10, "test": 20}[name]
    assert pixels.shape == (102 * count, 64, 64, 3) and pixels.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [
        label for label in range(102) for _ in range(count)
    ]
    assert pixels.reshape(len(pixels), -1).std(1).min() > 10, (
        "an image is all but empty"
    )


def test_no_image_twice():
    seen = {image.tobytes() for name in SPLITS for image in images(name)[0]}
    assert len(seen) == 102 * 40


def test_another_seed_gives_other_flowers():
    one, other = (species.invent_species(102, seed, 0)[0] for seed in (0, 1))
    assert species.distance(one, other) > species.PRETRAINING_MARGIN


def test_unknown_split_and_wrong_width_are_refused():
    with pytest.raises(KeyError):
        garden.draw_split("validation")
    with pytest.raises(ValueError, match="poses"):
        drawing.draw(torch.zeros(2, species.TRAITS_WIDTH), torch.zeros(2, 3))


def test_species_differ_and_pretraining_has_others():
    study, _ = species.invent_species(102, 0, 0)
    others, _ = species.invent_species(800, 0, 1)
    assert study.shape[0] == 102 and others.shape[0] == 800
    assert species.distance(study, others) >= species.PRETRAINING_MARGIN
    assert (
        min(
            species.distance(study[i : i + 1], np.delete(study, i, 0))
            for i in range(102)
        )
        >= species.STUDY_MARGIN - 1e-6
    )
    assert species.distance(study[:5], study[4:]) == 0, (
        "the measure must see a species that is in both"
    )


def test_class_names():
    names = garden.class_names()
    assert len(set(names)) == 102 and names == sorted(names)
    assert all(len(name.split()) == 2 and name[0].isupper() for name in names)
    genera = species.invent_species(102, 0, 0)[1]
    for i in range(101):  # cousins, and only they, share the genus
        assert (names[i].split()[0] == names[i + 1].split()[0]) == (
            genera[i] == genera[i + 1]
        )


def test_pretraining_batch_is_repeatable_and_fresh():
    generator = torch.Generator().manual_seed(3)
    (first, labels), (second, _) = (
        garden.pretraining_batch(8, generator) for _ in range(2)
    )
    again, _ = garden.pretraining_batch(8, torch.Generator().manual_seed(3))
    assert (
        first.shape == (8, 64, 64, 3)
        and first.dtype == torch.uint8
        and int(labels.max()) < 800
    )
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_variation_zero_leaves_only_the_backdrop_and_the_angle():
    traits = torch.from_numpy(species.invent_species(102, 0, 0)[0][:1]).expand(2, -1)
    pose = torch.rand(2, len(species.POSES), generator=torch.Generator().manual_seed(0))
    for i, name in enumerate(species.POSES):
        if name in ("turn", "tilt_axis", "light", "seed", "above", "below"):
            pose[:, i] = pose[0, i]
    still, moved = drawing.draw(traits, pose, variation=0.0), drawing.draw(traits, pose)
    assert torch.equal(still[0], still[1]) and not torch.equal(moved[0], moved[1])


def test_draws_at_other_sizes():
    traits, pose = (
        torch.from_numpy(species.invent_species(102, 0, 0)[0][:2]),
        torch.full((2, len(species.POSES)), 0.5),
    )
    small, large = (
        drawing.draw(traits, pose).float(),
        drawing.draw(traits, pose, 128).float(),
    )
    halved = large.view(2, 64, 2, 64, 2, 3).mean((2, 4))
    assert (
        halved - small
    ).abs().mean() < 8  # grey levels; another flower differs by 40


def test_approximations():
    turns = torch.linspace(-1.5, 1.5, 10_001)
    true = torch.tensor([math.sin(2 * math.pi * x) for x in turns.tolist()])
    assert (drawing.sin_turns(turns) - true).abs().max() < 0.0012
    true = torch.tensor([math.cos(2 * math.pi * x) for x in turns.tolist()])
    assert (drawing.cos_turns(turns) - true).abs().max() < 0.0012
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, 101), torch.linspace(-1, 1, 103), indexing="ij"
    )
    pairs = zip(y.flatten().tolist(), x.flatten().tolist(), strict=True)
    true = torch.tensor([math.atan2(b, a) / (2 * math.pi) for b, a in pairs])
    gap = (drawing.atan2_turns(y, x).flatten() - true).abs()
    assert (
        torch.minimum(gap, 1 - gap).max() < 0.00001
    )  # half a turn either way is the same direction


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(garden, "IMAGES_PER_CLASS", {"train": 1, "valid": 1, "test": 2})


def test_folder_is_lossless_and_safe_to_repeat(tmp_path, few):
    root = garden.write_folder(tmp_path / "garden")
    assert (
        "synthetic" in (root / "README").read_text().lower()
        and "vitnb" in (root / "README").read_text()
    )
    names = garden.class_names()
    for split, count in garden.IMAGES_PER_CLASS.items():
        assert sorted(path.name for path in (root / split).iterdir()) == names
        pixels, labels = garden.draw_split(split)
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            assert np.array_equal(
                np.asarray(
                    Image.open(root / split / names[label] / f"{i % count:02d}.png")
                ),
                image,
            )
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    garden.write_folder(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["garden"]
    with pytest.raises(FileExistsError, match="seed 5"):
        garden.write_folder(root, seed=5)


def test_folder_is_whole_or_absent(tmp_path, few, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(garden, "draw_split", broken)
    with pytest.raises(RuntimeError, match="out of ink"):
        garden.write_folder(tmp_path / "garden")
    assert list(tmp_path.iterdir()) == []


def test_folder_written_by_another_process_meanwhile(tmp_path, few, monkeypatch):
    split = garden.draw_split

    def overtaken(*arguments):
        monkeypatch.setattr(garden, "draw_split", split)
        garden.write_folder(tmp_path / "garden")
        return split(*arguments)

    monkeypatch.setattr(garden, "draw_split", overtaken)
    assert garden.write_folder(tmp_path / "garden") == tmp_path / "garden"
    assert [path.name for path in tmp_path.iterdir()] == ["garden"]


if __name__ == "__main__":
    if sys.argv[1:]:
        drawing.draw = functools.partial(drawing.draw, chunk=int(sys.argv[1]))
    print(digest())
