"""Check the instrument on a GPU: against Triton's do_bench, and kernels plus gaps.

``python tests/benchmarks/instrument_gpu.py [--out DIR]`` writes ``gpu.csv``, a row for
each variant and batch size of a ViT-L/16 with random weights, as times do not depend on
the values of the weights. ``rounds.csv`` has the times that its ratios follow from.
Beside our p50 over do_bench's stands do_bench over itself, from the same rounds: no
instrument can agree better. Further columns compare both clocks on the very same
forwards, and kernels plus gaps with the latency. Needs an NVIDIA GPU and Triton.
"""

import argparse
import gc
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import write_shapes

from benchmarks import turns
from vitnb import variants
from vitnb.analysis import kernel_classes, performance
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.measure import latency, profiler
from vitnb.models import checkpoints, loader
from vitnb.records import machine
from vitnb.records.files import write_file
from vitnb.study import ROOT, Study, load_study
from vitnb.training import lora

STUDY = """
title: ViT-L/16 with random weights
question: Does the instrument agree with others?
data: {folder}/shapes
base: {folder}/base
"""
LEAD, FORWARDS = 2, 7  # of a turn: forwards that are not counted, and that are
SAME = 30  # forwards that both instruments time at once


def untrained(folder: Path, settings: str = "") -> Study:
    """Write a study of a ViT-L/16 with random weights, and its exports, untrained.

    Args:
        settings: further lines of the study's YAML.
    """
    write_shapes(folder / "shapes", {"train": 2, "valid": 2, "test": 40})
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    )
    ViTForImageClassification(config).save_pretrained(folder / "base")
    ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(
        folder / "base"
    )
    (folder / "random-l16.yaml").write_text(STUDY.format(folder=folder) + settings)
    study = load_study(str(folder / "random-l16.yaml"))
    names = load_split(study, "train").class_names
    lora.export_checkpoints(
        lora.add_adapters(study, names),
        study,
        checkpoints.load_processor(folder / "base"),
        names,
    )
    return study


@contextmanager
def no_garbage_collection():
    """Keep Python from collecting garbage inside the block, whosever it is."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def beside_do_bench(loaded, pixels, seconds: float) -> tuple[dict, pd.DataFrame]:
    """Compare our p50 with Triton's, and Triton's with itself, in rounds.

    Both instruments put events around forwards that follow without waiting, and empty
    the cache before each.

    Returns:
        The p50 and both ratios with intervals; and the times by round in milliseconds.
    """
    from triton.testing import do_bench

    cold = latency.cache_flush_buffer(loaded.device)
    with loaded.inference() as model, no_garbage_collection():

        def ours() -> float:
            return np.median(
                latency.time_device(loaded, model, pixels, LEAD + FORWARDS, cold)[LEAD:]
            )

        latency.warm_up(lambda: latency.time_host(loaded, model, pixels))
        ours()
        begin = time.perf_counter()
        ours()
        # do_bench makes as many forwards as fit into the given milliseconds, in which
        # it also empties the cache.
        each = (time.perf_counter() - begin) * 1e3 / (LEAD + FORWARDS)

        def theirs() -> float:
            warmup, rep = (LEAD + 0.5) * each, (FORWARDS + 0.5) * each
            return do_bench(
                lambda: model(pixel_values=pixels),
                warmup=warmup,
                rep=rep,
                quantiles=[0.5],
            )

        takers = {"ours_ms": ours, "theirs_ms": theirs, "theirs_again_ms": theirs}
        pairs = [("ours_ms", "theirs_ms"), ("theirs_ms", "theirs_again_ms")]
        (over, itself), rounds = turns.take(takers, pairs, seconds)
    return {
        "p50_ms": float(rounds.ours_ms.median()),
        "over_do_bench": over.ratio,
        "low": over.low,
        "high": over.high,
        "do_bench_over_itself": itself.ratio,
        "itself_low": itself.low,
        "itself_high": itself.high,
        "rounds": len(rounds),
    }, rounds


def same_forwards(loaded, pixels) -> dict[str, float]:
    """Return our p50 over do_bench's, of the very same forwards.

    Our clock runs within do_bench's, which also sees ours being read. The rounds of
    ``beside_do_bench`` meet different moments, and moments differ where Python launches
    for as long as a forward takes. Here only the clocks differ.
    """
    from triton.testing import do_bench

    ours = []
    with loaded.inference() as model, no_garbage_collection():
        each = np.median(
            [latency.time_host(loaded, model, pixels) for _ in range(FORWARDS)]
        )
        theirs = do_bench(
            lambda: ours.extend(latency.time_device(loaded, model, pixels, 1)),
            warmup=(LEAD + 0.5) * each, rep=(SAME + 0.5) * each, return_mode="all",
        )  # fmt: skip
    return {
        "same_forwards": float(np.median(ours[-len(theirs) :]) / np.median(theirs)),
        "forwards": len(theirs),
    }


def measure_row(loaded, pixels, seconds: float) -> tuple[dict, pd.DataFrame, list[str]]:
    """Check the instrument for one variant and batch size.

    Returns:
        The row of ``gpu.csv``, its rounds, and the kernels without a class by name.
    """
    beside, rounds = beside_do_bench(loaded, pixels, seconds)
    trace = profiler.profile_forward(loaded, pixels)
    kernels_and_gaps = trace["busy_ms"] + trace["idle_ms"]
    others = [
        name
        for name in trace["operators_ms"]
        if kernel_classes.classify([name]) == "other"
    ]
    row = {
        "variant": loaded.variant.name,
        "batch_size": len(pixels),
        **beside,
        **same_forwards(loaded, pixels),
        "kernels_and_gaps_ms": kernels_and_gaps,
        "latency_ms": trace["latency_ms"],
        "timeline_ratio": kernels_and_gaps / trace["latency_ms"],
        "idle_share": trace["idle_ms"] / trace["latency_ms"],
        "kernels_ms": trace["total_ms"],
        "unclassified": performance.time_by_class(trace)["other"] / trace["total_ms"],
        "launches": trace["launches"],
        "attention_ran": trace["attention_ran"],
    }
    return row, rounds, others


def write_tables(
    rows: list[dict], rounds: list[pd.DataFrame], out: Path, about: dict
) -> None:
    """Write ``gpu.csv``, with the machine beside the rows, and ``rounds.csv``."""
    commit = about["commit"]
    if about["dirty"]:
        commit += "+uncommitted"
    table = pd.DataFrame(rows).assign(
        device=about["gpu"],
        driver=about["driver"],
        torch=torch.__version__,
        commit=commit,
        code_sha256=about["code_sha256"],
    )
    for name, content in (("gpu.csv", table), ("rounds.csv", pd.concat(rounds))):
        write_file(out / name, content.to_csv(index=False, lineterminator="\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs" / "published" / "instrument"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--variants", nargs="+", default=variants.SOURCE_STUDY)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="the most that a row's turns take"
    )
    options = parser.parse_args()
    rows: list[dict] = []
    raw: list[pd.DataFrame] = []
    about = machine.describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        study = untrained(Path(folder))
        split = load_split(study, "test")
        for name in options.variants:
            loaded = loader.load_variant(study, variants.parse(name))
            for size in options.batch_sizes:
                images = dataset.first_batch(split, loaded.processor, size)
                pixels = loaded.prepare(images)
                row, rounds, others = measure_row(loaded, pixels, options.seconds)
                rows.append(row)
                raw.append(rounds.assign(variant=name, batch_size=size))
                print(
                    {
                        k: round(v, 4) if isinstance(v, float) else v
                        for k, v in row.items()
                    },
                    flush=True,
                )
                write_tables(rows, raw, options.out, about)
                print("  unclassified by name alone:", others[:8], flush=True)
            del loaded
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
