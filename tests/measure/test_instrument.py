"""The benchmarks' arithmetic: ratios of takers in rounds, and counts of launches."""

import json

import numpy as np
import pytest
from benchmarks import same_against_same, turns

from vitnb.study import load_study

PAIRS = [("ours", "theirs"), ("theirs", "theirs_again")]


class Drifting:
    """A host whose speed steps up and down by 8% and wanders, from call to call.

    Now and then another program wakes up.
    """

    def __init__(self, seed: int, noise: float = 0.003):
        self.random, self.calls, self.noise, self.walk = (
            np.random.default_rng(seed),
            0,
            noise,
            0.0,
        )

    def take(self, factor: float) -> float:
        self.calls += 1
        self.walk += self.random.normal(0, 0.0005)
        slow = 0.08 if self.calls % 170 > 100 else 0.0
        woken = 0.5 if self.random.random() < 0.02 else 0.0
        return (
            5.0
            * factor
            * np.exp(self.walk + slow + woken + self.random.normal(0, self.noise))
        )


def takers(host: Drifting, factor: float) -> dict:
    return {
        "ours": lambda: host.take(factor),
        "theirs": lambda: host.take(1.0),
        "theirs_again": lambda: host.take(1.0),
    }


@pytest.mark.parametrize("factor", [1.0, 0.99, 1.02])
def test_the_ratio_holds_while_the_host_drifts(factor):
    for seed in range(10):
        (over, itself), rounds = turns.take(
            takers(Drifting(seed), factor), PAIRS, seconds=1e9, seed=seed
        )
        assert over.ratio == pytest.approx(
            factor, abs=0.003
        ) and itself.ratio == pytest.approx(1, abs=0.003)
        assert over.low <= over.ratio <= over.high and over.close and itself.close
        assert len(rounds) >= turns.FEWEST and list(rounds) == [
            "round",
            "ours",
            "theirs",
            "theirs_again",
        ]


def test_the_ratio_of_medians_would_not_hold():
    """Both takers have as many rounds, and their medians lie in different minutes."""
    host = np.exp(np.where(np.arange(40) < 20, 0.0, 0.08))
    noise = np.random.default_rng(0).normal(0, 0.003, (2, 40))
    ours, theirs = host * np.exp(noise[0]), host * np.exp(noise[1])
    theirs[19] *= 1.05  # one round in which something else woke up, just at the middle
    assert turns.ratio(ours, theirs).ratio == pytest.approx(1, abs=0.003)
    assert abs(np.median(ours) / np.median(theirs) - 1) > 0.003


def test_a_steady_host_needs_few_rounds_and_a_noisy_one_more():
    few, more = (
        len(turns.take(takers(Drifting(0, noise), 1.0), PAIRS, 1e9)[1])
        for noise in (1e-5, 0.01)
    )
    assert few < more and few < 30


def test_the_seconds_end_what_never_becomes_close():
    (over, _), rounds = turns.take(
        takers(Drifting(1, noise=0.2), 1.0), PAIRS, seconds=0.0
    )
    assert len(rounds) == turns.FEWEST and not over.close


def test_everyone_is_called_once_a_round_in_an_order_drawn_anew():
    asked = []
    named = {
        name: lambda name=name: asked.append(name) or 1.0 + 0.1 * len(asked) % 3
        for name in ("a", "b", "c")
    }
    turns.take(named, [("a", "b")], seconds=0.0, seed=3)
    by_round = [tuple(asked[i : i + 3]) for i in range(0, len(asked), 3)]
    assert (
        all(sorted(names) == ["a", "b", "c"] for names in by_round)
        and len(set(by_round)) > 3
    )


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random, inside = np.random.default_rng(5), 0
    for _ in range(200):
        a, b = np.exp(random.normal(0, 0.01, (2, 25)))
        found = turns.ratio(1.01 * a, b)
        inside += found.low <= 1.01 <= found.high
    assert inside >= 180


# --- Launches of the same against the same ---


def write_launch(folder, kind: str, number: int, failed: str = "") -> None:
    """Write a launch of three names in which only the first pair is called different.

    Of all other pairs nothing is called.
    """
    pairs = [("b", "a"), ("c", "a"), ("c", "b")]
    rows = [
        {
            "launch": number,
            "batch_size": 1,
            "a": a,
            "b": b,
            "ratio": 1.02,
            "low": 1.01,
            "high": 1.03,
            "p": 0.001 if b == "a" else 0.5,
            "df": 7,
            "rounds": 20,
            "excludes_one": (a, b) == ("b", "a"),
            "different": (a, b) == ("b", "a"),
            "ended": "after 20 rounds",
            "seconds": 1.0,
        }
        for a, b in pairs
    ]
    done = {"rows": [] if failed else rows, "failed": failed, "number": number}
    path = folder / f"{kind}-{number:03d}.json"
    path.write_text(json.dumps(done | {"about": {"commit": "abc"}}))


def test_a_launch_counts_once(tmp_path):
    """The pair that was chosen beforehand; the others are kept, and not counted."""
    for number in range(3):
        write_launch(tmp_path, "same", number)
    write_launch(tmp_path, "same", 3, failed="b: out of memory")
    write_launch(tmp_path, "slower", 0)
    study = load_study("embedded")
    tables, every, failed = same_against_same.gather_tables(tmp_path, study)
    assert list(tables["same"].launch) == [0, 1, 2] and tables["same"].different.all()
    assert set(tables["same"].commit) == {"abc"} and set(tables["same"].extra) == {0.0}
    assert set(tables["slower"].extra) == {0.02}
    assert len(every) == 4 * 3 and failed == ["same 3: b: out of memory"]
    lines = same_against_same.describe_rows("same", tables["same"])
    # None of three missed: 1 - 0.025^(1/3) by hand.
    assert lines[2] == "false calls: 3 of 3 (29.2% to 100.0%)"
    missed = same_against_same.describe_rows("slower", tables["slower"])[0]
    assert missed == "missed: 0 of 1 (0.0% to 97.5%)"


def test_launches_of_both_kinds_are_mixed():
    options = same_against_same.argparse.Namespace(launches=[120, 100])
    kinds = [kind for kind, _ in same_against_same.planned_launches(options)]
    assert (kinds.count("same"), kinds.count("slower")) == (120, 100)
    assert all(3 <= kinds[i : i + 10].count("same") <= 7 for i in range(0, 220, 10))


def test_as_many_copies_as_the_study_has_variants():
    study = load_study("embedded")
    names = same_against_same.name_copies(study)
    assert len(set(names)) == len(study.variants) and names[:2] == ["a", "b"]
