"""The pictures of a survey: classes, similarity, patches, codes, and curves over training.

Legend: E experts, C classes, M codes, D width, S sampled tokens. Needs matplotlib (extra `train`).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .measures import mean_similarity
from .pictures import (
    LEGEND,
    WIDTH,
    Picture,
    expert_colours,
    heat_map,
    percent,
    plot_experts,
    rows_of_pictures,
    short,
    styled,
    with_legend,
)
from .survey import Survey

CLASSES = 30  # rows of a map that a page has room for
COLUMNS = 6  # examples in a row: more would be too small
NAMED = 32  # codes; more numbers would lie on each other

History = Sequence[dict[str, Any]]  # lines of `routing.jsonl`
Lines = dict[str, tuple[Sequence[float], Sequence[float]]]  # x and y by name


@styled
def class_maps(survey: Survey) -> list[Picture]:
    """How the tokens of a class go to experts; each row sums to 100."""
    found = []
    for decider, counts, load in (
        (f'{name}.{decider}', counts.double(), layer.load[decider])
        for name, layer in survey.layers.items()
        for decider, counts in layer.expert_by_class.items()
    ):
        classes, of_class = survey.classes or [], counts.sum(0)
        shares = counts.t() / of_class.clamp(min=1)[:, None]  # (C, E)
        seen = of_class > 0
        apart = torch.where(seen, (shares - load).abs().sum(1), -1)
        rows = apart.argsort(descending=True, stable=True)[:CLASSES].sort().values
        rows = rows[seen[rows]]
        figure = Figure(figsize=(WIDTH, 0.42 * len(rows) + 1.8))
        axes = figure.subplots()
        heat_map(axes, 100 * shares[rows], (0, 100 * shares.max().item()), '.0f')
        axes.set_yticks(range(len(rows)), [classes[i] for i in rows.tolist()])
        chosen = '' if len(rows) == int(seen.sum()) else f' ({len(rows)} that differ most)'
        axes.set(xlabel='expert', title=f'{short(decider)}: % of a class{chosen}')
        most, expert = divmod(int(shares.argmax()), shares.shape[1])
        share = percent(shares.max().item())
        alt = f'Most together: {share} of the tokens of {classes[most]} go to expert {expert}.'
        found.append(Picture(f'{decider}: experts and classes', alt, figure))
    return found


@styled
def similarity_maps(survey: Survey) -> list[Picture]:
    """Cosine similarity of the experts, a panel per kind."""
    found = []
    for name, layer in survey.layers.items():
        if not layer.similarity:  # of experts that are not this package's
            continue
        figure = Figure(figsize=(WIDTH, 4.2))
        said, grid = [], figure.subplots(1, len(layer.similarity))
        for axes, (kind, cosine) in zip(grid, layer.similarity.items(), strict=True):
            digits = 2 if len(cosine) <= 5 else 1
            # rounded here: adding zero turns -0.0 into 0.0
            heat_map(axes, cosine.round(decimals=digits) + 0.0, (-1, 1), f'.{digits}f', 'RdBu_r')
            axes.set_yticks(axes.get_xticks())
            axes.set(title=f'{short(name)}: {kind}', xlabel='expert', ylabel='expert')
            said.append(f'{mean_similarity(cosine):.2f} of {kind}')
        alt = f'Mean cosine of two experts: {", ".join(said)}.'
        found.append(Picture(f'{name}: cosine similarity of experts', alt, figure))
    return found


@styled
def patch_maps(survey: Survey) -> list[Picture]:
    """Examples with the expert and the code of each patch, gates and slots, layer by layer."""
    examples = survey.examples[:COLUMNS]
    images = [example.image for example in examples]
    found = []
    for name, layer in survey.layers.items() if examples else ():
        experts, codes = (
            {
                decider: [getattr(example, kind)[decider] for example in examples]
                for decider in getattr(examples[0], kind)
                if decider == name or decider.startswith(f'{name}.')
            }
            for kind in ('experts', 'codes')
        )
        below: dict[str, list[Tensor]] = {}
        if name in examples[0].gates:
            below['continuous\nshare'] = [_bright(each.gates[name]) for each in examples]
        if name in examples[0].slots:
            slots = [each.slots[name] / each.slots[name].max() for each in examples]
            below |= {f'expert {i}': [_bright(s[i]) for s in slots] for i in range(len(slots[0]))}
        drawn = {'expert': (experts, layer.num_experts, below)} if experts or below else {}
        if layer.codebook is not None:
            drawn['code'] = (codes, len(layer.codebook.usage), {})
        for kind, (maps, count, others) in drawn.items():
            title = f'{short(name)}: {kind} of each patch'
            figure = plot_experts(images, maps, count, title, kind, others)
            seen = {i for of in maps.values() for each in of for i in each.unique().tolist()}
            alt = f'{len(seen - {-1})} of {count} {kind}s occur in {len(images)} pictures.'
            found.append(Picture(f'{name}: {kind}s', alt, figure))
    return found


def _bright(values: Tensor) -> Tensor:
    """Values (rows, columns) in [0, 1] as a picture (3, rows, columns), dark to bright."""
    colours = matplotlib.colormaps['viridis'](values.clamp(0, 1).numpy())
    return torch.as_tensor(colours)[..., :3].movedim(-1, 0)


@styled
def surest_patches(survey: Survey) -> list[Picture]:
    """The patches of each expert with the largest weights, a row per expert."""
    found = []
    for name, layer in survey.layers.items():
        for decider, patches in layer.confident.items():
            if not any(patches):
                continue
            loads = [percent(share) for share in layer.load[decider].tolist()]
            rows = {
                f'expert {expert}\n{load}': [patch.pixels for patch in own]
                for expert, (own, load) in enumerate(zip(patches, loads, strict=True))
            }
            figure = rows_of_pictures(rows, f'{short(f"{name}.{decider}")}: surest patches')
            weights = [patch.weight for own in patches for patch in own]
            alt = f'Their weights are from {min(weights):.2f} to {max(weights):.2f}.'
            title = f'{name}, {decider}: the surest patches of each expert'
            found.append(Picture(title, alt, figure))
    return found


@styled
def code_maps(survey: Survey) -> list[Picture]:
    """Tokens and codes on the two axes along which the tokens vary most (PCA)."""
    found = []
    for name, layer in survey.layers.items():
        if (codebook := layer.codebook) is None:
            continue
        tokens, codes, usage = codebook.tokens.double(), codebook.codes.double(), codebook.usage
        # not scikit-learn's PCA: tokens that are all the same have no variance to divide by
        mean = tokens.mean(dim=0)
        spread, axes_ = torch.linalg.eigh((tokens - mean).t() @ (tokens - mean))  # smallest first
        plane, shares = axes_[:, -2:].flip(1), spread.clamp(min=0) / spread.sum().clamp(min=1e-12)
        colours = expert_colours(layer.num_experts)
        figure = Figure(figsize=(WIDTH, 7))
        axes = figure.subplots()
        of_tokens = colours[codebook.indices % layer.num_experts].numpy()
        x, y = ((tokens - mean) @ plane).t().numpy()
        axes.scatter(x, y, c=of_tokens, s=9, alpha=0.35, linewidths=0)
        of_codes = colours[torch.arange(len(codes)) % layer.num_experts]
        places: Any = (codes - mean) @ plane  # (M, 2)
        for mask, marker in ((usage > 0, 'o'), (usage <= 0, 'X')):
            x, y = places[mask].t().numpy()
            axes.scatter(
                x,
                y,
                c=of_codes[mask].numpy(),
                s=(60 + 600 * usage[mask]).numpy(),
                marker=marker,
                edgecolors='black',
                linewidths=1.5,
            )
        for number, place in enumerate(places.tolist() if len(codes) <= NAMED else ()):
            axes.annotate(str(number), place, xytext=(7, 7), textcoords='offset points')
        axes.set(
            title=f'{short(name)}: codes (large, x: unused) among tokens',
            xlabel=f'first component, {percent(shares[-1].item())} of the variance',
            ylabel=f'second component, {percent(shares[-2].item())}',
        )
        axes.grid(alpha=0.3)
        if layer.num_experts <= LEGEND:
            with_legend(figure, [f'expert {i}' for i in range(layer.num_experts)], colours)
        alt = f'{int((usage > 0).sum())} of {len(codes)} codes are used.'
        found.append(Picture(f'{name}: codes among tokens', alt, figure))
    return found


def training_curves(history: History) -> list[Picture]:
    """Load of each expert, use of each code, and movement of weights, over the iterations."""
    found = []
    for kind, word, title in (
        ('load', 'expert', 'Load per expert over training'),
        ('code_usage', 'code', 'Share of tokens per code over training'),
        ('change', '', 'Movement of weights from one record to the next'),
    ):
        layers: Any = defaultdict(lambda: defaultdict(lambda: ([], [])))
        for line in history:
            for name, recorded in line['layers'].items():
                values = recorded.get(kind) or {}
                if kind != 'change':
                    values = {f'{word} {i}': share for i, share in enumerate(values)}
                for label, value in values.items():
                    x, y = layers[name][label]
                    x.append(line['iteration'])
                    # a part that is frozen has no place on an axis of logarithms
                    y.append(value if kind != 'change' or value > 0 else float('nan'))
        if layers:
            found.append(_curves(title, 'iteration', layers, kind == 'change'))
    return found


def convergence_curves(convergence: Mapping[str, Any]) -> list[Picture]:
    """What is left of the way to the last checkpoint, a panel per layer and a line per part."""
    layers: dict[str, Lines] = defaultdict(dict)
    for name, measured in convergence.items():
        layer, _, part = name.rpartition('.')
        left = measured['distance']
        layers[layer][part] = [*range(1, len(left) + 1)], left
    return [_curves('Way that is left to the last checkpoint', 'checkpoint', layers)]


@styled
def _curves(title: str, xlabel: str, layers: Mapping[str, Lines], log: bool = False) -> Picture:
    columns, rows = min(len(layers), 2), -(-len(layers) // 2)
    figure = Figure(figsize=(WIDTH, 3 * rows + 1.6))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(layers))
        axes.grid(alpha=0.3)
    for axes, (layer, lines) in zip(grid.flat, layers.items(), strict=False):
        colours = expert_colours(len(lines)).tolist()
        styles = zip(lines.items(), colours, cycle(('-', '--', ':', '-.')), strict=False)
        for (label, (x, y)), colour, style in styles:
            axes.plot(x, y, style, label=label, color=colour)
        axes.set(title=short(layer), xlabel=xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    # of all panels, once all of them are drawn: a limit that is set leaves later lines outside
    if log:
        grid[0, 0].set(yscale='log', ylabel='|new - old| / |new|')
    else:
        grid[0, 0].set(ylim=(0, None), ylabel='share')
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    if len(handles) <= LEGEND:
        below = [*handles.values()]
        figure.legend(handles=below, loc='outside lower center', ncols=4, frameon=False)
    figure.suptitle(title)
    ends = ((y[0], y[-1]) for lines in layers.values() for _, y in lines.values())
    most, last = map(max, zip(*ends, strict=True))
    return Picture(title, f'The largest goes from {most:.2g} to {last:.2g}.', figure)
