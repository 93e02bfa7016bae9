"""How far the instrument can be trusted on a GPU: beside Triton's do_bench, and kernels plus gaps beside the latency.

``python tests/benchmarks/instrument_gpu.py [--out DIR]`` writes ``gpu.csv``, a row for each variant and batch size of a ViT-L/16 with
random weights: times do not depend on what the weights are. Needs an NVIDIA GPU and Triton.
"""

import argparse
import sys
import tempfile
import time
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
SECONDS, TURN_MS = 8.0, 150.0


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


def beside_do_bench(loaded, pixels) -> tuple[float, float, int]:
    """(our p50 in milliseconds, its ratio to Triton's, turns): both with events around forwards that are handed over without waiting
    and an emptied cache, in turns and in random order, for SECONDS; the median over all turns of each."""
    from triton.testing import do_bench

    cold, random, found = latency.cold_buffer(loaded.device), np.random.default_rng(0), {"ours": [], "theirs": []}
    with loaded.running() as model:
        latency.warm_up(lambda: latency.on_host(loaded, model, pixels))
        typical = np.median(latency.on_device(loaded, model, pixels, 20, cold))
        forwards = int(np.clip(TURN_MS / typical, 5, 50))
        take = {
            "ours": lambda: np.median(latency.on_device(loaded, model, pixels, forwards, cold)),
            "theirs": lambda: do_bench(
                lambda: model(pixel_values=pixels), warmup=2 * typical, rep=forwards * typical, quantiles=[0.5]
            ),
        }
        begin = time.monotonic()
        while time.monotonic() - begin < SECONDS:
            for who in random.permutation(list(take)):
                found[who].append(float(take[who]()))
    ours, theirs = (float(np.median(found[who])) for who in ("ours", "theirs"))
    return ours, ours / theirs, len(found["ours"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=studies.ROOT / "outputs" / "published" / "instrument")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--variants", nargs="+", default=list(variants.REGISTRY))
    asked = parser.parse_args()
    rows, about = [], machine.machine()
    with tempfile.TemporaryDirectory() as folder:
        study = untrained(Path(folder))
        for name in asked.variants:
            loaded = models.load(study, variants.get(name))
            for size in asked.batch_sizes:
                pixels = loaded.to_input(data.first_batch(data.split(study, "test"), loaded.processor, size))
                ours, ratio, turns = beside_do_bench(loaded, pixels)
                trace = kernels.trace(loaded, pixels)
                row = {
                    "variant": name, "batch_size": size, "p50_ms": ours, "over_do_bench": ratio, "turns": turns,
                    "kernels_and_gaps_ms": trace["busy_ms"] + trace["idle_ms"], "latency_ms": trace["latency_ms"],
                    "timeline_ratio": (trace["busy_ms"] + trace["idle_ms"]) / trace["latency_ms"],
                    "idle_share": trace["idle_ms"] / trace["latency_ms"], "kernels_ms": trace["total_ms"],
                    "unclassified": kernels.by_class(trace)["other"] / trace["total_ms"], "launches": trace["launches"],
                    "attention_ran": trace["attention_ran"],
                }  # fmt: skip
                rows.append(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                others = [n for n in trace["operators_ms"] if taxonomy.classify([n]) == "other"]
                table = pd.DataFrame(rows).assign(
                    device=about["gpu"], driver=about["driver"], torch=torch.__version__, commit=about["commit"]
                )
                records.write_whole(asked.out / "gpu.csv", table.to_csv(index=False, lineterminator="\n"))
                print("  unclassified by name alone:", others[:8], flush=True)
            del loaded
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
