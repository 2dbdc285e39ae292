"""What a preset names is measured and printed."""

from __future__ import annotations

from typing import Any

from .cells import Settings
from .layers import choose, measure_layer
from .networks import measure_networks
from .presets import Preset
from .report import layer_table, network_table


def run_layers(preset: Preset, settings: Settings) -> tuple[list[dict[str, Any]], list[Any]]:
    """Layers, with their tables."""
    rows, skipped = [], []
    for cell, names in preset.runs:
        measured, absent = measure_layer(cell, settings, choose(names))
        print(layer_table(str(cell), measured, absent), flush=True)
        rows += measured
        skipped.append({'cell': vars(cell), 'reasons': absent})
    return rows, skipped


def run_models(preset: Preset, settings: Settings) -> tuple[list[dict[str, Any]], list[Any]]:
    """As `run_layers`, networks, of which none is left out."""
    rows = []
    for comparison in preset.comparisons:
        measured = measure_networks(comparison, settings)
        print(network_table(str(comparison), measured), flush=True)
        rows += measured
    return rows, []
