"""Figures of the notebooks and of the report: each takes a table or a record and returns a matplotlib Figure."""

from vitnb.figures.inside import kernel_classes, operators, parts_and_classes
from vitnb.figures.learning import ablation_ends, ablation_layers, confusion, gallery, learning_curve, pretraining_curve
from vitnb.figures.plans import layer_effects, linears_map, plan_curve
from vitnb.figures.style import MARKERS, palette
from vitnb.figures.tradeoffs import accuracy_latency, accuracy_size, latency_distribution, size_memory
from vitnb.figures.waterfall import waterfall

__all__ = [
    "MARKERS", "ablation_ends", "ablation_layers", "accuracy_latency", "accuracy_size", "confusion", "gallery",
    "kernel_classes", "latency_distribution", "layer_effects", "learning_curve", "linears_map", "operators", "palette", "parts_and_classes",
    "plan_curve", "pretraining_curve", "size_memory", "waterfall",
]  # fmt: skip
