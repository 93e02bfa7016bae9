"""Arithmetic that gives the same bits on every processor, in any number of threads.

+ - * / sqrt, floor and comparisons are rounded exactly by IEEE 754; sin, exp and sums are not. So the angles' functions
here are made of the former alone. Angles are in turns: 1 is a full one.

Flowers: pixels from traits (what a species looks like) and a pose (one photograph of it).

How a flower is drawn without a loop over petals: take a pixel's angle around the centre, fold it into one petal's
sector, and ask for the distance to the outline of that petal. A pixel can lie on two neighbours; one of them is on top.
Only exactly rounded operations are used (`vitnb.exact`), so the same traits and pose give the same bytes everywhere.

Scenery: what is round a drawn flower, and the camera: backdrop, grass before it, exposure, colours and noise.

Only exactly rounded operations are used (`vitnb.exact`), as in `vitnb.flowers`.
"""

import torch
from torch import Tensor


def sin_turns(x: Tensor) -> Tensor:
    """sin(2 pi x) within 0.0012, from two parabolas."""
    x = x - torch.floor(x + 0.5)
    y = x * (8.0 - 16.0 * x.abs())
    return y * (0.775 + 0.225 * y.abs())


def cos_turns(x: Tensor) -> Tensor:
    """cos(2 pi x) within 0.0012."""
    return sin_turns(x + 0.25)


def atan2_turns(y: Tensor, x: Tensor) -> Tensor:
    """atan2(y, x) / (2 pi), in [-0.5, 0.5], within 0.00001 turns; 0 at the origin."""
    ax, ay = x.abs(), y.abs()
    z = torch.minimum(ax, ay) / torch.maximum(ax, ay).clamp(min=1e-12)
    z2 = z * z
    turns = z * (0.15913358 + z2 * (-0.05256880 + z2 * (0.02867033 + z2 * (-0.01354933 + z2 * 0.00331601))))
    turns = torch.where(ay > ax, 0.25 - turns, turns)
    turns = torch.where(x < 0, 0.5 - turns, turns)
    return torch.where(y < 0, -turns, turns)


def sqrt_exact(x: Tensor) -> Tensor:
    """The exactly rounded float32 square root: torch.sqrt may call MKL, whose last bit differs between builds.

    In float64 even a wrong last bit is too small to change what it rounds to.
    """
    return torch.sqrt(x.double()).float()


def hash01(x: Tensor) -> Tensor:
    """A number in [0, 1) that looks random, from a number."""
    x = x * 0.1031
    x = x - torch.floor(x)
    x = x * (x + 33.33)
    x = x * (x + x)
    return x - torch.floor(x)


def clip(x: Tensor) -> Tensor:
    return x.clamp(0.0, 1.0)


def smoothstep(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, smooth between."""
    x = x.clamp(0, 1)
    return x * x * (3.0 - 2.0 * x)


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
    stem = smoothstep((0.045 * p["scale"] - bow.abs()) * 25.0 + 0.5) * (v > 0)
    image = composite(image, t["leaf"] * (0.8 - 3.0 * bow), stem)
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
    return apply_camera(grass_blade(image, x, y, p), x, y, p, size)


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
    luck = hash01((k - n * torch.floor(k / n)) * 5.3 + p["seed"] * 371.0 + w["salt"])
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
    ellipse = sqrt_exact(lens + 1e-5)
    profile = (ellipse + w["point"] * (lens - ellipse)).clamp(min=0)
    slope = (half / length) * w["peak"] / (bend * bend) * (1.0 - 2.0 * warped) * 2.0
    slope = slope * (2.0 * w["point"] + (1.0 - w["point"]) / ellipse)
    slope = slope.clamp(-4.0, 4.0)  # if it is steeper, far pixels seem near
    inside = (half * profile - across.abs()) / sqrt_exact(1.0 + slope * slope) - (along - length).clamp(min=0)
    inside = torch.minimum(inside, (0.97 / n - off.abs()) * r * 6.2832)  # a petal ends before its next but one begins
    return inside, s, (across / (half * profile + 0.01)).clamp(-1.0, 1.0), axis, luck


def _shadow(image: Tensor, u: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """Darken the petals below a whorl that reaches `length`."""
    return image * (1.0 - 0.3 * smoothstep((length * 1.05 - sqrt_exact(u * u + v * v)) * 6.0))


def _whorl(image: Tensor, u: Tensor, v: Tensor, pixel: Tensor, w: dict[str, Tensor], p: dict[str, Tensor]) -> Tensor:
    """Paint one whorl of petals of equal shape, each lying on its next."""
    r = sqrt_exact(u * u + v * v)
    angle = atan2_turns(v, u) - p["turn"]
    k = torch.floor(angle * w["petals"] + w["phase"])
    upper, lower = _outline(angle, r, k, w, p), _outline(angle, r, k + 1.0, w, p)
    on_top = upper[0] > 0
    s, side, axis, luck = (torch.where(on_top, a, b) for a, b in zip(upper[1:], lower[1:], strict=True))
    inside = torch.maximum(upper[0], lower[0])
    # Colours along the petal, then marks.
    blend = smoothstep((s - w["throat"] * 0.9) * 2.2 + 0.35)
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
    chance = hash01(row * 3.1 + column * 17.7 + luck * 57.0)
    dot = clip((0.2 - ds * ds - dw * dw) * 9.0) * clip((0.8 - s) * 6.0) * (chance > 0.35)
    mark = torch.maximum(mark, w["spots"] * dot)
    mark = torch.maximum(mark, w["rim"] * clip((torch.maximum(width, s) - 0.78) * 7.0) * clip(s * 3.0 - 0.5))
    colour = composite(colour, w["mark"], mark * 0.85)
    # A petal is a shallow trough that falls off at its tip: which side is lit depends on where it points.
    light = p["light"] - axis - p["turn"]
    shade = 0.84 + 0.2 * s + w["cup"] * (0.16 * sin_turns(light) * side + 0.12 * cos_turns(light) * (s - 0.3))
    shade = shade + (luck - 0.5) * 0.1 - 0.05 * width * width
    below = smoothstep(upper[0] * 14.0 + 1.0)  # the upper petal's shadow on the lower one
    shade = torch.where(on_top, shade, shade * (1.0 - 0.32 * below))
    return composite(image, colour * shade, (inside / pixel + 0.5).clamp(0, 1))


def _heart(image: Tensor, u: Tensor, v: Tensor, pixel: Tensor, t: dict[str, Tensor], p: dict[str, Tensor]) -> Tensor:
    """Paint the disc with its spirals of florets, the ring round it, and the stamens."""
    r = sqrt_exact(u * u + v * v)
    angle = atan2_turns(v, u) - p["turn"]
    disc = t["disc"]
    image = image * (1.0 - 0.4 * smoothstep((disc * 1.5 - r) * 8.0))
    image = composite(image, t["mark"], t["ring"] * smoothstep((disc * 0.45 - (r - disc * 1.1).abs()) * 14.0 + 0.3))
    share = r / disc
    # 13 spirals one way and 8 the other cross in florets, as in a sunflower.
    one, other = angle * 13.0 + share * 2.6, angle * 8.0 - share * 3.4
    one, other = one - torch.floor(one) - 0.5, other - torch.floor(other) - 0.5
    floret = (1.0 - 4.0 * one * one) * (1.0 - 4.0 * other * other)
    fine = (disc * 0.18 / pixel).clamp(max=1.0)
    lit = 1.0 - 0.3 * share * share + 0.25 * (u * cos_turns(p["light"]) + v * sin_turns(p["light"])) / disc
    lit = lit * (1.0 + t["florets"] * fine * (floret - 0.45) * 0.9)
    cover = ((disc - r) / pixel + 0.5).clamp(0, 1)
    image = composite(image, t["heart"] * lit, cover)
    n = t["stamens"]
    k = torch.floor(angle * n)
    luck = hash01((k - n * torch.floor(k / n)) * 9.1 + p["seed"] * 57.0 + 5.0)
    reach = t["reach"] * (0.72 + 0.4 * luck)
    aside = (angle * n - k - 0.5 + (luck - 0.5) * 0.3) / n * r * 6.2832
    there = (t["reach"] > 0.05).float()
    thread = ((0.011 - aside.abs()) / pixel + 0.5).clamp(0, 1) * (r < reach) * there
    image = composite(image, t["heart"] * 0.4 + 0.55, thread * 0.7)
    knob = sqrt_exact(aside * aside + (r - reach) * (r - reach))
    image = composite(image, t["anther"] * (1.15 - 8.0 * knob), ((0.032 - knob) / pixel + 0.5).clamp(0, 1) * there)
    return image


def rgb(row: str) -> list[tuple[float, ...]]:
    return [tuple(value / 255 for value in bytes.fromhex(colour)) for colour in row.split()]


BACKDROP = rgb("5c8446 96b068 2e4a30 1c2420 a4c4de d6e2e6 beaa82 786046 60828c 3c585a cec8a8 8c7896")


_BLADE = (0x60 / 255, 0x8C / 255, 0x42 / 255)  # grass in front


def composite(image: Tensor, colour: Tensor, cover: Tensor) -> Tensor:
    """Lay `colour` over `image` [n, 3, h, w] where `cover` [n, 1, h, w] is 1."""
    return image + (colour - image) * cover


def backdrop(x: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Sky over meadow, far out of focus, with leaves and discs of light."""
    palette = torch.tensor(BACKDROP, device=x.device, dtype=torch.float32)
    chosen = ((p[name].flatten() * len(palette)).long().clamp(0, len(palette) - 1) for name in ("above", "below"))
    above, below = (palette[index].view(-1, 3, 1, 1) for index in chosen)
    image = composite(above, below, smoothstep(y * 0.6 + 0.5 + 0.25 * p["bend"] * x))
    luck = hash01(p["seed"] * 913.0 + torch.arange(36, device=x.device) * 7.7)
    for i in range(9):
        a, b, c, d = luck[..., 4 * i : 4 * i + 4].split(1, -1)
        dx, dy = x - (a * 2.6 - 1.3), y - (b * 2.6 - 1.3)
        if i < 4:  # leaves: long, dark or light, very soft
            along, across = dx * (c - 0.5) + dy * 0.5, dy * (c - 0.5) - dx * 0.5
            cover = smoothstep(1.0 - along * along * 3.0 - across * across * (12.0 + 60.0 * d)) * 0.6
            image = composite(image, below * (0.55 + 0.8 * d), cover)
        else:  # discs of light, brighter at the rim as a lens draws them
            radius = 0.08 + 0.22 * c
            far = sqrt_exact(dx * dx + dy * dy) / radius
            image = composite(image, above * 0.4 + 0.6, smoothstep((1.0 - far) * 5.0) * (0.12 + 0.2 * d) * (0.6 + 0.4 * far))
    return image


def grass_blade(image: Tensor, x: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Sometimes a blade of grass stands before the flower, out of focus."""
    off = (x - p["blade_x"] - p["blade_lean"] * (y - 0.6) - 0.3 * p["bend"] * y * y).abs()
    there = (p["blade"] > 0.12) * 0.85
    cover = smoothstep((0.1 - off) * 9.0 + 0.2) * smoothstep((y - p["blade_x"] * 0.8 + 0.5) * 1.5) * there
    green = torch.tensor(_BLADE, device=x.device, dtype=torch.float32).view(1, 3, 1, 1)
    return composite(image, green * (0.9 + 2.5 * (0.1 - off)), cover)


def apply_camera(image: Tensor, x: Tensor, y: Tensor, p: dict[str, Tensor], size: int) -> Tensor:
    """Exposure, white balance, faded colours, vignette and sensor noise, then 8 bits: uint8 [n, h, w, 3]."""
    sun = 1.0 + 0.16 * (x * cos_turns(p["light"]) + y * sin_turns(p["light"])) - 0.1 * (x * x + y * y)
    grey = (image[:, :1] + image[:, 1:2] + image[:, 2:]) * (1 / 3)
    image = image - (image - grey) * p["fade"]
    balance = torch.cat([p["gain"] * (1 + p["warm"]), p["gain"] * (1 + p["tint"]), p["gain"] * (1 - p["warm"])], 1)
    image = image * (sun * balance)
    grain = hash01((x * size) * 3.7 + 61.0 * hash01((y * size) * 5.9 + p["seed"] * 97.0))
    grain = hash01(grain * 311.0 + torch.arange(3, device=x.device).view(1, 3, 1, 1) * 13.7)
    image = image + (grain - 0.5) * p["noise"] * 2.0
    return (image * 255.0 + 0.5).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
