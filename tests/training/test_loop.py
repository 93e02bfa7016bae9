"""The training loop: repeatable, ends with its best epoch, and shares batches."""

import re
from dataclasses import replace
from itertools import chain, count

import numpy as np
import pytest
import torch

from vitnb import devices
from vitnb.analysis import learning
from vitnb.data import dataset
from vitnb.data.images import read_image
from vitnb.errors import UserError
from vitnb.training import loop, lora


def fresh(mini, shapes, seed=0, **options):
    torch.manual_seed(seed)
    return lora.add_adapters(mini, shapes[0].class_names, **options)


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_seed_decides_everything(mini, shapes):
    train, valid, processor = shapes
    histories, ends = [], []
    for seed in (7, 7, 8):
        model = fresh(mini, shapes, seed)
        history = loop.train(model, mini, processor, train, valid, seed=seed)
        histories.append(
            [(row["epoch"], row["loss"], row["valid_top1"]) for row in history]
        )
        ends.append(snapshot(model))
    assert histories[0] == histories[1] != histories[2]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_held_validation_images_change_nothing(mini, shapes, monkeypatch):
    """With memory for no image, each is read in every epoch; with enough, once."""
    train, valid, processor = shapes
    read, seen, found = read_image, [], []
    monkeypatch.setattr(
        dataset, "read_image", lambda path: (seen.append(path), read(path))[1]
    )
    for room in (0, 2**32):
        monkeypatch.setattr(dataset, "CACHE_BYTES", room)
        seen.clear()
        history = loop.train(fresh(mini, shapes), mini, processor, train, valid, seed=0)
        times = {seen.count(path) for path in valid.paths}
        found.append((times, [(row["loss"], row["valid_top1"]) for row in history]))
    assert (
        [times for times, _ in found] == [{2}, {1}]
        and found[0][1] == found[1][1]
        and len(found[0][1]) == 2
    )


def test_a_long_epoch_says_how_far_it_is(mini, shapes, monkeypatch, capsys):
    """The clock goes 90 s with every look, so a batch takes 180 s and gets a line."""
    train, valid, processor = shapes
    ticks = count(step=90)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    loop.train(fresh(mini, shapes), mini, processor, train, valid, epochs=1)
    batches = -(-len(train) // mini.finetune.batch_size)
    said = re.findall(
        r"epoch  1/1  batch (\d+) of (\d+), at most (\d+) min left",
        capsys.readouterr().out,
    )
    assert [(int(at), int(of)) for at, of, _ in said] == [
        (i, batches) for i in range(1, batches + 1)
    ]
    # Looks: once at the start, once as the epoch begins, then twice a batch.
    assert [int(left) for *_, left in said] == [
        round((90 + 180 * i) / i * (batches - i) / 60) for i in range(1, batches + 1)
    ]


def test_the_best_epoch_is_kept_and_the_training_stops_early(mini, shapes, monkeypatch):
    scores, states = iter([0.2, 0.6, 0.5, 0.4, 0.9]), []
    train, valid, processor = shapes
    model = fresh(mini, shapes)

    def scripted(model, *_):
        states.append(snapshot(model))
        return next(scores)

    monkeypatch.setattr(loop, "validation_top1", scripted)
    study = replace(mini, finetune=replace(mini.finetune, patience=2))
    history = loop.train(model, study, processor, train, valid, epochs=5)
    assert [row["valid_top1"] for row in history] == [0.2, 0.6, 0.5, 0.4]
    kept = snapshot(model)
    assert all(torch.equal(kept[name], states[1][name]) for name in kept)
    assert not all(torch.equal(kept[name], states[3][name]) for name in kept)


def always_class_2(mini, shapes):
    model = fresh(mini, shapes)
    with torch.no_grad():
        head = model.get_base_model().classifier.modules_to_save["default"]
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    return model


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_label_smoothing_by_the_closed_form(mini, shapes, share):
    """The head gives every image the same logits, and hardly learns."""
    train, valid, processor = shapes
    budget = replace(mini.finetune, label_smoothing=share, learning_rate=1e-9, epochs=1)
    (row,) = loop.train(
        always_class_2(mini, shapes),
        replace(mini, finetune=budget),
        processor,
        train,
        valid,
        epochs=1,
    )
    cost = -torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64).log_softmax(0)
    assert row["loss"] == pytest.approx(cost.mean().item(), rel=1e-4), (
        "equal shares: smoothing changes nothing"
    )
    only_class_2 = replace(
        train,
        paths=[
            p for p, label in zip(train.paths, train.labels, strict=True) if label == 2
        ],
        labels=[2] * train.labels.count(2),
    )
    (row,) = loop.train(
        always_class_2(mini, shapes),
        replace(mini, finetune=budget),
        processor,
        only_class_2,
        valid,
        epochs=1,
    )
    wanted = (1 - share) * cost[2] + share * cost.mean()
    assert row["loss"] == pytest.approx(wanted.item(), rel=1e-4)


def test_validation_top1_counts_right_answers(mini, shapes):
    _, valid, processor = shapes
    model = always_class_2(mini, shapes)
    found = loop.validation_top1(
        model, dataset.PixelDataset(valid, processor), devices.select_device()
    )
    assert found == valid.labels.count(2) / len(valid) == 0.25 and model.training


class Team:
    """One of three processes; ``said`` holds the values of the others."""

    num_processes = 3
    device = torch.device("cpu")

    def __init__(self, process_index: int, said: list[float]):
        self.process_index, self.said = process_index, said

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        self.said.append(value.item())
        return torch.tensor(self.said, dtype=value.dtype)


def test_processes_that_share_a_split_count_each_image_once(mini, shapes):
    """20 images for 3 processes: 7, 7 and 6, five of them of class 2."""
    _, valid, processor = shapes
    model, said = always_class_2(mini, shapes), []
    for rank in range(3):
        found = loop.validation_top1(
            model,
            dataset.PixelDataset(valid, processor),
            devices.select_device(),
            Team(rank, said),
        )
    assert found == 0.25 and sum(said) == 5 and min(said) > 0


@pytest.mark.parametrize("images", [31, 32, 33])
def test_the_parts_of_a_batch_are_the_batch(shapes, images):
    """The parts of a batch are disjoint, and together they are the batch.

    Where a last batch is too small for all, its first image fills up.
    """
    split = replace(
        shapes[0], paths=(shapes[0].paths * 2)[:images], labels=list(range(images))
    )
    pixels = dataset.PixelDataset(split, shapes[2])
    whole = [
        labels.tolist() for _, labels in dataset.make_batches(pixels, 8, shuffle_seed=3)
    ]
    parts = [
        [
            y.tolist()
            for _, y in dataset.make_batches(pixels, 8, shuffle_seed=3, part=(rank, 4))
        ]
        for rank in range(4)
    ]
    assert sorted(chain(*whole)) == list(range(images))
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [batch[rank::4] or batch[:1] for rank in range(4)] == shares
        assert sorted({*chain(*shares)}) == sorted(batch)


def test_no_epochs_make_no_sense(mini, shapes):
    train, valid, processor = shapes
    with pytest.raises(UserError, match="epochs must be at least 1"):
        loop.train(fresh(mini, shapes), mini, processor, train, valid, epochs=0)


def test_a_loss_that_is_not_finite_is_an_error(mini, shapes):
    train, valid, processor = shapes
    model = fresh(mini, shapes)
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].bias[0] = np.nan
    with pytest.raises(
        UserError, match=r"loss of epoch 1 is nan: lower finetune: learning_rate"
    ):
        loop.train(model, mini, processor, train, valid)


def test_what_a_training_took():
    rows = [
        {"seconds": 1.5, "peak_bytes": 7},
        {"seconds": 2.0, "peak_bytes": 9},
        {"seconds": 0.5, "peak_bytes": 9},
    ]
    assert learning.training_cost(rows) == {"seconds": 4.0, "peak_bytes": 9}
    assert learning.training_cost([row | {"peak_bytes": None} for row in rows]) == {
        "seconds": 4.0,
        "peak_bytes": None,
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_peak_is_that_of_this_training(mini, shapes):
    """Memory of others does not count, freed or in use; the model does."""
    train, valid, processor = shapes
    before = torch.empty(2**28, device="cuda")
    del before
    living = torch.ones(2**26, device="cuda")  # of 256 MB
    model = fresh(mini, shapes)
    found = learning.training_cost(loop.train(model, mini, processor, train, valid))[
        "peak_bytes"
    ]
    assert living.all()
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    workspaces = 2**27  # of cuBLAS
    assert own < found < own + workspaces


def test_what_others_hold_is_not_in_the_peak(mini, shapes, monkeypatch):
    """A stand-in for a GPU: others hold 700 bytes beside the model, all the time."""
    model, device = fresh(mini, shapes), torch.device("cuda")
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    counts = {"allocated": own + 700, "peak": 10**12}

    def reset(_):
        counts["peak"] = counts["allocated"]

    monkeypatch.setattr(loop.devices, "free_memory", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    for name, key in (("memory", "allocated"), ("max_memory", "peak")):
        monkeypatch.setattr(
            torch.cuda, f"{name}_allocated", lambda _, key=key: counts[key]
        )
    others = loop._bytes_of_others(model, device)
    counts["peak"] += 5000
    assert loop._peak_bytes(device, None, others) == own + 5000
