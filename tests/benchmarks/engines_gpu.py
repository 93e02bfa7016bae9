"""Compare engines and external models on a GPU, for a ViT-L/16 with random weights.

``python tests/benchmarks/engines_gpu.py [--out DIR]`` writes ``ratios.csv``,
``times.csv`` and the record of ``vitnb compare``. Times do not depend on the values of
the weights; accuracy does, and is no part of this. Takes about five minutes on an H200.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.instrument_gpu import untrained
from vitnb.measure import ceilings, comparison
from vitnb.study import PEERS, ROOT

SETTINGS = """
variants: [{variants}]
peers: [{peers}]
batch_sizes: [1, 8, 32, 128]
compare: {{rounds: 20, seconds: 30, forwards: 2, processes: 1}}
"""
VARIANTS = [
    *("fp32-sdpa", "bf16-sdpa", "nf4-sdpa", "int8-sdpa"),
    *("bf16-sdpa-graph", "bf16-sdpa-fused", "nf4-sdpa-graph", "nf4-sdpa-fused"),
    *("w8a8-sdpa-graph", "fp8-sdpa-fused"),
]
BEST_16_BIT = "bf16-sdpa-fused"
# (what, slower, faster, the least ratio at 1, 8, 32 and 128 images). A row that says
# "at most" has the largest ratios.
BARS = [
    ("NF4 faster than fp32 eager", "fp32-sdpa", "nf4-sdpa-fused", (4.7, 8.5, 9.8, 9.5)),
    (
        "best 16-bit faster than timm + compile",
        "timm-compile",
        BEST_16_BIT,
        (1.0, 1.0, 1.05, 1.05),
    ),
    (
        "NF4 over best 16-bit, at most",
        "nf4-sdpa-fused",
        BEST_16_BIT,
        (1.25, 1.15, 1.08, 1.05),
    ),
    (
        "fp8 faster than best 16-bit",
        BEST_16_BIT,
        "fp8-sdpa-fused",
        (None, None, 1.1, 1.2),
    ),
    (
        "fp8 faster than torchao's",
        "torchao-fp8-compile",
        "fp8-sdpa-fused",
        (None, None, None, None),
    ),
]


def bars(times: pd.DataFrame) -> pd.DataFrame:
    """Return each ratio beside its bar.

    Args:
        times: see ``analysis.comparison.time_table``.
    """
    p50 = times.set_index(["variant", "batch_size"]).p50_ms
    rows = []
    for what, slower, faster, limits in BARS:
        for size, limit in zip((1, 8, 32, 128), limits, strict=True):
            ratio = p50.get((slower, size), float("nan")) / p50.get(
                (faster, size), float("nan")
            )
            met = (
                ""
                if limit is None
                else bool(ratio <= limit if "at most" in what else ratio >= limit)
            )
            rows.append(
                {
                    "what": what,
                    "batch_size": size,
                    "ratio": ratio,
                    "bar": limit,
                    "met": met,
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs" / "published" / "engines"
    )
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS.format(
            variants=", ".join(asked.variants), peers=", ".join(asked.peers)
        )
        study = untrained(Path(folder), settings)
        comparison.compare_study(study)
        for name in ("ratios.csv", "times.csv", "records/compare.json"):
            shutil.copy(study.outputs / name, asked.out)
    table = bars(pd.read_csv(asked.out / "times.csv"))
    table.to_csv(asked.out / "bars.csv", index=False, lineterminator="\n")
    measured = ceilings.measure_ceilings(torch.device("cuda"))
    print(
        pd.read_csv(asked.out / "times.csv")
        .pivot(index="variant", columns="batch_size", values="p50_ms")
        .round(3)
    )
    print(table.round(3).to_string(index=False))
    print(measured)


if __name__ == "__main__":
    main()
