"""The source study's claims about depth, on answers made by hand."""

import numpy as np
import pytest

from vitnb.analysis import sensitivity

IMAGES = 400


def rows(
    saved: list[float], ends: float, noise: float = 0.01, bits: int = 4
) -> list[dict]:
    """Return rows in which keeping each layer saves so much KL on average, of 1 nat.

    Args:
        saved: by layer.
        ends: saved by keeping the first and the last layer.
    """
    random = np.random.default_rng(0)
    none = 1 + 0.1 * random.standard_normal(IMAGES)
    found = [{"bits": bits, "kept": "none", "kl_by_image": none.tolist()}]
    names = {f"layer {i}": value for i, value in enumerate(saved)} | {
        "first and last": ends,
        "layer 0 q": 9.0,
    }
    for name, value in names.items():
        kl = none - value + noise * random.standard_normal(IMAGES)
        found.append({"bits": bits, "kept": name, "kl_by_image": kl.tolist()})
    return found


def test_late_layers_that_are_sensitive():
    found = sensitivity.late_layers(rows([0.01] * 20 + [0.1] * 4, 0.0), 4)
    assert found["late"] == [20, 21, 22, 23] and found["layers"] == 24
    assert (
        found["difference"] == pytest.approx(0.09, abs=0.003)
        and found["low"] < found["difference"] < found["high"]
    )
    assert found["as_large"] == pytest.approx(1 / 10626), (
        "of all sets of 4 of 24, these alone"
    )
    assert found["verdict"].startswith("the claim holds here")


def test_early_layers_that_are_sensitive():
    found = sensitivity.late_layers(rows([0.2] + [0.01] * 11, 0.0), 4)
    assert (
        found["late"] == [10, 11]
        and found["high"] < 0
        and "less sensitive" in found["verdict"]
    )


def test_layers_that_are_alike_are_not_told_apart():
    found = sensitivity.late_layers(rows([0.0] * 12, 0.0, noise=0.2), 4)
    assert (
        found["low"] < 0 < found["high"]
        and "no difference beyond noise" in found["verdict"]
    )


def test_one_large_middle_layer_makes_lateness_unconvincing():
    """Late layers save more than the others on average, but so do other sets.

    Layers 3, 4 and 7 of 12 save as much as layers 10 and 11.
    """
    found = sensitivity.late_layers(
        rows([0, 0, 0, 0.1, 0.1, 0, 0, 0.1, 0, 0, 0.1, 0.1], 0.0, noise=1e-4), 4
    )
    assert (
        found["low"] > 0
        and found["as_large"] > 0.05
        and "lateness explains nothing" in found["verdict"]
    )


def test_six_layers_are_too_few_to_tell():
    """Only the last is sensitive: no other set is, and yet one in six is no proof."""
    found = sensitivity.late_layers(rows([0.02] * 5 + [0.8], 0.0), 4)
    assert found["late"] == [5] and found["low"] > 0
    assert found["as_large"] == found["least"] == pytest.approx(1 / 6)
    assert "6 layers are too few to tell" in found["verdict"]
    assert "one in 6" in found["verdict"]
    assert "explains nothing" not in found["verdict"]
    assert (
        "too few to tell"
        in sensitivity.claim_sentences(rows([0.02] * 5 + [0.8], 0.0), [4])[0]
    )
    # 9 layers, 2 of them late: one of 36 sets can be significant.
    nine = sensitivity.late_layers(rows([0.01] * 7 + [0.1] * 2, 0.0), 4)
    assert nine["verdict"].startswith("the claim holds here")


def test_more_sets_than_can_be_listed_are_drawn():
    found = sensitivity.late_layers(
        rows([0.01] * 40 + [0.1] * 8, 0.0), 4
    )  # 48 layers: 377 million sets
    assert 0 < found["as_large"] < 0.001 and found["verdict"].startswith(
        "the claim holds here"
    )


def test_first_and_last():
    matters = sensitivity.first_and_last(rows([0.1] + [0.01] * 10 + [0.1], 0.2), 4)
    assert matters["saved"] == pytest.approx(0.2, abs=0.003) and matters[
        "share"
    ] == pytest.approx(0.2, abs=0.01)
    assert (
        matters["two_others"] == pytest.approx(0.02, abs=0.001)
        and "it matters" in matters["verdict"]
    )
    assert (
        "no effect beyond noise"
        in sensitivity.first_and_last(rows([0.01] * 12, 0.0, noise=0.5), 4)["verdict"]
    )
    vague = sensitivity.first_and_last(rows([0.01] * 12, 0.0, noise=2.0), 4)
    assert "cannot be judged here" in vague["verdict"], "a fifth of the KL is possible"
    assert vague["low"] < 0 and vague["high"] > 0.1
    sure = sensitivity.first_and_last(rows([0.01] * 12, 0.0, noise=0.1), 4)
    assert sure["verdict"].startswith("the claim holds here: no effect beyond noise, ")
    assert (
        "further away"
        in sensitivity.first_and_last(rows([0.01] * 12, -0.3), 4)["verdict"]
    )


def test_the_sentences_carry_the_numbers():
    said = sensitivity.claim_sentences(rows([0.2] + [0.01] * 11, 0.25), [4])
    assert (
        len(said) == 2
        and "(10, 11 of 12) at 4 bits" in said[0]
        and f"over {IMAGES} images" in said[0]
    )
    assert (
        "the claim does not hold here: late layers are less sensitive" in said[0]
        and "25% of the KL" in said[1]
    )
