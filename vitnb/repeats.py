"""Repeats: the same training with other seeds. One says little of a method: its seed decides a part of the result.

The first training is the one that is exported, decided before any is judged; the others are judged on validation images and
thrown away. So nothing is chosen among them, and the test is touched by one model only.
"""

import gc
import statistics

import torch

from vitnb import data, finetune, launch, studies, training


def row(seed: int, history: list[dict]) -> dict:
    """What one training gave, from its learning curve: seed, valid_top1 and epoch (of the epoch that is kept), epochs, seconds."""
    best = max(history, key=lambda epoch: epoch["valid_top1"])
    return {
        "seed": seed, "valid_top1": best["valid_top1"], "epoch": best["epoch"], "epochs": len(history),
        "seconds": training.cost(history)["seconds"],
    }  # fmt: skip


def train(
    study: studies.Study,
    processor,
    train: data.Split,
    valid: data.Split,
    first: list[dict],
    *,
    seed=0,
    seeds=None,
    epochs=None,
    processes=1,
    **adapters,
) -> list[dict]:
    """Train anew with the seeds after the first one's, on the same images; a row a seed (see ``row``), the first among them.

    Args:
        first: the learning curve of the training with ``seed``.
        seeds: how many trainings there are, with the first; None for the study's own.
        epochs, processes: as ``launch.train`` takes them.
        adapters: as ``finetune.with_adapters`` takes them. Each model, and what its dropout draws, follows from its seed alone.

    Raises UserError for fewer than one, and as ``launch.train`` does.
    """
    rows = [row(seed, first)]
    for other in range(seed + 1, seed + study.trainings(seeds)):
        print(f"seed {other}", flush=True)
        model = finetune.with_adapters(study, train.class_names, seed=other, **adapters)
        history = launch.train(model, study, processor, train, valid, seed=other, epochs=epochs, processes=processes)
        rows.append(row(other, history))
        del model
        gc.collect()  # modules refer to each other in circles
        torch.cuda.empty_cache()
    return rows


def results(rows: list[dict]) -> dict[str, float]:
    """Mean and standard deviation (of a sample, n - 1) of the validation top-1, by name; nothing for one training."""
    if len(rows) < 2:
        return {}
    found = [row["valid_top1"] for row in rows]
    return {"mean valid top1": statistics.mean(found), "valid top1 sd": statistics.stdev(found)}


def told(rows: list[dict]) -> str:
    """What the seeds say, in words."""
    first, found = rows[0], [row["valid_top1"] for row in rows]
    if len(rows) == 1:
        return (
            f"validation top-1 with seed {first['seed']}: {first['valid_top1']:.3f}; one training has no spread: "
            "take 3 seeds or more to see what a seed decides"
        )
    mean, sd = results(rows).values()
    return (
        f"validation top-1 over {len(rows)} seeds: {mean:.3f} +- {sd:.3f} (sd), {min(found):.3f} to {max(found):.3f}; "
        f"seed {first['seed']}, which is exported, has {first['valid_top1']:.3f}"
    )
