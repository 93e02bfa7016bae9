"""Repeats: the same training with other seeds. One says little of a method: its seed decides a part of the result.

The first training is the one that is exported, decided before any is judged; the others are judged on validation images and
thrown away. So nothing is chosen among them, and the test is touched by one model only.
"""

import gc

import torch

from vitnb.analysis import learning
from vitnb.data.splits import Split
from vitnb.study import Study
from vitnb.training import distributed, lora


def train_seeds(
    study: Study,
    processor,
    train: Split,
    valid: Split,
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
    rows = [learning.summarize_seed(seed, first)]
    for other in range(seed + 1, seed + study.trainings(seeds)):
        print(f"seed {other}", flush=True)
        model = lora.add_adapters(study, train.class_names, seed=other, **adapters)
        history = distributed.train_shared(model, study, processor, train, valid, seed=other, epochs=epochs, processes=processes)
        rows.append(learning.summarize_seed(other, history))
        del model
        gc.collect()  # modules refer to each other in circles
        torch.cuda.empty_cache()
    return rows
