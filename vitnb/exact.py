"""Arithmetic that gives the same bits on every processor, in any number of threads.

+ - * / sqrt, floor and comparisons are rounded exactly by IEEE 754; sin, exp and sums are not. So the angles' functions
here are made of the former alone. Angles are in turns: 1 is a full one.
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


def root(x: Tensor) -> Tensor:
    """The exactly rounded float32 square root: torch.sqrt may call MKL, whose last bit differs between builds.

    In float64 even a wrong last bit is too small to change what it rounds to.
    """
    return torch.sqrt(x.double()).float()


def hashed(x: Tensor) -> Tensor:
    """A number in [0, 1) that looks random, from a number."""
    x = x * 0.1031
    x = x - torch.floor(x)
    x = x * (x + 33.33)
    x = x * (x + x)
    return x - torch.floor(x)


def clip(x: Tensor) -> Tensor:
    return x.clamp(0.0, 1.0)


def ramp(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, smooth between."""
    x = x.clamp(0, 1)
    return x * x * (3.0 - 2.0 * x)
