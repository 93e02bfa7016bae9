"""How far the instrument can be trusted on a GPU: beside Triton's do_bench, and kernels plus gaps beside the latency.

``python tests/benchmarks/instrument_gpu.py [--out DIR]`` writes ``gpu.csv``, a row for each variant and batch size of a ViT-L/16 with
random weights, as times do not depend on what the weights are; and ``rounds.csv``, the times that its ratios follow from. Beside our
p50 over do_bench's stands do_bench over itself, from the same rounds: no instrument can agree better; and both clocks on the very
same forwards. Needs an NVIDIA GPU and Triton.
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
    """A study of a ViT-L/16 with random weights whose exports are written without any training; ``settings``: more of its YAML."""
    write_shapes(folder / "shapes", {"train": 2, "valid": 2, "test": 40})
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    ViTForImageClassification(config).save_pretrained(folder / "base")
    ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder / "base")
    (folder / "random-l16.yaml").write_text(STUDY.format(folder=folder) + settings)
    study = load_study(str(folder / "random-l16.yaml"))
    names = load_split(study, "train").class_names
    lora.export_checkpoints(lora.add_adapters(study, names), study, checkpoints.load_processor(folder / "base"), names)
    return study


@contextmanager
def no_garbage_collection():
    """Python collects no garbage in between, from whoever's turn it was."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def beside_do_bench(loaded, pixels, seconds: float) -> tuple[dict, pd.DataFrame]:
    """Our p50, its ratio to Triton's and that of Triton's to itself, with intervals; and the times of each round in milliseconds.

    Both instruments put events around forwards that are handed over without waiting and empty the cache before each.
    """
    from triton.testing import do_bench

    cold = latency.cache_flush_buffer(loaded.device)
    with loaded.inference() as model, no_garbage_collection():

        def ours() -> float:
            return np.median(latency.time_device(loaded, model, pixels, LEAD + FORWARDS, cold)[LEAD:])

        latency.warm_up(lambda: latency.time_host(loaded, model, pixels))
        ours()
        begin = time.perf_counter()
        ours()
        # do_bench makes as many forwards as fit into the milliseconds that it is given; emptying the cache counts among them.
        each = (time.perf_counter() - begin) * 1e3 / (LEAD + FORWARDS)

        def theirs() -> float:
            warmup, rep = (LEAD + 0.5) * each, (FORWARDS + 0.5) * each
            return do_bench(lambda: model(pixel_values=pixels), warmup=warmup, rep=rep, quantiles=[0.5])

        takers = {"ours_ms": ours, "theirs_ms": theirs, "theirs_again_ms": theirs}
        pairs = [("ours_ms", "theirs_ms"), ("theirs_ms", "theirs_again_ms")]
        (over, itself), rounds = turns.take(takers, pairs, seconds)
    return {
        "p50_ms": float(rounds.ours_ms.median()), "over_do_bench": over.ratio, "low": over.low, "high": over.high,
        "do_bench_over_itself": itself.ratio, "itself_low": itself.low, "itself_high": itself.high, "rounds": len(rounds),
    }, rounds  # fmt: skip


def same_forwards(loaded, pixels) -> dict[str, float]:
    """Both clocks around the very same forwards: ours within do_bench's, which also sees ours being read. p50 over p50.

    The turns of ``beside_do_bench`` meet different moments, and where Python launches for as long as a forward takes, moments
    differ; here only the clocks do.
    """
    from triton.testing import do_bench

    ours = []
    with loaded.inference() as model, no_garbage_collection():
        each = np.median([latency.time_host(loaded, model, pixels) for _ in range(FORWARDS)])
        theirs = do_bench(
            lambda: ours.extend(latency.time_device(loaded, model, pixels, 1)),
            warmup=(LEAD + 0.5) * each, rep=(SAME + 0.5) * each, return_mode="all",
        )  # fmt: skip
    return {"same_forwards": float(np.median(ours[-len(theirs) :]) / np.median(theirs)), "forwards": len(theirs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "published" / "instrument")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--variants", nargs="+", default=variants.SOURCE_STUDY)
    parser.add_argument("--seconds", type=float, default=20.0, help="the most that a row's turns take")
    asked = parser.parse_args()
    rows, raw, about = [], [], machine.describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        study = untrained(Path(folder))
        for name in asked.variants:
            loaded = loader.load_variant(study, variants.parse(name))
            for size in asked.batch_sizes:
                pixels = loaded.prepare(dataset.first_batch(load_split(study, "test"), loaded.processor, size))
                beside, rounds = beside_do_bench(loaded, pixels, asked.seconds)
                trace = profiler.profile_forward(loaded, pixels)
                row = {
                    "variant": name, "batch_size": size, **beside, **same_forwards(loaded, pixels),
                    "kernels_and_gaps_ms": trace["busy_ms"] + trace["idle_ms"], "latency_ms": trace["latency_ms"],
                    "timeline_ratio": (trace["busy_ms"] + trace["idle_ms"]) / trace["latency_ms"],
                    "idle_share": trace["idle_ms"] / trace["latency_ms"], "kernels_ms": trace["total_ms"],
                    "unclassified": performance.time_by_class(trace)["other"] / trace["total_ms"], "launches": trace["launches"],
                    "attention_ran": trace["attention_ran"],
                }  # fmt: skip
                rows.append(row)
                raw.append(rounds.assign(variant=name, batch_size=size))
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                others = [n for n in trace["operators_ms"] if kernel_classes.classify([n]) == "other"]
                table = pd.DataFrame(rows).assign(
                    device=about["gpu"],
                    driver=about["driver"],
                    torch=torch.__version__,
                    commit=about["commit"] + "+uncommitted" * about["dirty"],
                    code_sha256=about["code_sha256"],
                )
                for path, kept in (("gpu.csv", table), ("rounds.csv", pd.concat(raw))):
                    write_file(asked.out / path, kept.to_csv(index=False, lineterminator="\n"))
                print("  unclassified by name alone:", others[:8], flush=True)
            del loaded
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
