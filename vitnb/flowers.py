"""Flowers: pixels from traits (what a species looks like) and a pose (one photograph of it).

How a flower is drawn without a loop over petals: take a pixel's angle around the centre, fold it into one petal's
sector, and ask for the distance to the outline of that petal. A pixel can lie on two neighbours; one of them is on top.
Only exactly rounded operations are used (`vitnb.exact`), so the same traits and pose give the same bytes everywhere.
"""

import torch
from torch import Tensor

from vitnb.exact import atan2_turns, clip, cos_turns, hashed, ramp, root, sin_turns
from vitnb.scenery import backdrop, blade, develop, paint

# Trait: (least, most) over all families. Where the range starts below 0, the trait is absent in that share of species.
TRAITS = {
    "petals": (4, 21), "length": (0.58, 0.8), "width": (0.7, 1.45), "peak": (0.45, 2.6), "point": (-0.35, 1.1),
    "notch": (-0.3, 0.3), "ruffle": (-0.05, 0.07), "cup": (0.2, 1.0), "whorls": (1, 3), "taper": (0.55, 0.82),
    "throat": (-0.1, 0.75), "stripe": (-1.0, 0.9), "veins": (-0.8, 0.9), "spots": (-1.2, 1.0), "rim": (-0.8, 0.9),
    "disc": (0.06, 0.3), "florets": (0.2, 1.0), "ring": (-0.8, 0.9), "stamens": (5, 25), "reach": (-0.2, 0.34),
    "sepals": (2, 6), "sepal_length": (0.3, 1.15), "spin": (0.0, 0.5),
}  # fmt: skip
COLOURS = ("tip", "base", "mark", "heart", "anther", "leaf")  # of petal tips and bases, marks, disc, anthers, leaves
TRAITS_WIDTH = len(TRAITS) + 3 * len(COLOURS)

# Pose: (least, most) at VARIATION 1; the middle is the plain portrait.
POSES = {
    "x": (-0.26, 0.26), "y": (-0.26, 0.26), "scale": (0.72, 1.2), "turn": (-0.5, 0.5), "tilt": (-0.45, 0.45),
    "tilt_axis": (-0.5, 0.5), "light": (-0.5, 0.5), "gain": (0.8, 1.25), "warm": (-0.1, 0.1), "tint": (-0.07, 0.07),
    "open": (0.86, 1.12), "slim": (0.86, 1.14), "ragged": (0.0, 0.22), "fade": (-0.22, 0.22), "noise": (0.0, 0.035),
    "blade": (-0.5, 0.5), "blade_x": (-0.8, 0.8), "blade_lean": (-0.7, 0.7), "bend": (-0.4, 0.4),
    "seed": (0, 1), "above": (0, 1), "below": (0, 1),
}  # fmt: skip
_CHANCE = ("turn", "tilt_axis", "light", "seed", "above", "below")  # never narrowed or widened by VARIATION


def draw(traits: Tensor, pose: Tensor, size: int = 64, *, chunk: int | None = None,
         variation: float = 1.0) -> Tensor:  # fmt: skip
    """Draw one image per row: traits float32 [n, T] and poses float32 [n, P] in [0, 1) to uint8 RGB [n, size, size, 3].

    Runs on the tensors' device. `chunk` images are drawn at a time (None: what fits a processor's cache, or a GPU);
    neither it nor the number of threads changes a byte. `variation` widens (or, below 1, narrows) what
    differs between the photographs of one species. Raises ValueError for
    rows of another width.
    """
    if traits.shape[1:] != (TRAITS_WIDTH,) or pose.shape != (len(traits), len(POSES)):
        raise ValueError(f"traits must be [n, {TRAITS_WIDTH}] and poses [n, {len(POSES)}], "
                         f"got {[*traits.shape]} and {[*pose.shape]}")  # fmt: skip
    chunk = chunk or max(1, (2**22 if traits.is_cuda else 2**17) // size**2)
    images = torch.empty(len(traits), size, size, 3, dtype=torch.uint8, device=traits.device)
    for i in range(0, len(traits), chunk):
        images[i : i + chunk] = _photograph(traits[i : i + chunk], pose[i : i + chunk], size, variation)
    return images


def _photograph(traits: Tensor, pose: Tensor, size: int, variation: float) -> Tensor:
    """`draw` for one chunk of rows."""
    t, p = _named_traits(traits), _named_pose(pose, variation)
    axis = (torch.arange(size, device=traits.device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    x, y = axis.view(1, 1, 1, -1), axis.view(1, 1, -1, 1)
    image = backdrop(x, y, p)
    u, v = x - p["x"], y - p["y"]
    bow = u - p["bend"] * v * v  # the stem, bowed, out of focus below the flower
    stem = ramp((0.045 * p["scale"] - bow.abs()) * 25.0 + 0.5) * (v > 0)
    image = paint(image, t["leaf"] * (0.8 - 3.0 * bow), stem)
    # Into the plane of the flower: turn to the axis of the tilt, then stretch across it.
    cos, sin = cos_turns(p["tilt_axis"]), sin_turns(p["tilt_axis"])
    squash = 1.0 - 1.6 * p["tilt"] * p["tilt"]
    zoom = 1.0 / p["scale"]
    u, v = (u * cos + v * sin) * zoom, (v * cos - u * sin) * zoom / squash
    zoomed = zoom * (2.0 / size)  # the width of a pixel in the plane of the flower
    toward = {**p, "light": p["light"] - p["tilt_axis"]}  # the light, as the plane sees it
    sepals = {"petals": t["sepals"], "length": t["sepal_length"], "width": 0.55, "peak": 0.8, "point": 1.0,
              "notch": 0.0, "ruffle": 0.0, "phase": t["spin"] + 0.25, "salt": 3.0, "tip": t["leaf"],
              "base": t["leaf"] * 0.8, "stripe": 0.5, "veins": 0.3, "spots": 0.0, "rim": 0.0,
              "mark": t["leaf"] * 1.3}  # fmt: skip
    image = _whorl(image, u, v, zoomed, {**t, **sepals}, toward)
    for layer, shrink in enumerate((1.0, t["taper"], t["taper"] * t["taper"])):  # outer petals first
        rows = (t["whorls"] > layer).flatten().nonzero().flatten()
        inner = {**t, "length": t["length"] * shrink}
        inner, seen = ({name: value[rows] for name, value in d.items()} for d in (inner, toward))
        inner |= {"phase": 0.5 * layer, "salt": 11.0 * layer}
        rise = 0.11 * layer * seen["tilt"]  # inner whorls stand higher, so a tilt shifts them
        below = image[rows] if layer == 0 else _shadow(image[rows], u[rows], v[rows] - rise, inner["length"])
        image[rows] = _whorl(below, u[rows], v[rows] - rise, zoomed[rows], inner, seen)
    image = _heart(image, u, v - 0.16 * p["tilt"], zoomed, t, toward)
    return develop(blade(image, x, y, p), x, y, p, size)


def _named_traits(traits: Tensor) -> dict[str, Tensor]:
    """Columns by name, shaped to broadcast: [n, 1, 1, 1], and [n, 3, 1, 1] for colours."""
    named = {name: traits[:, i].view(-1, 1, 1, 1) for i, name in enumerate(TRAITS)}
    for i, name in enumerate(COLOURS):
        named[name] = traits[:, len(TRAITS) + 3 * i :][:, :3].reshape(-1, 3, 1, 1)
    return named


def _named_pose(pose: Tensor, variation: float) -> dict[str, Tensor]:
    """Pose values by name in their units, [n, 1, 1, 1]; `variation` widens or narrows them around the middle."""
    named = {}
    for i, (name, (least, most)) in enumerate(POSES.items()):
        spread = (most - least) * (1.0 if name in _CHANCE else variation)
        named[name] = (pose[:, i].view(-1, 1, 1, 1) - 0.5) * spread + (least + most) / 2
    return named


def _outline(angle: Tensor, r: Tensor, k: Tensor, w: dict[str, Tensor], p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Petal number `k` of a whorl at each pixel: distance inside its outline (below 0: outside), share of its length,
    signed share of its half-width, the angle of its axis, and its luck, a number in [0, 1) of its own."""
    n, length = w["petals"], w["length"]
    luck = hashed((k - n * torch.floor(k / n)) * 5.3 + p["seed"] * 371.0 + w["salt"])
    axis = (k - w["phase"] + (luck - 0.5) * p["ragged"] * 1.2) / n
    off = angle - axis
    along, across = r * cos_turns(off), r * sin_turns(off)
    half = w["length"] * w["width"] * p["slim"] * (0.08 + 2.1 / n)  # as wide as its sector, more or less
    lobe = (1.0 - across.abs() / half * 1.7).clamp(min=0)
    wave = w["ruffle"] * sin_turns(across / half * 1.3 + luck * 3.0)
    length = length * p["open"] * (1.0 - p["ragged"] * luck) * (1.0 - w["notch"] * lobe * lobe + wave) + 1e-4
    s = (along / length).clamp(0.0, 1.0)
    bend = s + w["peak"] * (1.0 - s)
    warped = s / bend
    lens = 4.0 * warped * (1.0 - warped)
    ellipse = root(lens + 1e-5)
    profile = (ellipse + w["point"] * (lens - ellipse)).clamp(min=0)
    slope = (half / length) * w["peak"] / (bend * bend) * (1.0 - 2.0 * warped) * 2.0
    slope = slope * (2.0 * w["point"] + (1.0 - w["point"]) / ellipse)
    slope = slope.clamp(-4.0, 4.0)  # if it is steeper, far pixels seem near
    inside = (half * profile - across.abs()) / root(1.0 + slope * slope) - (along - length).clamp(min=0)
    inside = torch.minimum(inside, (0.97 / n - off.abs()) * r * 6.2832)  # a petal ends before its next but one begins
    return inside, s, (across / (half * profile + 0.01)).clamp(-1.0, 1.0), axis, luck


def _shadow(image: Tensor, u: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """Darken the petals below a whorl that reaches `length`."""
    return image * (1.0 - 0.3 * ramp((length * 1.05 - root(u * u + v * v)) * 6.0))


def _whorl(image: Tensor, u: Tensor, v: Tensor, pixel: Tensor, w: dict[str, Tensor], p: dict[str, Tensor]) -> Tensor:
    """Paint one whorl of petals of equal shape, each lying on its next."""
    r = root(u * u + v * v)
    angle = atan2_turns(v, u) - p["turn"]
    k = torch.floor(angle * w["petals"] + w["phase"])
    upper, lower = _outline(angle, r, k, w, p), _outline(angle, r, k + 1.0, w, p)
    on_top = upper[0] > 0
    s, side, axis, luck = (torch.where(on_top, a, b) for a, b in zip(upper[1:], lower[1:], strict=True))
    inside = torch.maximum(upper[0], lower[0])
    # Colours along the petal, then marks.
    blend = ramp((s - w["throat"] * 0.9) * 2.2 + 0.35)
    colour = w["base"] + (w["tip"] - w["base"]) * blend
    width = side.abs()
    mark = w["stripe"] * clip((0.2 - width) * 6.0) * clip((0.92 - s) * 3.0)
    fine = (0.05 / pixel).clamp(max=1.0)  # veins finer than a pixel fade instead of shimmering
    vein = sin_turns(side * (2.2 + s) + 0.25 * (side > 0)).abs()
    vein = clip((vein - 0.72) * 3.5) * clip((0.95 - s) * 2.0) * clip(s * 4.0)
    mark = torch.maximum(mark, w["veins"] * fine * vein)
    cell_s, cell_w = s * 9.0 + luck, side * 2.5 + 0.5
    row, column = torch.floor(cell_s), torch.floor(cell_w)
    ds, dw = cell_s - row - 0.5, cell_w - column - 0.5
    chance = hashed(row * 3.1 + column * 17.7 + luck * 57.0)
    dot = clip((0.2 - ds * ds - dw * dw) * 9.0) * clip((0.8 - s) * 6.0) * (chance > 0.35)
    mark = torch.maximum(mark, w["spots"] * dot)
    mark = torch.maximum(mark, w["rim"] * clip((torch.maximum(width, s) - 0.78) * 7.0) * clip(s * 3.0 - 0.5))
    colour = paint(colour, w["mark"], mark * 0.85)
    # A petal is a shallow trough that falls off at its tip: which side is lit depends on where it points.
    light = p["light"] - axis - p["turn"]
    shade = 0.84 + 0.2 * s + w["cup"] * (0.16 * sin_turns(light) * side + 0.12 * cos_turns(light) * (s - 0.3))
    shade = shade + (luck - 0.5) * 0.1 - 0.05 * width * width
    below = ramp(upper[0] * 14.0 + 1.0)  # the upper petal's shadow on the lower one
    shade = torch.where(on_top, shade, shade * (1.0 - 0.32 * below))
    return paint(image, colour * shade, (inside / pixel + 0.5).clamp(0, 1))


def _heart(image: Tensor, u: Tensor, v: Tensor, pixel: Tensor, t: dict[str, Tensor], p: dict[str, Tensor]) -> Tensor:
    """Paint the disc with its spirals of florets, the ring round it, and the stamens."""
    r = root(u * u + v * v)
    angle = atan2_turns(v, u) - p["turn"]
    disc = t["disc"]
    image = image * (1.0 - 0.4 * ramp((disc * 1.5 - r) * 8.0))
    image = paint(image, t["mark"], t["ring"] * ramp((disc * 0.45 - (r - disc * 1.1).abs()) * 14.0 + 0.3))
    share = r / disc
    # 13 spirals one way and 8 the other cross in florets, as in a sunflower.
    one, other = angle * 13.0 + share * 2.6, angle * 8.0 - share * 3.4
    one, other = one - torch.floor(one) - 0.5, other - torch.floor(other) - 0.5
    floret = (1.0 - 4.0 * one * one) * (1.0 - 4.0 * other * other)
    fine = (disc * 0.18 / pixel).clamp(max=1.0)
    lit = 1.0 - 0.3 * share * share + 0.25 * (u * cos_turns(p["light"]) + v * sin_turns(p["light"])) / disc
    lit = lit * (1.0 + t["florets"] * fine * (floret - 0.45) * 0.9)
    cover = ((disc - r) / pixel + 0.5).clamp(0, 1)
    image = paint(image, t["heart"] * lit, cover)
    n = t["stamens"]
    k = torch.floor(angle * n)
    luck = hashed((k - n * torch.floor(k / n)) * 9.1 + p["seed"] * 57.0 + 5.0)
    reach = t["reach"] * (0.72 + 0.4 * luck)
    aside = (angle * n - k - 0.5 + (luck - 0.5) * 0.3) / n * r * 6.2832
    there = (t["reach"] > 0.05).float()
    thread = ((0.011 - aside.abs()) / pixel + 0.5).clamp(0, 1) * (r < reach) * there
    image = paint(image, t["heart"] * 0.4 + 0.55, thread * 0.7)
    knob = root(aside * aside + (r - reach) * (r - reach))
    image = paint(image, t["anther"] * (1.15 - 8.0 * knob), ((0.032 - knob) / pixel + 0.5).clamp(0, 1) * there)
    return image
