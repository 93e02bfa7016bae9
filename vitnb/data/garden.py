"""garden: 102 species of synthetic flowers for the study and 800 others for pretraining, all drawn from seeds.

No photograph, no download, the same bytes on every machine. A *species* is a row of traits: how many petals, how wide and
how pointed they are, their colours and marks, the disc and the stamens. A *pose* is one photograph of it: where the flower
stands, how it is turned and tilted, the light, what lies behind and before it. Species come in genera: cousins share most
traits and differ in three, which is what makes the study's species hard to tell apart.
"""

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitnb.data.drawing import COLOURS, POSES, TRAITS, draw, rgb

VARIATION = 1.0  # the difficulty: how much one species varies from image to image (0: not at all)


STUDY_SPECIES, PRETRAINING_SPECIES = 102, 800


IMAGES_PER_CLASS = {"train": 10, "valid": 10, "test": 20}


# Least distance between two species, in units of the traits' ranges (see `distance`). The pretraining species are closer
# kin, so that the base must learn finer differences than the study asks for.
STUDY_MARGIN, PRETRAINING_MARGIN = 1.0, 0.8


FAMILIES = (  # what a genus narrows: daisies, primroses, poppies, lilies, dahlias, anemones
    {"petals": (13, 21), "width": (0.8, 1.2), "whorls": (1, 2), "disc": (0.17, 0.3), "reach": (-1, 0),
     "notch": (-0.3, 0.1)},
    {"petals": (5, 5), "width": (0.95, 1.4), "point": (-0.3, 0.4), "whorls": (1, 1), "disc": (0.06, 0.15)},
    {"petals": (4, 6), "width": (1.1, 1.45), "ruffle": (0, 0.07), "whorls": (1, 2), "disc": (0.08, 0.16),
     "reach": (0.12, 0.34)},
    {"petals": (6, 6), "width": (0.7, 1.1), "point": (0.4, 1.1), "whorls": (1, 1), "disc": (0.06, 0.1),
     "reach": (0.15, 0.34)},
    {"petals": (7, 13), "width": (0.8, 1.4), "whorls": (3, 3), "taper": (0.6, 0.75), "disc": (0.06, 0.13),
     "reach": (-1, 0.1)},
    {"petals": (7, 10), "width": (0.7, 1.2), "whorls": (1, 2), "disc": (0.1, 0.2)},
)  # fmt: skip


_PETAL = rgb("fcfaf4 faecbe fcd632 f69428 e23626 b2183c f8a4b6 de3e94 cca6e2 7c42b2 4254c4 86b4ec")


_DARK = rgb("6e1032 42185a 962818 3c281a fae25a fcf6ec")


_HEART = rgb("f4c424 d67818 56321a b0be46 3c1a32 faeca0")


_LEAF = rgb("427834 608c42 2e5c3a 78925c")


_PALETTES = {"tip": _PETAL, "base": _PETAL + _HEART[:4], "mark": _DARK, "heart": _HEART, "anther": _HEART + _DARK[:2],
             "leaf": _LEAF}  # fmt: skip


# Three of these tell one cousin from the other.
_TELLING = ("petals", "width", "peak", "point", "notch", "throat", "stripe", "veins", "spots", "rim", "disc", "reach",
            "tip", "base", "heart")  # fmt: skip


@functools.cache
def species(count: int, seed: int, stream: int) -> tuple[np.ndarray, list[int]]:
    """Draw `count` species: traits float32 [count, TRAITS_WIDTH], and the genus of each.

    Streams of one seed are independent: 0 for the study, 1 for pretraining.
    """
    random = np.random.RandomState([seed, stream, 7]).random_sample  # NumPy freezes this stream for good
    margin = PRETRAINING_MARGIN if stream else STUDY_MARGIN
    rows, genera = [], []
    genus = -1
    while len(rows) < count:
        genus += 1
        family, genes = FAMILIES[int(random() * len(FAMILIES))], random(len(TRAITS) + 4 * len(COLOURS))
        cousins = [_express(family, genes)]
        for _ in range(int(random() * 5)):
            while True:
                mutant = genes.copy()
                for gene in random(3):
                    name = _TELLING[int(gene * len(_TELLING))]
                    column = list(TRAITS).index(name) if name in TRAITS else len(TRAITS) + COLOURS.index(name)
                    mutant[column] = (mutant[column] + 0.25 + 0.5 * random()) % 1.0
                row = _express(family, mutant)
                if distance(row[None], np.stack(cousins)) >= margin:  # a mutation can be silent
                    break
            cousins.append(row)
        if not rows or distance(np.stack(cousins), np.stack(rows)) >= margin:
            rows += cousins
            genera += [genus] * len(cousins)
    return np.stack(rows[:count]).astype(np.float32), genera[:count]


def _express(family: dict, genes: np.ndarray) -> np.ndarray:
    """From genes in [0, 1) to traits in their units, within the family's ranges; colours come from shared palettes."""
    row = []
    for gene, (name, limits) in zip(genes, TRAITS.items(), strict=False):
        least, most = family.get(name, limits)
        whole = name in ("petals", "whorls", "stamens", "sepals")
        row.append(float(int(least + gene * (most - least + 1))) if whole else max(least + gene * (most - least), 0.0))
    for index, name in enumerate(COLOURS):
        palette, shades = _PALETTES[name], genes[len(TRAITS) + len(COLOURS) + 3 * index :][:3]
        colour = palette[int(genes[len(TRAITS) + index] * len(palette))]
        row += [min(max(c + 0.1 * (shade - 0.5), 0.0), 1.0) for c, shade in zip(colour, shades, strict=True)]
    return np.array(row)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Least Euclidean distance between a row of `a` [n, T] and a row of `b` [m, T], each trait divided by its range."""
    ranges = [most - max(least, 0) for least, most in TRAITS.values()] + [1.0] * (3 * len(COLOURS))
    gaps = (a[:, None].astype(np.float64) - b[None]) / np.array(ranges)
    return float(np.sqrt((gaps**2).sum(-1).min()))


def class_names(seed: int = 0) -> list[str]:
    """The 102 invented names in label order, which is also their alphabetical order; cousins share the genus."""
    random = np.random.RandomState([seed, 0, 11]).random_sample

    def word(*parts: str) -> str:
        return "".join(part.split()[int(random() * len(part.split()))] for part in parts)

    genera = species(STUDY_SPECIES, seed, 0)[1]
    first, names = set(), []
    while len(first) < len(set(genera)):
        first.add(word("Al Be Ca Du El Fi Ga Hi Ju Lo Mi Ne Or Pe Ru Sa Te Ul Vi Zo",
                       "lan ver min dor bel sil ther rum nov quel", "ia ella ina ora essa antha illa"))  # fmt: skip
    for genus, number in zip(sorted(first), sorted(set(genera)), strict=True):
        epithets = set()
        while len(epithets) < genera.count(number):
            epithets.add(word("lun vesp aur niv rub clar mont umbr pict stell camp sylv",
                              "aris ata ina ensis osa ula ea"))  # fmt: skip
        names += [f"{genus} {epithet}" for epithet in sorted(epithets)]
    return names


def split(name: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The study's images and labels: uint8 RGB [n, 64, 64, 3] and int64 [n], in label order; n is 1020, 1020 or 2040.

    `name` is train, valid or test; raises KeyError for another. The bytes follow from `seed` and VARIATION alone.
    """
    labels = np.repeat(np.arange(STUDY_SPECIES), IMAGES_PER_CLASS[name])
    random = np.random.RandomState([seed, 0, 100 + list(IMAGES_PER_CLASS).index(name)]).random_sample
    pose = random((len(labels), len(POSES))).astype(np.float32)
    traits = species(STUDY_SPECIES, seed, 0)[0][labels]
    return draw(torch.from_numpy(traits), torch.from_numpy(pose), variation=VARIATION).numpy(), labels


def pretraining_batch(n: int, generator: torch.Generator, size: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw `n` fresh images of the 800 other species, on the generator's device.

    Returns uint8 RGB [n, size, size, 3] and labels int64 [n]. The generator's stream may differ between machines.
    """
    device = generator.device
    labels = torch.randint(PRETRAINING_SPECIES, (n,), generator=generator, device=device)
    pose = torch.rand(n, len(POSES), generator=generator, device=device)
    return draw(_pretraining_traits(seed, device)[labels], pose, size, variation=VARIATION), labels


@functools.cache
def _pretraining_traits(seed: int, device: torch.device) -> Tensor:
    return torch.from_numpy(species(PRETRAINING_SPECIES, seed, 1)[0]).to(device)


def write_folder(root: str | Path, seed: int = 0) -> Path:
    """Write the splits as lossless `root/train|valid|test/<class name>/NN.png`, whole or not at all; returns `root`.

    Does nothing if they are there already; two processes may call it at once. Raises FileExistsError if `root` holds
    something else, another seed's images for one.
    """
    root = Path(root)
    readme = (f"Synthetic images, no photographs: flowers of invented species, drawn by vitnb (garden, seed {seed}, "
              f"variation {VARIATION}).\n")  # fmt: skip

    def complete() -> bool:
        note, files = root / "README", STUDY_SPECIES * sum(IMAGES_PER_CLASS.values())
        return note.is_file() and note.read_text() == readme and len([*root.glob("*/*/*.png")]) == files

    if complete():
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} is not this garden (seed {seed}) in full: remove it, or name another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        names = class_names(seed)
        for name, count in IMAGES_PER_CLASS.items():
            images, labels = split(name, seed)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                folder = draft / name / names[label]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{i % count:02d}.png")
        (draft / "README").write_text(readme)
        draft.chmod(0o755)  # mkdtemp makes it private
        try:
            draft.rename(root)
        except OSError:  # another process was first
            if not complete():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root
