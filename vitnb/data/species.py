"""Invent species of flowers: a row of traits each, drawn from a seed.

Traits are the number, width and shape of the petals, their colours and marks, the disc
and the stamens. Species come in genera. Species of one genus (cousins) differ in three
traits, which makes them hard to tell apart. A *pose* is one photograph of a species.
``vitnb.data.drawing`` draws pixels from traits and a pose.
"""

import functools

import numpy as np

# Trait: (least, most) over all families. Where the range starts below 0, the trait is
# absent in that share of species.
TRAITS = {
    "petals": (4, 21), "length": (0.58, 0.8), "width": (0.7, 1.45),
    "peak": (0.45, 2.6), "point": (-0.35, 1.1), "notch": (-0.3, 0.3),
    "ruffle": (-0.05, 0.07), "cup": (0.2, 1.0), "whorls": (1, 3),
    "taper": (0.55, 0.82), "throat": (-0.1, 0.75), "stripe": (-1.0, 0.9),
    "veins": (-0.8, 0.9), "spots": (-1.2, 1.0), "rim": (-0.8, 0.9),
    "disc": (0.06, 0.3), "florets": (0.2, 1.0), "ring": (-0.8, 0.9),
    "stamens": (5, 25), "reach": (-0.2, 0.34), "sepals": (2, 6),
    "sepal_length": (0.3, 1.15), "spin": (0.0, 0.5),
}  # fmt: skip

# Colours of petal tips, petal bases, marks, disc, anthers and leaves: RGB in [0, 1].
COLOURS = ("tip", "base", "mark", "heart", "anther", "leaf")
TRAITS_WIDTH = len(TRAITS) + 3 * len(COLOURS)
COUNTS = ("petals", "whorls", "stamens", "sepals")  # traits that are whole numbers

# Pose: (least, most) at variation 1; the middle is the plain portrait.
POSES = {
    "x": (-0.26, 0.26), "y": (-0.26, 0.26), "scale": (0.72, 1.2),
    "turn": (-0.5, 0.5), "tilt": (-0.45, 0.45), "tilt_axis": (-0.5, 0.5),
    "light": (-0.5, 0.5), "gain": (0.8, 1.25), "warm": (-0.1, 0.1),
    "tint": (-0.07, 0.07), "open": (0.86, 1.12), "slim": (0.86, 1.14),
    "ragged": (0.0, 0.22), "fade": (-0.22, 0.22), "noise": (0.0, 0.035),
    "blade": (-0.5, 0.5), "blade_x": (-0.8, 0.8), "blade_lean": (-0.7, 0.7),
    "bend": (-0.4, 0.4), "seed": (0, 1), "above": (0, 1), "below": (0, 1),
}  # fmt: skip

# Least distance between two species, in units of the traits' ranges (see `distance`).
# The pretraining species are closer kin, so that the base must learn finer differences
# than the study asks for.
STUDY_MARGIN = 1.0
PRETRAINING_MARGIN = 0.8

# Ranges that a genus narrows: daisies, primroses, poppies, lilies, dahlias, anemones.
FAMILIES = (
    {"petals": (13, 21), "width": (0.8, 1.2), "whorls": (1, 2), "disc": (0.17, 0.3),
     "reach": (-1, 0), "notch": (-0.3, 0.1)},
    {"petals": (5, 5), "width": (0.95, 1.4), "point": (-0.3, 0.4), "whorls": (1, 1),
     "disc": (0.06, 0.15)},
    {"petals": (4, 6), "width": (1.1, 1.45), "ruffle": (0, 0.07), "whorls": (1, 2),
     "disc": (0.08, 0.16), "reach": (0.12, 0.34)},
    {"petals": (6, 6), "width": (0.7, 1.1), "point": (0.4, 1.1), "whorls": (1, 1),
     "disc": (0.06, 0.1), "reach": (0.15, 0.34)},
    {"petals": (7, 13), "width": (0.8, 1.4), "whorls": (3, 3), "taper": (0.6, 0.75),
     "disc": (0.06, 0.13), "reach": (-1, 0.1)},
    {"petals": (7, 10), "width": (0.7, 1.2), "whorls": (1, 2), "disc": (0.1, 0.2)},
)  # fmt: skip


def parse_colours(row: str) -> list[tuple[float, ...]]:
    """Parse hexadecimal colours, "fcfaf4 faecbe": RGB in [0, 1] each."""
    return [
        tuple(value / 255 for value in bytes.fromhex(colour)) for colour in row.split()
    ]


PETAL = parse_colours(
    "fcfaf4 faecbe fcd632 f69428 e23626 b2183c "
    "f8a4b6 de3e94 cca6e2 7c42b2 4254c4 86b4ec"
)
DARK = parse_colours("6e1032 42185a 962818 3c281a fae25a fcf6ec")
HEART = parse_colours("f4c424 d67818 56321a b0be46 3c1a32 faeca0")
LEAF = parse_colours("427834 608c42 2e5c3a 78925c")
PALETTES = {
    "tip": PETAL,
    "base": PETAL + HEART[:4],
    "mark": DARK,
    "heart": HEART,
    "anther": HEART + DARK[:2],
    "leaf": LEAF,
}

# Three of these tell one cousin from another.
TELLING = (
    *("petals", "width", "peak", "point", "notch", "throat", "stripe", "veins"),
    *("spots", "rim", "disc", "reach", "tip", "base", "heart"),
)

# Parts of the invented names: beginnings and endings of genera and of epithets.
GENUS_PARTS = (
    "Al Be Ca Du El Fi Ga Hi Ju Lo Mi Ne Or Pe Ru Sa Te Ul Vi Zo",
    "lan ver min dor bel sil ther rum nov quel",
    "ia ella ina ora essa antha illa",
)
EPITHET_PARTS = (
    "lun vesp aur niv rub clar mont umbr pict stell camp sylv",
    "aris ata ina ensis osa ula ea",
)


@functools.cache
def invent_species(count: int, seed: int, stream: int) -> tuple[np.ndarray, list[int]]:
    """Invent ``count`` species from a seed.

    Streams of one seed are independent: 0 for the study, 1 for pretraining.

    Returns:
        traits float32 [count, TRAITS_WIDTH], and the genus of each species.
    """
    # NumPy never changes the numbers of RandomState.
    random = np.random.RandomState([seed, stream, 7]).random_sample
    margin = PRETRAINING_MARGIN if stream else STUDY_MARGIN
    rows = []
    genera = []
    genus = -1
    while len(rows) < count:
        genus += 1
        cousins = _invent_genus(random, margin)
        if not rows or distance(np.stack(cousins), np.stack(rows)) >= margin:
            rows += cousins
            genera += [genus] * len(cousins)
    return np.stack(rows[:count]).astype(np.float32), genera[:count]


def _invent_genus(random, margin: float) -> list[np.ndarray]:
    """Invent one to five cousins, at least ``margin`` apart."""
    family = FAMILIES[int(random() * len(FAMILIES))]
    genes = random(len(TRAITS) + 4 * len(COLOURS))
    cousins = [_express(family, genes)]
    for _ in range(int(random() * 5)):
        row = _express(family, _mutate(genes, random))
        while distance(row[None], np.stack(cousins)) < margin:  # a silent mutation
            row = _express(family, _mutate(genes, random))
        cousins.append(row)
    return cousins


def _mutate(genes: np.ndarray, random) -> np.ndarray:
    """Change the genes of three traits that tell cousins apart."""
    mutant = genes.copy()
    for gene in random(3):
        name = TELLING[int(gene * len(TELLING))]
        if name in TRAITS:
            column = list(TRAITS).index(name)
        else:
            column = len(TRAITS) + COLOURS.index(name)
        mutant[column] = (mutant[column] + 0.25 + 0.5 * random()) % 1.0
    return mutant


def _express(family: dict, genes: np.ndarray) -> np.ndarray:
    """Turn genes in [0, 1) into traits in their units, within the family's ranges.

    A colour is one of its palette's, slightly changed.
    """
    row = []
    for gene, (name, limits) in zip(genes, TRAITS.items(), strict=False):
        least, most = family.get(name, limits)
        if name in COUNTS:
            row.append(float(int(least + gene * (most - least + 1))))
        else:
            row.append(max(least + gene * (most - least), 0.0))
    for index, name in enumerate(COLOURS):
        palette = PALETTES[name]
        colour = palette[int(genes[len(TRAITS) + index] * len(palette))]
        shades = genes[len(TRAITS) + len(COLOURS) + 3 * index :][:3]
        row += [
            min(max(channel + 0.1 * (shade - 0.5), 0.0), 1.0)
            for channel, shade in zip(colour, shades, strict=True)
        ]
    return np.array(row)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the least Euclidean distance between a row of ``a`` and a row of ``b``.

    Rows are traits, [n, TRAITS_WIDTH] and [m, TRAITS_WIDTH]. Each trait is divided by
    its range.
    """
    ranges = [most - max(least, 0) for least, most in TRAITS.values()]
    ranges += [1.0] * (3 * len(COLOURS))
    gaps = (a[:, None].astype(np.float64) - b[None]) / np.array(ranges)
    return float(np.sqrt((gaps**2).sum(-1).min()))


def invent_names(genera: list[int], seed: int) -> list[str]:
    """Invent a name for each species, in alphabetical order.

    ``genera`` holds the genus of each species; cousins share the first word.
    """
    random = np.random.RandomState([seed, 0, 11]).random_sample

    def words(parts: tuple[str, ...], count: int) -> list[str]:
        made = set()
        while len(made) < count:
            syllables = [part.split() for part in parts]
            made.add("".join(some[int(random() * len(some))] for some in syllables))
        return sorted(made)

    numbers = sorted(set(genera))
    names = []
    for genus, number in zip(words(GENUS_PARTS, len(numbers)), numbers, strict=True):
        epithets = words(EPITHET_PARTS, genera.count(number))
        names += [f"{genus} {epithet}" for epithet in epithets]
    return names
