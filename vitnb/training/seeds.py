"""Train with several seeds, to see how much of a result the seed decides.

The training with the first seed is exported. This choice is made before any result is
known. The other trainings are judged on validation images and thrown away. No training
is therefore chosen by its result, and one model alone sees the test images.
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
    train_split: Split,
    valid_split: Split,
    first: list[dict],
    *,
    seed: int = 0,
    seeds: int | None = None,
    epochs: int | None = None,
    processes: int = 1,
    **adapters,
) -> list[dict]:
    """Train with the seeds after ``seed``, on the same images.

    Initial weights and dropout of each training depend on its own seed alone.

    Args:
        first: the learning curve of the training with ``seed``.
        seeds: number of trainings, the first included; None for the study's own number.
        epochs, processes: see ``distributed.train_shared``.
        adapters: see ``lora.add_adapters``.

    Returns:
        One row per seed, the first included; see ``learning.summarize_seed``.

    Raises:
        UserError: fewer than one seed, and as ``distributed.train_shared`` does.
    """
    rows = [learning.summarize_seed(seed, first)]
    for other in range(seed + 1, seed + study.trainings(seeds)):
        print(f"seed {other}", flush=True)
        model = lora.add_adapters(
            study, train_split.class_names, seed=other, **adapters
        )
        history = distributed.train_shared(
            model,
            study,
            processor,
            train_split,
            valid_split,
            seed=other,
            epochs=epochs,
            processes=processes,
        )
        rows.append(learning.summarize_seed(other, history))
        del model
        gc.collect()  # modules refer to each other in circles
        torch.cuda.empty_cache()
    return rows
