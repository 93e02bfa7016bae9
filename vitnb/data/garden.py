"""The garden: a synthetic data set of drawn flowers.

102 species are for the study, 800 others for pretraining. There is no photograph and no
download: seeds decide every byte, on every machine. ``vitnb.data.species`` invents the
species, ``vitnb.data.drawing`` draws the pixels. Drawing needs PyTorch, which is loaded
only when something is drawn.
"""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vitnb.data.species import POSES, invent_names, invent_species

if TYPE_CHECKING:
    import torch

VARIATION = 1.0  # difficulty: how much one species varies from image to image (0: none)
STUDY_SPECIES = 102
PRETRAINING_SPECIES = 800
IMAGES_PER_CLASS = {"train": 10, "valid": 10, "test": 20}


def class_names(seed: int = 0) -> list[str]:
    """Return the invented names of the study's species, in label order."""
    _, genera = invent_species(STUDY_SPECIES, seed, 0)
    return invent_names(genera, seed)


def draw_split(name: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw the study's split ``train``, ``valid`` or ``test``.

    The bytes follow from ``seed`` and VARIATION alone.

    Returns:
        images uint8 RGB [n, 64, 64, 3] and labels int64 [n], in label order; n is 1020,
        1020 or 2040.

    Raises:
        KeyError: another name.
    """
    import torch

    from vitnb.data.drawing import draw

    labels = np.repeat(np.arange(STUDY_SPECIES), IMAGES_PER_CLASS[name])
    stream = 100 + list(IMAGES_PER_CLASS).index(name)
    random = np.random.RandomState([seed, 0, stream]).random_sample
    pose = random((len(labels), len(POSES))).astype(np.float32)
    traits = invent_species(STUDY_SPECIES, seed, 0)[0][labels]
    images = draw(torch.from_numpy(traits), torch.from_numpy(pose), variation=VARIATION)
    return images.numpy(), labels


def pretraining_batch(
    n: int, generator: "torch.Generator", size: int = 64, seed: int = 0
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Draw ``n`` new images of the pretraining species, on the generator's device.

    The generator's numbers may differ between machines.

    Returns:
        images uint8 RGB [n, size, size, 3] and labels int64 [n].
    """
    import torch

    from vitnb.data.drawing import draw

    device = generator.device
    labels = torch.randint(
        PRETRAINING_SPECIES, (n,), generator=generator, device=device
    )
    pose = torch.rand(n, len(POSES), generator=generator, device=device)
    traits = _pretraining_traits(seed, device)[labels]
    return draw(traits, pose, size, variation=VARIATION), labels


@functools.cache
def _pretraining_traits(seed: int, device: "torch.device") -> "torch.Tensor":
    """Return the traits of all pretraining species, on a device."""
    import torch

    traits, _ = invent_species(PRETRAINING_SPECIES, seed, 1)
    return torch.from_numpy(traits).to(device)


def write_folder(root: str | Path, seed: int = 0) -> Path:
    """Write the splits as lossless PNG, whole or not at all, and return ``root``.

    The files are ``root/train|valid|test/<class name>/NN.png``. A garden that is there
    already stays as it is. Two processes may write one folder at the same time.

    Raises:
        FileExistsError: ``root`` has other content, such as another seed's images.
    """
    root = Path(root)
    if _is_complete(root, seed):
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} is not this garden (seed {seed}) in full: "
            "remove it, or name another folder"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    # Not `files.new_folder`: replacing an existing folder would take images away
    # from another process that was faster and reads them already.
    with TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        draft = Path(temporary) / root.name
        _write_images(draft, seed)
        try:
            draft.rename(root)
        except OSError:  # another process was faster
            if not _is_complete(root, seed):
                raise
    return root


def _readme(seed: int) -> str:
    return (
        "Synthetic images, no photographs: flowers of invented species, "
        f"drawn by vitnb (garden, seed {seed}, variation {VARIATION}).\n"
    )


def _is_complete(root: Path, seed: int) -> bool:
    """Return whether a folder holds this garden, by its README and number of files."""
    readme = root / "README"
    if not readme.is_file() or readme.read_text() != _readme(seed):
        return False
    files = STUDY_SPECIES * sum(IMAGES_PER_CLASS.values())
    return len(list(root.glob("*/*/*.png"))) == files


def _write_images(root: Path, seed: int) -> None:
    """Draw all splits into a new folder."""
    names = class_names(seed)
    for split, count in IMAGES_PER_CLASS.items():
        images, labels = draw_split(split, seed)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / split / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i % count:02d}.png")
    (root / "README").write_text(_readme(seed))
