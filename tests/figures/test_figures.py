"""Figures: names, what is drawn, and the Pareto front against its definition."""

import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vitnb import figures, variants
from vitnb.analysis import comparison
from vitnb.figures import style
from vitnb.study import ROOT


@pytest.mark.parametrize("name", figures.__all__)
def test_every_figure_is_found_again_and_again(name):
    """A module must not take the place of the function that it holds."""
    first = getattr(figures, name)
    assert getattr(figures, name) is first and first.__class__.__name__ != "module"


def test_an_unknown_figure_is_named():
    with pytest.raises(AttributeError, match="no figure 'galery'"):
        figures.galery  # noqa: B018


def test_the_table_of_names_loads_nothing():
    code = "import vitnb.figures, sys; print('matplotlib' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "False", ended.stderr


def test_a_wrong_prediction_has_a_red_title():
    images = [Image.new("RGB", (4, 4)) for _ in range(3)]
    drawn = figures.gallery(images, ["a", "b", "c"], [True, False, True], columns=2)
    titles = [axis.title for axis in drawn.axes]
    assert [title.get_text() for title in titles] == ["a", "b", "c", ""]
    colours = [title.get_color() for title in titles]
    assert colours[:3] == ["0.2", "#b03030", "0.2"]
    plt.close(drawn)


def test_a_confusion_matrix_shows_shares_of_each_true_class():
    drawn = figures.confusion(np.array([[3, 1], [0, 0]]))
    shares = drawn.axes[0].collections[0].get_array()
    assert shares.ravel().tolist() == [0.75, 0.25, 0, 0]
    plt.close(drawn)


def test_the_pareto_front_holds_what_nothing_beats():
    random = np.random.default_rng(0)
    points = pd.DataFrame(random.integers(0, 8, (60, 2)), columns=["cost", "value"])
    front = comparison.pareto_front(points, "cost", "value")
    rows = [tuple(row) for row in points.to_numpy()]
    best = {
        (cost, value)
        for cost, value in rows
        if not any(
            c <= cost and v >= value and (c, v) != (cost, value) for c, v in rows
        )
    }
    assert {tuple(row) for row in front.to_numpy()} == best
    assert front.cost.is_monotonic_increasing


def test_every_variant_has_a_colour_and_a_marker():
    colours = style.palette(variant.name for variant in variants.every_variant())
    source = [colours[name] for name in variants.SOURCE_STUDY]
    assert len(set(source)) == len(source)
    assert set(style.MARKERS) == set(variants.ATTENTIONS)


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (5, (3, 2))])
def test_panels_stand_two_by_two(count, shape):
    drawn, axes = style.panels(count)
    assert len(axes) == len(drawn.axes) == count
    grid = axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == shape
    plt.close(drawn)
