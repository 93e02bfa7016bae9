"""Scenery: what is round a drawn flower, and the camera: backdrop, grass before it, exposure, colours and noise.

Only exactly rounded operations are used (`vitnb.exact`), as in `vitnb.flowers`.
"""

import torch
from torch import Tensor

from vitnb.exact import cos_turns, hashed, ramp, root, sin_turns


def rgb(row: str) -> list[tuple[float, ...]]:
    return [tuple(value / 255 for value in bytes.fromhex(colour)) for colour in row.split()]


BACKDROP = rgb("5c8446 96b068 2e4a30 1c2420 a4c4de d6e2e6 beaa82 786046 60828c 3c585a cec8a8 8c7896")
_BLADE = (0x60 / 255, 0x8C / 255, 0x42 / 255)  # grass in front


def paint(image: Tensor, colour: Tensor, cover: Tensor) -> Tensor:
    """Lay `colour` over `image` [n, 3, h, w] where `cover` [n, 1, h, w] is 1."""
    return image + (colour - image) * cover


def backdrop(x: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Sky over meadow, far out of focus, with leaves and discs of light."""
    palette = torch.tensor(BACKDROP, device=x.device, dtype=torch.float32)
    chosen = ((p[name].flatten() * len(palette)).long().clamp(0, len(palette) - 1) for name in ("above", "below"))
    above, below = (palette[index].view(-1, 3, 1, 1) for index in chosen)
    image = paint(above, below, ramp(y * 0.6 + 0.5 + 0.25 * p["bend"] * x))
    luck = hashed(p["seed"] * 913.0 + torch.arange(36, device=x.device) * 7.7)
    for i in range(9):
        a, b, c, d = luck[..., 4 * i : 4 * i + 4].split(1, -1)
        dx, dy = x - (a * 2.6 - 1.3), y - (b * 2.6 - 1.3)
        if i < 4:  # leaves: long, dark or light, very soft
            along, across = dx * (c - 0.5) + dy * 0.5, dy * (c - 0.5) - dx * 0.5
            cover = ramp(1.0 - along * along * 3.0 - across * across * (12.0 + 60.0 * d)) * 0.6
            image = paint(image, below * (0.55 + 0.8 * d), cover)
        else:  # discs of light, brighter at the rim as a lens draws them
            radius = 0.08 + 0.22 * c
            far = root(dx * dx + dy * dy) / radius
            image = paint(image, above * 0.4 + 0.6, ramp((1.0 - far) * 5.0) * (0.12 + 0.2 * d) * (0.6 + 0.4 * far))
    return image


def blade(image: Tensor, x: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Sometimes a blade of grass stands before the flower, out of focus."""
    off = (x - p["blade_x"] - p["blade_lean"] * (y - 0.6) - 0.3 * p["bend"] * y * y).abs()
    there = (p["blade"] > 0.12) * 0.85
    cover = ramp((0.1 - off) * 9.0 + 0.2) * ramp((y - p["blade_x"] * 0.8 + 0.5) * 1.5) * there
    green = torch.tensor(_BLADE, device=x.device, dtype=torch.float32).view(1, 3, 1, 1)
    return paint(image, green * (0.9 + 2.5 * (0.1 - off)), cover)


def develop(image: Tensor, x: Tensor, y: Tensor, p: dict[str, Tensor], size: int) -> Tensor:
    """Exposure, white balance, faded colours, vignette and sensor noise, then 8 bits: uint8 [n, h, w, 3]."""
    sun = 1.0 + 0.16 * (x * cos_turns(p["light"]) + y * sin_turns(p["light"])) - 0.1 * (x * x + y * y)
    grey = (image[:, :1] + image[:, 1:2] + image[:, 2:]) * (1 / 3)
    image = image - (image - grey) * p["fade"]
    balance = torch.cat([p["gain"] * (1 + p["warm"]), p["gain"] * (1 + p["tint"]), p["gain"] * (1 - p["warm"])], 1)
    image = image * (sun * balance)
    grain = hashed((x * size) * 3.7 + 61.0 * hashed((y * size) * 5.9 + p["seed"] * 97.0))
    grain = hashed(grain * 311.0 + torch.arange(3, device=x.device).view(1, 3, 1, 1) * 13.7)
    image = image + (grain - 0.5) * p["noise"] * 2.0
    return (image * 255.0 + 0.5).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
