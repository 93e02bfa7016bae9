"""Draw flowers: pixels from traits (a species) and a pose (one photograph of it).

The same traits and pose give the same bytes on every processor, with any number of
threads. IEEE 754 rounds + - * / sqrt, floor and comparisons exactly; sin, exp and sums
differ between processors. So everything here is made of the former alone.

A flower is drawn without a loop over petals. Each pixel's angle around the centre is
folded into one petal's sector, and the distance to the outline of that petal decides
the colour. A pixel can lie on two neighbouring petals: one of them is on top.

In all functions, ``x`` and ``y`` are a pixel's place in the picture, from -1 to 1, and
``u`` and ``v`` its place in the plane of the flower. ``t`` holds traits, ``w`` the
traits of one whorl (a ring of petals), ``p`` the pose, each by name and shaped to
broadcast over [n, channels, height, width]. ``pixel`` is the width of a pixel. Angles
are in turns: 1 is a full circle.
"""

import torch
from torch import Tensor

from vitnb.data.species import COLOURS, POSES, TRAITS, TRAITS_WIDTH, parse_colours

Named = dict[str, Tensor]  # traits, or the values of a pose, by name

# ---------------------------------------------------------------- portable arithmetic


def sin_turns(x: Tensor) -> Tensor:
    """Return sin(2 pi x) within 0.0012, from two parabolas."""
    x = x - torch.floor(x + 0.5)
    y = x * (8.0 - 16.0 * x.abs())
    return y * (0.775 + 0.225 * y.abs())


def cos_turns(x: Tensor) -> Tensor:
    """Return cos(2 pi x) within 0.0012."""
    return sin_turns(x + 0.25)


def atan2_turns(y: Tensor, x: Tensor) -> Tensor:
    """Return atan2(y, x) / (2 pi), in [-0.5, 0.5], within 0.00001; 0 at the origin."""
    ax, ay = x.abs(), y.abs()
    z = torch.minimum(ax, ay) / torch.maximum(ax, ay).clamp(min=1e-12)
    z2 = z * z
    series = 0.02867033 + z2 * (-0.01354933 + z2 * 0.00331601)
    turns = z * (0.15913358 + z2 * (-0.05256880 + z2 * series))
    turns = torch.where(ay > ax, 0.25 - turns, turns)
    turns = torch.where(x < 0, 0.5 - turns, turns)
    return torch.where(y < 0, -turns, turns)


def sqrt_exact(x: Tensor) -> Tensor:
    """Return the exactly rounded float32 square root.

    torch.sqrt may call MKL, whose last bit differs between builds. In float64 an error
    of the last bit is too small to change the rounded float32.
    """
    return torch.sqrt(x.double()).float()


def hash01(x: Tensor) -> Tensor:
    """Return a number in [0, 1) that looks random, from a number."""
    x = x * 0.1031
    x = x - torch.floor(x)
    x = x * (x + 33.33)
    x = x * (x + x)
    return x - torch.floor(x)


def clip(x: Tensor) -> Tensor:
    """Limit to [0, 1]."""
    return x.clamp(0.0, 1.0)


def smoothstep(x: Tensor) -> Tensor:
    """Return 0 below 0, 1 above 1, and a smooth curve between."""
    x = x.clamp(0, 1)
    return x * x * (3.0 - 2.0 * x)


def composite(image: Tensor, colour: Tensor, cover: Tensor) -> Tensor:
    """Lay ``colour`` over ``image`` [n, 3, h, w] where ``cover`` [n, 1, h, w] is 1."""
    return image + (colour - image) * cover


# ---------------------------------------------------------------- one photograph

# Pose values that follow from chance alone: `variation` leaves them as they are.
CHANCE = ("turn", "tilt_axis", "light", "seed", "above", "below")


def draw(
    traits: Tensor,
    pose: Tensor,
    size: int = 64,
    *,
    chunk: int | None = None,
    variation: float = 1.0,
) -> Tensor:
    """Draw one image for each row of traits and pose, on the tensors' device.

    Args:
        traits: float32 [n, TRAITS_WIDTH].
        pose: float32 [n, len(POSES)], in [0, 1).
        size: pixels a side.
        chunk: images drawn at a time (None: as many as fit a processor's cache, or a
            GPU). Neither ``chunk`` nor the number of threads changes a byte.
        variation: how far the photographs of one species differ: 1 as POSES says.

    Returns:
        uint8 RGB [n, size, size, 3].

    Raises:
        ValueError: rows of another width.
    """
    if traits.shape[1:] != (TRAITS_WIDTH,) or pose.shape != (len(traits), len(POSES)):
        raise ValueError(
            f"traits must be [n, {TRAITS_WIDTH}] and poses [n, {len(POSES)}], "
            f"got {[*traits.shape]} and {[*pose.shape]}"
        )
    pixels = 2**22 if traits.is_cuda else 2**17
    chunk = chunk or max(1, pixels // size**2)
    images = torch.empty(
        len(traits), size, size, 3, dtype=torch.uint8, device=traits.device
    )
    for i in range(0, len(traits), chunk):
        rows = slice(i, i + chunk)
        images[rows] = _draw_chunk(traits[rows], pose[rows], size, variation)
    return images


def _draw_chunk(traits: Tensor, pose: Tensor, size: int, variation: float) -> Tensor:
    """Draw one chunk of rows, from the back of the scene to its front."""
    t = _named_traits(traits)
    p = _named_pose(pose, variation)
    axis = torch.arange(size, device=traits.device, dtype=torch.float32)
    axis = (axis + 0.5) * (2.0 / size) - 1.0
    x, y = axis.view(1, 1, 1, -1), axis.view(1, 1, -1, 1)
    image = _draw_stem(backdrop(x, y, p), x, y, t, p)
    u, v, zoom = _to_flower_plane(x, y, p)
    pixel = zoom * (2.0 / size)
    in_plane = {**p, "light": p["light"] - p["tilt_axis"]}
    image = _draw_whorl(image, u, v, pixel, {**t, **_sepals(t)}, in_plane)
    image = _draw_petals(image, u, v, pixel, t, in_plane)
    image = _draw_heart(image, u, v - 0.16 * p["tilt"], pixel, t, in_plane)
    return apply_camera(grass_blade(image, x, y, p), x, y, p, size)


def _named_traits(traits: Tensor) -> Named:
    """Return columns by name: [n, 1, 1, 1], and [n, 3, 1, 1] for colours."""
    named = {name: traits[:, i].view(-1, 1, 1, 1) for i, name in enumerate(TRAITS)}
    for i, name in enumerate(COLOURS):
        rgb = traits[:, len(TRAITS) + 3 * i :][:, :3]
        named[name] = rgb.reshape(-1, 3, 1, 1)
    return named


def _named_pose(pose: Tensor, variation: float) -> Named:
    """Return pose values by name in their units, [n, 1, 1, 1].

    ``variation`` widens or narrows the ranges around their middle.
    """
    named = {}
    for i, (name, (least, most)) in enumerate(POSES.items()):
        width = (most - least) * (1.0 if name in CHANCE else variation)
        value = pose[:, i].view(-1, 1, 1, 1)
        named[name] = (value - 0.5) * width + (least + most) / 2
    return named


def _to_flower_plane(x: Tensor, y: Tensor, p: Named) -> tuple[Tensor, Tensor, Tensor]:
    """Turn to the axis of the tilt and stretch across it: u, v and their zoom."""
    u, v = x - p["x"], y - p["y"]
    cos, sin = cos_turns(p["tilt_axis"]), sin_turns(p["tilt_axis"])
    squash = 1.0 - 1.6 * p["tilt"] * p["tilt"]
    zoom = 1.0 / p["scale"]
    return (u * cos + v * sin) * zoom, (v * cos - u * sin) * zoom / squash, zoom


# ---------------------------------------------------------------- the flower


def _draw_stem(image: Tensor, x: Tensor, y: Tensor, t: Named, p: Named) -> Tensor:
    """Draw the stem: bowed, and out of focus below the flower."""
    u, v = x - p["x"], y - p["y"]
    bow = u - p["bend"] * v * v
    cover = smoothstep((0.045 * p["scale"] - bow.abs()) * 25.0 + 0.5) * (v > 0)
    return composite(image, t["leaf"] * (0.8 - 3.0 * bow), cover)


def _sepals(t: Named) -> dict[str, Tensor | float]:
    """Return the sepals as a whorl of green petals."""
    return {
        "petals": t["sepals"], "length": t["sepal_length"], "width": 0.55,
        "peak": 0.8, "point": 1.0, "notch": 0.0, "ruffle": 0.0,
        "phase": t["spin"] + 0.25, "salt": 3.0, "tip": t["leaf"],
        "base": t["leaf"] * 0.8, "stripe": 0.5, "veins": 0.3, "spots": 0.0,
        "rim": 0.0, "mark": t["leaf"] * 1.3,
    }  # fmt: skip


def _draw_petals(
    image: Tensor, u: Tensor, v: Tensor, pixel: Tensor, t: Named, p: Named
) -> Tensor:
    """Draw up to three whorls of petals, the outer one first."""
    for layer, shrink in enumerate((1.0, t["taper"], t["taper"] * t["taper"])):
        rows = (t["whorls"] > layer).flatten().nonzero().flatten()
        whorl = {**t, "length": t["length"] * shrink}
        whorl = {name: value[rows] for name, value in whorl.items()}
        whorl |= {"phase": 0.5 * layer, "salt": 11.0 * layer}
        pose = {name: value[rows] for name, value in p.items()}
        # Inner whorls stand higher, so a tilt shifts them.
        rise = 0.11 * layer * pose["tilt"]
        place = (u[rows], v[rows] - rise)
        below = image[rows]
        if layer > 0:
            below = _shadow(below, *place, whorl["length"])
        image[rows] = _draw_whorl(below, *place, pixel[rows], whorl, pose)
    return image


def _shadow(image: Tensor, u: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """Darken the petals below a whorl that reaches ``length``."""
    reach = length * 1.05 - sqrt_exact(u * u + v * v)
    return image * (1.0 - 0.3 * smoothstep(reach * 6.0))


def _draw_whorl(
    image: Tensor, u: Tensor, v: Tensor, pixel: Tensor, w: Named, p: Named
) -> Tensor:
    """Draw one whorl of petals of equal shape, each lying on its next."""
    r = sqrt_exact(u * u + v * v)
    angle = atan2_turns(v, u) - p["turn"]
    k = torch.floor(angle * w["petals"] + w["phase"])
    upper = _outline(angle, r, k, w, p)
    lower = _outline(angle, r, k + 1.0, w, p)
    on_top = upper[0] > 0
    s, side, axis, luck = (
        torch.where(on_top, a, b) for a, b in zip(upper[1:], lower[1:], strict=True)
    )
    colour = w["base"] + (w["tip"] - w["base"]) * smoothstep(
        (s - w["throat"] * 0.9) * 2.2 + 0.35
    )
    colour = composite(colour, w["mark"], _marks(s, side, luck, pixel, w) * 0.85)
    # A petal is a shallow trough that falls off at its tip: its direction decides
    # which side is lit.
    light = p["light"] - axis - p["turn"]
    lit = 0.16 * sin_turns(light) * side + 0.12 * cos_turns(light) * (s - 0.3)
    shade = 0.84 + 0.2 * s + w["cup"] * lit
    width = side.abs()
    shade = shade + (luck - 0.5) * 0.1 - 0.05 * width * width
    shadow = smoothstep(upper[0] * 14.0 + 1.0)  # of the upper petal on the lower one
    shade = torch.where(on_top, shade, shade * (1.0 - 0.32 * shadow))
    inside = torch.maximum(upper[0], lower[0])
    return composite(image, colour * shade, (inside / pixel + 0.5).clamp(0, 1))


def _outline(
    angle: Tensor, r: Tensor, k: Tensor, w: Named, p: Named
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return where each pixel lies on petal number ``k`` of a whorl.

    Returns:
        The distance inside the outline (below 0: outside), the share of the length, the
        signed share of the half-width, the angle of the petal's axis, and the petal's
        luck: a random number in [0, 1) of its own.
    """
    n, length = w["petals"], w["length"]
    luck = hash01((k - n * torch.floor(k / n)) * 5.3 + p["seed"] * 371.0 + w["salt"])
    axis = (k - w["phase"] + (luck - 0.5) * p["ragged"] * 1.2) / n
    off = angle - axis
    along, across = r * cos_turns(off), r * sin_turns(off)
    # About as wide as the petal's sector.
    half = w["length"] * w["width"] * p["slim"] * (0.08 + 2.1 / n)
    lobe = (1.0 - across.abs() / half * 1.7).clamp(min=0)
    wave = w["ruffle"] * sin_turns(across / half * 1.3 + luck * 3.0)
    edge = 1.0 - w["notch"] * lobe * lobe + wave
    length = length * p["open"] * (1.0 - p["ragged"] * luck) * edge + 1e-4
    s = (along / length).clamp(0.0, 1.0)
    bend = s + w["peak"] * (1.0 - s)
    warped = s / bend
    lens = 4.0 * warped * (1.0 - warped)
    ellipse = sqrt_exact(lens + 1e-5)
    profile = (ellipse + w["point"] * (lens - ellipse)).clamp(min=0)
    slope = (half / length) * w["peak"] / (bend * bend) * (1.0 - 2.0 * warped) * 2.0
    slope = slope * (2.0 * w["point"] + (1.0 - w["point"]) / ellipse)
    slope = slope.clamp(-4.0, 4.0)  # with a steeper one, far pixels seem near
    inside = (half * profile - across.abs()) / sqrt_exact(1.0 + slope * slope)
    inside = inside - (along - length).clamp(min=0)
    # A petal ends before its next but one begins.
    inside = torch.minimum(inside, (0.97 / n - off.abs()) * r * 6.2832)
    side = (across / (half * profile + 0.01)).clamp(-1.0, 1.0)
    return inside, s, side, axis, luck


def _marks(s: Tensor, side: Tensor, luck: Tensor, pixel: Tensor, w: Named) -> Tensor:
    """Return how much of a petal's colour is its mark: stripe, veins, spots and rim."""
    width = side.abs()
    mark = w["stripe"] * clip((0.2 - width) * 6.0) * clip((0.92 - s) * 3.0)
    fine = (0.05 / pixel).clamp(max=1.0)  # veins below a pixel fade, or they shimmer
    vein = sin_turns(side * (2.2 + s) + 0.25 * (side > 0)).abs()
    vein = clip((vein - 0.72) * 3.5) * clip((0.95 - s) * 2.0) * clip(s * 4.0)
    mark = torch.maximum(mark, w["veins"] * fine * vein)
    cell_s, cell_w = s * 9.0 + luck, side * 2.5 + 0.5
    row, column = torch.floor(cell_s), torch.floor(cell_w)
    ds, dw = cell_s - row - 0.5, cell_w - column - 0.5
    chance = hash01(row * 3.1 + column * 17.7 + luck * 57.0)
    dot = clip((0.2 - ds * ds - dw * dw) * 9.0) * clip((0.8 - s) * 6.0)
    mark = torch.maximum(mark, w["spots"] * (dot * (chance > 0.35)))
    rim = clip((torch.maximum(width, s) - 0.78) * 7.0)
    return torch.maximum(mark, w["rim"] * rim * clip(s * 3.0 - 0.5))


def _draw_heart(
    image: Tensor, u: Tensor, v: Tensor, pixel: Tensor, t: Named, p: Named
) -> Tensor:
    """Draw the disc with its spirals of florets, the ring round it, and the stamens."""
    r = sqrt_exact(u * u + v * v)
    angle = atan2_turns(v, u) - p["turn"]
    disc = t["disc"]
    image = image * (1.0 - 0.4 * smoothstep((disc * 1.5 - r) * 8.0))
    ring = smoothstep((disc * 0.45 - (r - disc * 1.1).abs()) * 14.0 + 0.3)
    image = composite(image, t["mark"], t["ring"] * ring)
    share = r / disc
    # 13 spirals one way and 8 the other cross in florets, as in a sunflower.
    one, other = angle * 13.0 + share * 2.6, angle * 8.0 - share * 3.4
    one, other = one - torch.floor(one) - 0.5, other - torch.floor(other) - 0.5
    floret = (1.0 - 4.0 * one * one) * (1.0 - 4.0 * other * other)
    fine = (disc * 0.18 / pixel).clamp(max=1.0)
    toward = u * cos_turns(p["light"]) + v * sin_turns(p["light"])
    lit = 1.0 - 0.3 * share * share + 0.25 * toward / disc
    lit = lit * (1.0 + t["florets"] * fine * (floret - 0.45) * 0.9)
    image = composite(image, t["heart"] * lit, ((disc - r) / pixel + 0.5).clamp(0, 1))
    return _draw_stamens(image, r, angle, pixel, t, p)


def _draw_stamens(
    image: Tensor, r: Tensor, angle: Tensor, pixel: Tensor, t: Named, p: Named
) -> Tensor:
    """Draw the stamens: threads, with an anther at the end of each."""
    n = t["stamens"]
    k = torch.floor(angle * n)
    luck = hash01((k - n * torch.floor(k / n)) * 9.1 + p["seed"] * 57.0 + 5.0)
    reach = t["reach"] * (0.72 + 0.4 * luck)
    aside = (angle * n - k - 0.5 + (luck - 0.5) * 0.3) / n * r * 6.2832
    present = (t["reach"] > 0.05).float()
    thread = ((0.011 - aside.abs()) / pixel + 0.5).clamp(0, 1) * (r < reach) * present
    image = composite(image, t["heart"] * 0.4 + 0.55, thread * 0.7)
    knob = sqrt_exact(aside * aside + (r - reach) * (r - reach))
    anther = ((0.032 - knob) / pixel + 0.5).clamp(0, 1) * present
    return composite(image, t["anther"] * (1.15 - 8.0 * knob), anther)


# ---------------------------------------------------------------- the scene

BACKDROP = parse_colours(
    "5c8446 96b068 2e4a30 1c2420 a4c4de d6e2e6 "
    "beaa82 786046 60828c 3c585a cec8a8 8c7896"
)
BLADE = (0x60 / 255, 0x8C / 255, 0x42 / 255)  # grass in front


def backdrop(x: Tensor, y: Tensor, p: Named) -> Tensor:
    """Draw sky over meadow, out of focus, with leaves and discs of light."""
    palette = torch.tensor(BACKDROP, device=x.device, dtype=torch.float32)

    def choose(chance: Tensor) -> Tensor:
        index = (chance.flatten() * len(palette)).long().clamp(0, len(palette) - 1)
        return palette[index].view(-1, 3, 1, 1)

    above, below = choose(p["above"]), choose(p["below"])
    image = composite(above, below, smoothstep(y * 0.6 + 0.5 + 0.25 * p["bend"] * x))
    luck = hash01(p["seed"] * 913.0 + torch.arange(36, device=x.device) * 7.7)
    for i in range(9):
        a, b, c, d = luck[..., 4 * i : 4 * i + 4].split(1, -1)
        dx, dy = x - (a * 2.6 - 1.3), y - (b * 2.6 - 1.3)
        if i < 4:  # leaves: long, dark or light, very soft
            along, across = dx * (c - 0.5) + dy * 0.5, dy * (c - 0.5) - dx * 0.5
            cover = 1.0 - along * along * 3.0 - across * across * (12.0 + 60.0 * d)
            image = composite(image, below * (0.55 + 0.8 * d), smoothstep(cover) * 0.6)
        else:  # discs of light, brighter at the rim as a lens draws them
            far = sqrt_exact(dx * dx + dy * dy) / (0.08 + 0.22 * c)
            cover = smoothstep((1.0 - far) * 5.0) * (0.12 + 0.2 * d)
            image = composite(image, above * 0.4 + 0.6, cover * (0.6 + 0.4 * far))
    return image


def grass_blade(image: Tensor, x: Tensor, y: Tensor, p: Named) -> Tensor:
    """Draw, in some photographs, a blade of grass in front, out of focus."""
    off = (
        x - p["blade_x"] - p["blade_lean"] * (y - 0.6) - 0.3 * p["bend"] * y * y
    ).abs()
    present = (p["blade"] > 0.12) * 0.85
    cover = smoothstep((0.1 - off) * 9.0 + 0.2)
    cover = cover * smoothstep((y - p["blade_x"] * 0.8 + 0.5) * 1.5) * present
    green = torch.tensor(BLADE, device=x.device, dtype=torch.float32).view(1, 3, 1, 1)
    return composite(image, green * (0.9 + 2.5 * (0.1 - off)), cover)


def apply_camera(image: Tensor, x: Tensor, y: Tensor, p: Named, size: int) -> Tensor:
    """Apply exposure, white balance, faded colours, vignette and sensor noise.

    Returns:
        uint8 [n, h, w, 3].
    """
    toward = x * cos_turns(p["light"]) + y * sin_turns(p["light"])
    sun = 1.0 + 0.16 * toward - 0.1 * (x * x + y * y)
    grey = (image[:, :1] + image[:, 1:2] + image[:, 2:]) * (1 / 3)
    image = image - (image - grey) * p["fade"]
    channels = (1 + p["warm"], 1 + p["tint"], 1 - p["warm"])
    balance = torch.cat([p["gain"] * channel for channel in channels], 1)
    image = image * (sun * balance)
    rows = hash01((y * size) * 5.9 + p["seed"] * 97.0)
    grain = hash01((x * size) * 3.7 + 61.0 * rows)
    offsets = torch.arange(3, device=x.device).view(1, 3, 1, 1) * 13.7
    grain = hash01(grain * 311.0 + offsets)
    image = image + (grain - 0.5) * p["noise"] * 2.0
    return (image * 255.0 + 0.5).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
