"""Figures of the notebooks and of the report.

Each function takes a table or a record and returns a matplotlib Figure. A figure's
module is imported when the figure is first used (PEP 562). The waterfall is drawn by
``vitnb.figures.waterfall.waterfall``: a function cannot share its module's name here.
"""

from importlib import import_module

MODULES = {
    "learning": ("confusion", "learning_curve", "pretraining_curve"),
    "mixed_precision": (
        "ablation_ends",
        "ablation_layers",
        "layer_effects",
        "linears_map",
        "plan_curve",
    ),
    "profile": ("kernel_classes", "operators", "parts_and_classes"),
    "style": ("MARKERS", "palette"),
    "thumbnails": ("gallery",),
    "tradeoffs": (
        "accuracy_latency",
        "accuracy_size",
        "latency_distribution",
        "size_memory",
    ),
}
_HOMES = {name: module for module, names in MODULES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"vitnb.figures has no figure '{name}'")
    return getattr(import_module(f"vitnb.figures.{_HOMES[name]}"), name)
