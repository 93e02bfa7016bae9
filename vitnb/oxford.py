"""Oxford Flowers-102 as it is published: ``jpg/``, ``imagelabels.mat`` and ``setid.mat``.

M.-E. Nilsback, A. Zisserman, *Automated Flower Classification over a Large Number of Classes*, ICVGIP 2008.
https://www.robots.ox.ac.uk/~vgg/data/flowers/102/
"""

from pathlib import Path

import numpy as np
from scipy.io import loadmat

from vitnb.errors import UserError, one_line

FILES = ("jpg", "imagelabels.mat", "setid.mat")
SETS = {"train": "trnid", "valid": "valid", "test": "tstid"}  # the official 1020, 1020 and 6149 images
# Label 1 to 102. The labels themselves are numbers; these are the names that go round with them (``cat_to_name.json``), typing
# errors included.
_NAMES = """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid, bird
of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris, globe-flower,
purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red
ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william, carnation,
garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya, cape flower, great masterwort,
siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold,
buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff,
gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata, japanese anemone, black-eyed susan, silverbush,
californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose,
thorn apple, morning glory, passion flower, lotus lotus, toad lily, anthurium, frangipani, clematis, hibiscus,
columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss,
foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
"""
NAMES = _NAMES.replace("\n", " ").strip().split(", ")


def splits(root: Path) -> tuple[dict[str, tuple[list[Path], list[int]]], int]:
    """Images and labels (from 0) of the official splits, in the order of ``setid.mat``, and the number of classes.

    Raises UserError if a part is missing or damaged, or the parts do not belong together.
    """
    again = "fetch them again with 'python -m vitnb download flowers-102'"
    for name in FILES:
        if not (root / name).exists():
            raise UserError(
                f"{root} lacks {name}, one of the three parts of Oxford Flowers-102 ({', '.join(FILES)}): {again}"
            )
    try:
        labels = np.atleast_1d(loadmat(root / "imagelabels.mat", squeeze_me=True)["labels"]).astype(int)
        sets = loadmat(root / "setid.mat", squeeze_me=True)
        ids = {name: np.atleast_1d(sets[key]).astype(int) for name, key in SETS.items()}
    except Exception as error:  # whatever scipy stumbles over
        raise UserError(f"{root}: imagelabels.mat or setid.mat is damaged ({one_line(error)}): {again}") from None
    named = np.concatenate(list(ids.values()))
    if not len(labels) or labels.min() < 1 or labels.max() > len(NAMES) or named.min() < 1 or named.max() > len(labels):
        raise UserError(f"{root}: imagelabels.mat and setid.mat do not belong together: {again}")
    there, found = {path.name for path in (root / "jpg").iterdir()}, {}
    for name, numbers in ids.items():
        files = [f"image_{number:05d}.jpg" for number in numbers]
        lacking = [file for file in files if file not in there]
        if lacking:
            raise UserError(
                f"{root / 'jpg'} lacks {len(lacking)} images of the {name} split, such as {lacking[0]}: {again}"
            )
        found[name] = [root / "jpg" / file for file in files], [int(labels[number - 1]) - 1 for number in numbers]
    return found, int(labels.max())
