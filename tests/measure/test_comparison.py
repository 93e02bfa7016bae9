"""Interleaved timing: worker processes, rounds, and ratios of times that are known."""

import math
import os
import signal
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

from vitnb.analysis import claims, tables
from vitnb.analysis.comparison import (
    describe_speed,
    pair_ratio,
    ratio_table,
    ratios_to_baseline,
    recommend,
    time_table,
)
from vitnb.errors import UserError, VariantError
from vitnb.figures import tradeoffs
from vitnb.measure import comparison, interleaving
from vitnb.measure.worker import LocalVariant, WorkerProcess, _prewarmed, prewarm
from vitnb.records.resume import ResumeCache
from vitnb.study import Compare, Study, load_study


class Sleeper:
    """Stand in for a LocalVariant.

    Forwards of ``1.5`` take 1.5 times as long as those of ``1``.
    """

    def __init__(self, study, variant, device):
        self.factor = float(variant)

    def first_forward(self, batch_size):
        pass

    def warm_up(self, batch_size):
        return {}

    def time_block(self, batch_size, forwards):
        return [self.factor * batch_size * (1 + 0.01 * n) for n in range(forwards)]

    def where(self):
        return os.getpid()

    def fail(self, kind):
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"user": UserError, "variant": VariantError, "other": ZeroDivisionError}[
            kind
        ]("what happened\nand more")


class Fragile(Sleeper):
    """``1.5`` cannot warm up at batch 2, and breaks in its eighth block at batch 3."""

    blocks_at_three = 0

    def describe(self):
        return {"attention_launched": f"that of {self.factor:g}"}

    def warm_up(self, batch_size):
        if (self.factor, batch_size) == (1.5, 2):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return {"first_seconds": self.factor * batch_size}

    def time_block(self, batch_size, forwards):
        self.blocks_at_three += batch_size == 3
        if (self.factor, batch_size, self.blocks_at_three) == (1.5, 3, 8):
            raise RuntimeError("CUDA error: misaligned address\nand more")
        return super().time_block(batch_size, forwards)


@pytest.fixture(scope="module")
def sleepers():
    names = ("1", "1.5")
    workers = {name: WorkerProcess(None, name, load=Sleeper) for name in names}
    yield workers
    for worker in workers.values():
        worker.__exit__()


def test_every_variant_has_a_process_of_its_own_that_stays_alive(sleepers):
    places = [worker.call("where") for worker in sleepers.values()]
    assert len({*places, os.getpid()}) == 3
    assert places == [worker.call("where") for worker in sleepers.values()]


def test_errors_come_back_as_what_they_are(sleepers):
    worker = sleepers["1"]
    for kind, error, text in (
        ("user", UserError, "^what happened$"),
        ("variant", VariantError, "^what happened$"),
        ("other", VariantError, "^ZeroDivisionError: what happened$"),
    ):
        with pytest.raises(error, match=text):
            worker.call("fail", kind=kind)
    assert worker.call("where"), "a failed call must not end the worker"


def test_a_process_that_dies_is_a_reason():
    with (
        WorkerProcess(None, "1", load=Sleeper) as worker,
        pytest.raises(
            VariantError,
            match=r"process of 1 died \(exit code -9\), most likely out of memory",
        ),
    ):
        worker.call("fail", kind="die")


def test_a_prewarmed_interpreter_is_the_next_workers_and_no_one_elses():
    prewarm()
    prewarm()
    ((process, _),) = _prewarmed
    with (
        WorkerProcess(None, "1", load=Sleeper) as first,
        WorkerProcess(None, "1.5", load=Sleeper) as second,
    ):
        assert first.call("where") == process.pid != second.call("where")
        assert second.time_block(batch_size=1, forwards=1) == [1.5]
    prewarm()
    process, pipe = _prewarmed.pop()
    pipe.close()
    assert process.wait(60) == 0, "an unused one ends with the process that started it"


def test_an_interpreter_that_died_before_its_first_call_is_a_reason():
    prewarm()
    ((process, _),) = _prewarmed
    process.kill()
    process.wait()
    with (
        WorkerProcess(None, "1", load=Sleeper) as worker,
        pytest.raises(VariantError, match=r"process of 1 died \(exit code -9\)"),
    ):
        worker.call("where")


def test_rounds_hold_one_block_of_everyone(sleepers):
    budget = Compare(rounds=25, seconds=1e9, forwards=3)
    blocks = interleaving.time_interleaved(
        {name: [w] for name, w in sleepers.items()}, 4, budget
    )
    assert {name: np.shape(b) for name, b in blocks.items()} == {
        "1": (25, 3),
        "1.5": (25, 3),
    }
    found = pair_ratio(blocks["1.5"], blocks["1"])
    assert found.ratio == pytest.approx(1.5) and found.samples == 25
    assert blocks["1.5"][0][0] == pytest.approx(6.0), "a batch of 4 was asked for"


def test_seconds_end_the_turns_but_not_below_twenty_rounds(sleepers):
    blocks = interleaving.time_interleaved(
        {name: [w] for name, w in sleepers.items()},
        1,
        Compare(rounds=10**6, seconds=1e-9, forwards=1),
    )
    assert len(blocks["1"]) == 20


def test_a_variant_that_fails_at_one_size_is_blank_at_that_size_alone(monkeypatch):
    monkeypatch.setattr(comparison, "load_local_variant", Fragile)
    budget = Compare(rounds=25, seconds=1e9, forwards=2, processes=1)
    study = Study(
        "x",
        "",
        "",
        "",
        "",
        variants=["1", "1.5", "2"],
        batch_sizes=[1, 2, 3, 4],
        compare=budget,
    )
    found = comparison.measure_comparison(study)
    assert {size: sorted(blocks) for size, blocks in found["blocks_ms"].items()} == {
        "1": ["1", "1.5", "2"], "2": ["1", "2"], "3": ["1", "2"], "4": ["1", "1.5", "2"]
    }  # fmt: skip
    assert all(
        np.shape(block) == (25, 2)
        for blocks in found["blocks_ms"].values()
        for block in blocks.values()
    )
    assert list(found["failed"]) == ["1.5 at batch 2", "1.5 at batch 3"]
    assert found["failed"]["1.5 at batch 2"].startswith(
        "out of memory: lower batch_size"
    )
    assert (
        found["failed"]["1.5 at batch 3"]
        == "RuntimeError: CUDA error: misaligned address"
    )
    assert found["attention_launched"]["1.5"] == "that of 1.5"
    assert found["warm_up"]["2"] == {
        "1": {"first_seconds": 2},
        "2": {"first_seconds": 4},
    }


def test_where_nobody_keeps_the_reason_a_failure_is_raised():
    with WorkerProcess(None, "1.5", load=Fragile) as worker:
        with pytest.raises(VariantError, match="out of memory"):
            interleaving.warm_up_workers({"1.5": [worker]}, 2)
        with pytest.raises(VariantError, match="misaligned"):
            interleaving.time_interleaved(
                {"1.5": [worker]}, 3, Compare(rounds=20, seconds=1e9, forwards=1)
            )


def test_all_may_fail(monkeypatch):
    monkeypatch.setattr(comparison, "load_local_variant", Fragile)
    study = Study(
        "x",
        "",
        "",
        "",
        "",
        variants=["1.5"],
        batch_sizes=[2, 3],
        compare=Compare(processes=1),
    )
    found = comparison.measure_comparison(study)
    assert found["blocks_ms"] == {"2": {}, "3": {}} and len(found["failed"]) == 2


class Here(WorkerProcess):
    """A worker without a process."""

    def __init__(self, study, name, device, load):
        self.name = name
        self.served = load(study, name, device)
        self.answers = []

    def __exit__(self, *_):
        pass

    def send(self, method, **options):
        try:
            answer = getattr(self.served, method)(**options)
            self.answers.append((None, answer))
        except Exception as error:
            self.answers.append((VariantError(str(error)), None))

    def receive(self):
        error, answer = self.answers.pop(0)
        if error:
            raise error
        return answer


def test_a_killed_comparison_goes_on_with_the_next_batch_size(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "load_local_variant", Fragile)
    monkeypatch.setattr(comparison, "WorkerProcess", Here)
    budget = Compare(rounds=20, seconds=1e9, forwards=1, processes=1)
    study = Study(
        "x", "", "", "", "", variants=["1"], batch_sizes=[1, 2, 3], compare=budget
    )
    time_interleaved, sizes = interleaving.time_interleaved, []

    def killed_at_three(workers, size, *rest):
        sizes.append(size)
        if sizes == [1, 2, 3]:
            raise KeyboardInterrupt
        return time_interleaved(workers, size, *rest)

    monkeypatch.setattr(comparison, "time_interleaved", killed_at_three)
    with pytest.raises(KeyboardInterrupt):
        comparison.measure_comparison(study, cache=ResumeCache(tmp_path))
    found = comparison.measure_comparison(study, cache=ResumeCache(tmp_path))
    assert sizes == [1, 2, 3, 3]
    assert found["blocks_ms"] == {
        str(size): {"1": [[float(size)]] * 20} for size in (1, 2, 3)
    }
    assert found["warm_up"] == {
        str(size): {"1": {"first_seconds": size}} for size in (1, 2, 3)
    }


class Compiled(Sleeper):
    """``1.5`` cannot be compiled at batch 2. All calls stand in one list."""

    calls: ClassVar[list] = []

    def __init__(self, study, variant, device):
        super().__init__(study, variant, device)
        self.calls.append((variant, "load", 0))

    def describe(self):
        return {"attention_launched": "sdpa"}

    def first_forward(self, batch_size):
        self.calls.append((f"{self.factor:g}", "first_forward", batch_size))
        if (self.factor, batch_size) == (1.5, 2):
            raise VariantError("no compiler")

    def warm_up(self, batch_size):
        self.calls.append((f"{self.factor:g}", "warm_up", batch_size))
        return {"first_seconds": batch_size}


def test_everyone_compiles_before_the_first_is_waited_for():
    events = []

    class Listed:
        def __init__(self, name):
            self.name = name

        def send(self, method, batch_size):
            events.append((method, batch_size, self.name))

        def receive(self):
            events.append(("answer", self.name))

    workers = {"a": [Listed("a"), Listed("b")], "c": [Listed("c")]}
    comparison.first_forwards(workers, 8, {}, events.append)
    assert events == [
        *(("first_forward", 8, name) for name in "abc"),
        *(("answer", "a"), ("answer", "b"), "batch 8: a had its first forward"),
        *(("answer", "c"), "batch 8: c had its first forward"),
    ]


def test_what_cannot_compile_at_one_batch_size_is_back_at_the_next(monkeypatch, capsys):
    monkeypatch.setattr(comparison, "load_local_variant", Compiled)
    monkeypatch.setattr(comparison, "load_external_variant", Compiled)
    monkeypatch.setattr(comparison, "WorkerProcess", Here)
    monkeypatch.setattr(Compiled, "calls", [])
    budget = Compare(rounds=20, seconds=1e9, forwards=1, processes=2)
    study = Study(
        "x",
        "",
        "",
        "",
        "",
        variants=["1", "1.5"],
        peers=["2"],
        batch_sizes=[1, 2, 3],
        compare=budget,
    )
    found = comparison.measure_comparison(study)
    wanted = [(name, "load", 0) for name in ("1", "1.5", "2") for _ in range(2)]
    for size in (1, 2, 3):
        wanted += [
            (name, "first_forward", size)
            for name in ("1", "1.5", "2")
            for _ in range(2)
        ]
        wanted += [
            (name, "warm_up", size)
            for name in ("1", "1.5", "2")
            for _ in range(2)
            if (name, size) != ("1.5", 2)
        ]
    assert Compiled.calls == wanted
    assert found["failed"] == {"1.5 at batch 2": "no compiler"}
    assert {size: sorted(blocks) for size, blocks in found["blocks_ms"].items()} == {
        "1": ["1", "1.5", "2"], "2": ["1", "2"], "3": ["1", "1.5", "2"]
    }  # fmt: skip
    assert found["blocks_ms"]["3"]["1.5"] == [[4.5]] * 20
    printed = capsys.readouterr().out
    assert printed.count("batch 2: 2 had its first forward") == 1
    assert "batch 2: 1.5 had its first" not in printed


def test_a_block_begins_with_five_milliseconds_that_are_not_counted():
    """Five forwards of 1.2 ms go ahead, or one of 8 ms; without a warm-up one does."""
    calls = []

    def run(milliseconds, pixel_values):
        calls.append(milliseconds)
        end = time.perf_counter() + milliseconds / 1e3
        while time.perf_counter() < end:
            pass

    for took, ahead in ((1.2, 5), (8.0, 1)):
        model = partial(run, took)
        loaded = SimpleNamespace(
            device=torch.device("cpu"),
            engine=SimpleNamespace(ran="eager", reason=""),
            inference=partial(nullcontext, model),
        )
        pixels = {1: torch.zeros(1), 2: torch.zeros(2)}
        variant = LocalVariant(loaded, split=None, pixels=pixels)
        warmed = variant.warm_up(1)
        assert (
            warmed["first_seconds"] >= took / 1e3 - 1e-3
            and warmed["engine_ran"] == "eager"
        )
        for size, lead in ((1, ahead), (2, 1)):
            calls.clear()
            assert min(variant.time_block(size, 3)) >= took * 0.99
            assert len(calls) == lead + 3


def test_the_order_is_drawn_anew():
    """Each of three variants goes first in about a third of the rounds."""
    order = []

    class Listed:
        def __init__(self, name):
            self.name = name

        def time_block(self, batch_size, forwards):
            order.append(self.name)
            return [1.0]

    interleaving.time_interleaved(
        {n: [Listed(n)] for n in "abc"}, 1, Compare(rounds=300, seconds=1e9, forwards=1)
    )
    firsts = order[::3]
    assert sorted(order[:3]) == ["a", "b", "c"]
    assert all(70 < firsts.count(name) < 130 for name in "abc")
    order.clear()
    several = {n: [Listed(n + "1"), Listed(n + "2")] for n in "ab"}
    interleaving.time_interleaved(
        several, 1, Compare(rounds=200, seconds=1e9, forwards=1)
    )
    assert len(order) == 400
    assert all(60 < order.count(name) < 140 for name in ("a1", "a2", "b1", "b2"))


def test_a_slow_moment_hits_both_of_a_pair():
    """The machine becomes ten times slower half way; the ratio stays."""
    drift = np.repeat([1.0, 10.0], 20)[:, None] * np.random.default_rng(0).lognormal(
        0, 0.01, (40, 3)
    )
    found = pair_ratio(
        1.2 * drift, drift * np.random.default_rng(1).lognormal(0, 0.01, (40, 3))
    )
    assert found.ratio == pytest.approx(1.2, rel=0.01) and found.low > 1.15


RECORD = {
    "asked": {"variants": ["nf4-sdpa", "fp32-sdpa", "int8-fa2"]},
    "blocks_ms": {
        "1": {"fp32-sdpa": [[2.0, 2.1]] * 20, "nf4-sdpa": [[3.0, 3.15]] * 20}
    },
}


def test_ratios_of_every_pair_and_blanks_for_what_failed():
    found = ratio_table(RECORD)
    assert list(found.columns) == [
        "a",
        "b",
        "batch_size",
        "ratio",
        "low",
        "high",
        "samples",
    ]
    rows = {(row.a, row.b): row for row in found.itertuples()}
    assert set(rows) == {
        ("nf4-sdpa", "fp32-sdpa"),
        ("int8-fa2", "fp32-sdpa"),
        ("int8-fa2", "nf4-sdpa"),
    }
    assert (
        rows["nf4-sdpa", "fp32-sdpa"].ratio == pytest.approx(1.5)
        and rows["nf4-sdpa", "fp32-sdpa"].samples == 20
    )
    assert (
        np.isnan(rows["int8-fa2", "fp32-sdpa"].ratio)
        and rows["int8-fa2", "nf4-sdpa"].samples == 0
    )


def test_ratios_to_one_of_them():
    found = ratios_to_baseline(ratio_table(RECORD)).set_index("variant")
    assert found.ratio["fp32-sdpa"] == 1 and found.ratio["nf4-sdpa"] == pytest.approx(
        1.5
    )
    turned = ratios_to_baseline(ratio_table(RECORD), "nf4-sdpa").set_index("variant")
    assert turned.ratio["fp32-sdpa"] == pytest.approx(1 / 1.5)
    assert (
        turned.low["fp32-sdpa"] <= turned.ratio["fp32-sdpa"] <= turned.high["fp32-sdpa"]
    )


def test_peers_come_after_the_variants_and_are_no_variants():
    """They stand in ratios and times alone, and in no table of variants."""
    random = np.random.default_rng(0)
    medians = {"fp32-sdpa": 8.0, "timm-compile": 2.0, "nf4-sdpa": 4.0}
    blocks = {
        name: (median * random.lognormal(0, 0.02, (30, 3))).tolist()
        for name, median in medians.items()
    }
    record = {
        "asked": {
            "variants": ["nf4-sdpa", "fp32-sdpa"],
            "peers": ["timm-compile", "torchao-fp8-compile"],
        },
        "blocks_ms": {"1": blocks},
    }
    every, times = ratio_table(record), time_table(record)
    assert list(every.a) == [
        "nf4-sdpa",
        *["timm-compile", "torchao-fp8-compile"] * 2,
        "torchao-fp8-compile",
    ]
    assert list(times.columns) == [
        "variant",
        "batch_size",
        "p50_ms",
        "low",
        "high",
        "samples",
    ]
    assert list(times.variant) == [
        "fp32-sdpa",
        "nf4-sdpa",
        "timm-compile",
        "torchao-fp8-compile",
    ]
    for row in times.itertuples():
        if row.variant == "torchao-fp8-compile":
            assert row.samples == 0 and np.isnan([row.p50_ms, row.low, row.high]).all()
        else:
            assert (
                row.p50_ms == np.median(np.ravel(blocks[row.variant]))
                and row.samples == 90
            )
            assert row.low < row.p50_ms < row.high < 1.02 * row.low
    ratios = ratios_to_baseline(every)
    assert ratios.set_index("variant").ratio["timm-compile"] == pytest.approx(
        0.25, rel=0.01
    )
    shown = tables.format_ratios(ratios, times)
    assert list(shown.variant) == ["fp32-sdpa", "nf4-sdpa", "timm-compile"]
    p50, low, high = (
        getattr(times.iloc[2], name) for name in ("p50_ms", "low", "high")
    )
    assert (
        shown["p50 ms"][2] == f"{p50:.3f} ({low:.3f} to {high:.3f})"
        and "4.0" in shown["in words"][2]
    )
    table = rows(
        fp32=(1, "ok", 8.0, 20.0, 0.90, 0.88, 0.92, "sdpa", 10.0),
        nf4=(1, "ok", 1.0, 9.0, 0.89, 0.87, 0.91, "sdpa", 2.0),
    )
    table["variant"] = ["fp32-sdpa", "nf4-sdpa"]
    compared = pd.DataFrame(
        {
            "variant": table.variant,
            "points": [np.nan, -1.0],
            "verdict": ["the baseline", "no difference beyond noise"],
        }
    )
    lines = recommend(table, ratios, compared)
    assert {line["variant"] for line in lines} <= {"fp32-sdpa", "nf4-sdpa"} and len(
        lines
    ) == 4
    assert (
        len(
            tradeoffs.accuracy_latency(table, ratios)
            .axes[0]
            .collections[-1]
            .get_offsets()
        )
        == 2
    )
    whole = table.assign(
        attention_ran="flash", attention_time_ms=1.0, total_time_ms=2.0
    )
    answered = compared.assign(
        points_low=0.0,
        points_high=0.0,
        top5_points=0.0,
        top5_points_low=0.0,
        top5_points_high=0.0,
    )
    claimed = claims.claim_verdicts(
        claims.measured_claims(whole, every, answered, None)
    )
    assert len(claimed) == len(claims.load_claims())


def line(variant: str, ratio: float, low: float, high: float):
    return pd.Series({"variant": variant, "ratio": ratio, "low": low, "high": high})


def test_speed_in_words():
    """Ratios of times turn into speeds; inside the noise there is no difference."""
    assert (
        describe_speed(line("nf4-sdpa", 0.5, 0.4, 0.625))
        == "2.00x faster (1.60 to 2.50)"
    )
    assert (
        describe_speed(line("nf4-sdpa", 1.5, 1.4, 1.6)) == "1.50x slower (1.40 to 1.60)"
    )
    assert describe_speed(line("nf4-sdpa", 1.003, 1.002, 1.004)).startswith(
        "no difference beyond noise"
    )
    assert (
        describe_speed(line("nf4-sdpa", 1.05, 0.99, 1.2))
        == "no difference beyond noise (0.83 to 1.01)"
    )
    assert describe_speed(line("fp32-sdpa", 1, 1, 1)) == "the baseline"
    assert (
        describe_speed(line("nf4-sdpa", 1.0, 0.0, math.inf)) == "too few rounds to tell"
    )


def rows(**by_variant) -> pd.DataFrame:
    columns = (
        "batch_size",
        "status",
        "disk_mb",
        "peak_mb",
        "top1",
        "top1_low",
        "top1_high",
        "attention",
        "latency_p50_ms",
    )
    return pd.DataFrame(
        [
            {"variant": name, **dict(zip(columns, values, strict=True))}
            for name, values in by_variant.items()
        ]
    )


def test_the_recommendation_follows_the_ratios_and_not_the_separate_times():
    """nf4's p50 is of a quiet minute; side by side, nf4 is slower. int8 is worse."""
    names = {"fp32_sdpa": "fp32-sdpa", "nf4_sdpa": "nf4-sdpa", "int8_sdpa": "int8-sdpa"}
    table = rows(
        fp32_sdpa=(1, "ok", 8.0, 20.0, 0.90, 0.88, 0.92, "sdpa", 10.0),
        nf4_sdpa=(1, "ok", 1.0, 9.0, 0.89, 0.87, 0.91, "sdpa", 2.0),
        int8_sdpa=(1, "ok", 2.0, 12.0, 0.84, 0.82, 0.86, "sdpa", 30.0),
    ).assign(variant=list(names.values()))
    ratios = pd.DataFrame(
        [
            line("fp32-sdpa", 1, 1, 1),
            line("nf4-sdpa", 1.3, 1.2, 1.4),
            line("int8-sdpa", 0.4, 0.3, 0.5),
        ]
    ).assign(batch_size=1)
    compared = pd.DataFrame(
        {
            "variant": names.values(),
            "points": [np.nan, -1.0, -6.0],
            "verdict": [
                "the baseline",
                "no difference beyond noise",
                "worse than fp32-sdpa: -6.0 points",
            ],
        }
    )
    advice = {a["need"]: a for a in recommend(table, ratios, compared)}
    assert advice["the fastest within 3 points"]["variant"] == "fp32-sdpa"
    assert advice["the smallest within 3 points"]["variant"] == "nf4-sdpa"
    assert (
        advice["the smallest within 3 points"]["speed against fp32"]
        == "1.30x slower (1.20 to 1.40)"
    )
    assert (
        advice["the smallest within 3 points"]["top-1"] == "no difference beyond noise"
    )
    assert advice["the fastest that is not worse"]["variant"] == "fp32-sdpa"
    assert recommend(table, ratios.iloc[1:], compared) == []
    drawn = tradeoffs.accuracy_latency(table, ratios).axes[0]
    assert sorted(drawn.collections[-1].get_offsets()[:, 0]) == [0.4, 1.0, 1.3]


def test_a_variant_that_cannot_load_keeps_its_place(mini):
    """The export of nf4 is not quantized: its reason stays, and the others go on."""
    study = load_study(mini.typed)
    broken = study.outputs / "checkpoints" / "nf4" / "config.json"
    kept = broken.read_text()
    try:
        broken.write_text(
            kept.replace('"quantization_config"', '"was_quantization_config"')
        )
        found = comparison.measure_comparison(study)
    finally:
        broken.write_text(kept)
    assert list(found["failed"]) == ["nf4-fa2"] and found["failed"]["nf4-fa2"]
    assert set(found["blocks_ms"]["1"]) == {"fp32-sdpa"} and np.shape(
        found["blocks_ms"]["3"]["fp32-sdpa"]
    ) == (20, 1)
