"""Matrices of a survey: load, experts against classes, similarity of experts.

Legend: E experts, C classes. Needs matplotlib (extra `train`).
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .drawing import WIDTH, Picture, heat_map, listed, percent, short, spread, styled
from .surveyed import LayerSurvey, Survey

CLASSES = 30  # rows of a map that a page has room for


@styled
def load_map(survey: Survey) -> Picture | None:
    """Load per expert, a row per layer and decider; None without layers."""
    loads = {
        short(f'{name}.{decider}'): load
        for name, layer in survey.layers.items()
        for decider, load in layer.load.items()
    }
    if not loads:
        return None
    widest = max(len(load) for load in loads.values())
    values = torch.full((len(loads), widest), torch.nan)
    for row, load in zip(values, loads.values(), strict=True):
        row[: len(load)] = 100 * load
    figure = Figure(figsize=(WIDTH, 0.5 * len(loads) + 1.6), layout='constrained')
    axes = figure.subplots()
    # the same for all models, and brightest where an expert does the work of four
    heat_map(axes, values, (0, min(400 / widest, 100)), '.0f')
    axes.set_yticks(range(len(loads)), loads)
    axes.set(xlabel='expert', title=f'Load in %; an even load is {100 / widest:.3g} %')
    parts = [f'{name}: {spread(load, "expert")}' for name, load in loads.items()]
    return Picture('load', 'Load per expert and layer', '; '.join(parts) + '.', figure)


@styled
def class_map(name: str, decider: str, counts: Tensor, load: Tensor, classes: list[str]) -> Picture:
    """How the tokens of a class go to experts, from counts (E, C); each row sums to 1."""
    shares = counts.double().t() / counts.double().sum(0).clamp(min=1)[:, None]  # (C, E)
    seen = counts.sum(0) > 0
    apart = torch.where(seen, (shares - load).abs().sum(1), -1)
    rows = apart.argsort(descending=True, stable=True)[:CLASSES].sort().values
    rows = rows[seen[rows]]
    figure = Figure(figsize=(WIDTH, 0.42 * len(rows) + 1.8), layout='constrained')
    axes = figure.subplots()
    heat_map(axes, 100 * shares[rows], (0, 100 * shares.max().item()), '.0f')
    axes.set_yticks(range(len(rows)), [classes[i] for i in rows.tolist()])
    chosen = '' if len(rows) == int(seen.sum()) else f' ({len(rows)} that differ most)'
    axes.set(
        xlabel='expert',
        ylabel='class',
        title=f'{short(name)}.{short(decider)}: % of a class{chosen}',
    )
    most = [
        f'{classes[i]} to expert {int(shares[i].argmax())} ({percent(shares[i].max().item())})'
        for i in rows.tolist()
    ]
    return Picture(
        f'classes-{name}.{decider}',
        f'{name}, {decider}: experts and classes',
        f'Of each class most tokens go: {listed(most)}.',
        figure,
    )


@styled
def similarity_map(name: str, layer: LayerSurvey) -> Picture | None:
    """Cosine similarity of the experts, a panel per kind; None without any."""
    if not layer.similarity:
        return None
    size = (WIDTH / 2 * max(2, len(layer.similarity)), 4.2)
    figure = Figure(figsize=size, layout='constrained')
    panels = figure.subplots(1, len(layer.similarity), squeeze=False)[0]
    said = []
    for axes, (kind, cosine) in zip(panels, layer.similarity.items(), strict=True):
        digits = 2 if len(cosine) <= 5 else 1
        # rounded here: adding zero turns -0.0 into 0.0
        heat_map(axes, cosine.round(decimals=digits) + 0.0, (-1, 1), f'.{digits}f', 'RdBu_r')
        axes.set_yticks(axes.get_xticks())
        axes.set(title=f'{short(name)}: {kind}', xlabel='expert', ylabel='expert')
        said.append(f'of {kind}: {_pairs(cosine)}')
    return Picture(
        f'similarity-{name}',
        f'{name}: cosine similarity of experts',
        f'Cosine {"; ".join(said)}.',
        figure,
    )


def _pairs(cosine: Tensor) -> str:
    if len(cosine) < 2:
        return 'a single expert'
    others = cosine.double().clone()
    others.fill_diagonal_(-torch.inf)
    first, second = divmod(int(others.argmax()), len(cosine))
    mean = others[others.isfinite()].mean().item()
    pair = f'experts {min(first, second)} and {max(first, second)}'
    return f'{pair} are most alike, {others.max().item():.2f}, the mean over pairs is {mean:.2f}'
