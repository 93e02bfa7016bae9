"""How far the instrument can be trusted on a GPU: beside Triton's do_bench, and kernels plus gaps beside the latency.

``python tests/benchmarks/instrument_gpu.py [--out DIR]`` writes ``gpu.csv``, a row for each variant and batch size of a ViT-L/16 with
random weights: times do not depend on what the weights are. Needs an NVIDIA GPU and Triton.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import write_shapes

from vitnb import data, finetune, kernels, latency, machine, models, records, studies, taxonomy, variants

STUDY = """
title: ViT-L/16 with random weights
question: Does the instrument agree with others?
data: {folder}/shapes
base: {folder}/base
"""
REPEATS = 9


def untrained(folder: Path) -> studies.Study:
    """A study of a ViT-L/16 with random weights whose exports are written without any training."""
    write_shapes(folder / "shapes", {"train": 2, "valid": 2, "test": 40})
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    ViTForImageClassification(config).save_pretrained(folder / "base")
    ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder / "base")
    (folder / "random-l16.yaml").write_text(STUDY.format(folder=folder))
    study = studies.load(str(folder / "random-l16.yaml"))
    names = data.split(study, "train").class_names
    finetune.export(finetune.with_adapters(study, names), study, models.processor(folder / "base"), names)
    return study


def beside_do_bench(loaded, pixels) -> tuple[float, float]:
    """(ours, the ratio to Triton's) p50 in milliseconds, both with events around forwards that are handed over without waiting
    and an emptied cache; taken in turns REPEATS times, the median of each."""
    from triton.testing import do_bench

    cold, ours, theirs = latency.cold_buffer(loaded.device), [], []
    with loaded.running() as model:
        latency.warm_up(lambda: latency.on_host(loaded, model, pixels))
        for _ in range(REPEATS):
            ours.append(float(np.median(latency.on_device(loaded, model, pixels, 50, cold))))
            theirs.append(do_bench(lambda: model(pixel_values=pixels), warmup=20, rep=50 * ours[0], quantiles=[0.5]))
    return float(np.median(ours)), float(np.median(np.divide(ours, theirs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=studies.ROOT / "outputs" / "published" / "instrument")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--variants", nargs="+", default=list(variants.REGISTRY))
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        study = untrained(Path(folder))
        for name in asked.variants:
            loaded = models.load(study, variants.get(name))
            for size in asked.batch_sizes:
                pixels = loaded.to_input(data.first_batch(data.split(study, "test"), loaded.processor, size))
                ours, ratio = beside_do_bench(loaded, pixels)
                trace = kernels.trace(loaded, pixels)
                row = {
                    "variant": name, "batch_size": size, "p50_ms": ours, "over_do_bench": ratio,
                    "kernels_and_gaps_ms": trace["busy_ms"] + trace["idle_ms"], "latency_ms": trace["latency_ms"],
                    "timeline_ratio": (trace["busy_ms"] + trace["idle_ms"]) / trace["latency_ms"],
                    "idle_share": trace["idle_ms"] / trace["latency_ms"], "kernels_ms": trace["total_ms"],
                    "unclassified": kernels.by_class(trace)["other"] / trace["total_ms"], "launches": trace["launches"],
                    "attention_ran": trace["attention_ran"],
                }  # fmt: skip
                rows.append(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                others = [n for n in trace["operators_ms"] if taxonomy.classify([n]) == "other"]
                print("  unclassified by name alone:", others[:8], flush=True)
            del loaded
            torch.cuda.empty_cache()
    about = machine.machine()
    table = pd.DataFrame(rows).assign(
        device=about["gpu"], driver=about["driver"], torch=torch.__version__, commit=about["commit"]
    )
    records.write_whole(asked.out / "gpu.csv", table.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()
