"""Patches of a survey: coloured by expert or code, the surest of each expert, gates, slots, codes.

Legend: E experts, M codes, D width, S sampled tokens. Needs matplotlib (extra `train`).
"""

from collections.abc import Iterator, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from .drawing import WIDTH, Picture, listed, percent, short, styled
from .pictures import NO_EXPERT, expert_colours, rows_of_pictures, tint_patches, with_legend
from .surveyed import Codes, Example, LayerSurvey, Patch, Survey

COLUMNS = 6  # examples in a row: more would be too small
LEGEND = 20  # colours that can be told apart
NAMED = 32  # more numbers would lie on each other


def frames(survey: Survey) -> Iterator[Picture]:
    """Pictures with their patches coloured, one by one for each decider, in the layers' order."""
    examples = survey.examples[:COLUMNS]
    for name, layer in survey.layers.items():
        for decider in _of_layer(name, examples, 'experts'):
            maps = [example.experts[decider] for example in examples]
            yield _frame(examples, maps, layer.num_experts, decider, 'expert')
        for decider in _of_layer(name, examples, 'codes'):
            assert layer.codebook is not None
            maps = [example.codes[decider] for example in examples]
            yield _frame(examples, maps, len(layer.codebook.usage), decider, 'code')


def _of_layer(layer: str, examples: Sequence[Example], kind: str) -> list[str]:
    names = getattr(examples[0], kind) if examples else []
    return [name for name in names if name == layer or name.startswith(f'{layer}.')]


@styled
def _frame(
    examples: Sequence[Example], maps: Sequence[Tensor], count: int, decider: str, kind: str
) -> Picture:
    tinted = [
        tint_patches(example.image[None], chosen[None], count)[0]
        for example, chosen in zip(examples, maps, strict=True)
    ]
    rows = {'image': [example.image for example in examples], f'{kind}s': tinted}
    cell = (WIDTH - 1.6) / max(len(examples), 3)
    figure = rows_of_pictures(rows, f'{short(decider)}: {kind} of each patch', cell)
    figure.set_figwidth(WIDTH)
    colours, names = expert_colours(count), [f'{kind} {i}' for i in range(count)]
    if any((chosen == -1).any() for chosen in maps):
        names, colours = [*names, f'no {kind}'], torch.cat([colours, NO_EXPERT])
    if count <= LEGEND:
        with_legend(figure, names, colours)
    counts = torch.cat([m.flatten() for m in maps]).add(1).bincount(minlength=count + 1)[1:]
    best = counts.argsort(descending=True, stable=True)[:3]
    shares = [
        f'{kind} {i} {percent(counts[i].item() / sum(m.numel() for m in maps))}' for i in best
    ]
    alt = (
        f'Patches of {len(examples)} pictures in the colour of their {kind} by {decider}. '
        f'{int((counts > 0).sum())} of {count} {kind}s occur, most often {listed(shares)}.'
    )
    return Picture(f'{kind}s-{decider}', f'{decider}: {kind}s', alt, figure)


@styled
def contact_sheet(name: str, decider: str, layer: LayerSurvey) -> Picture:
    """The patches of each expert with the largest weights, a row per expert."""
    sheet = layer.confident[decider]
    # as wide a sheet for an expert with few patches, or these would be huge
    figure, axes = _sheet(max(6, *map(len, sheet)), len(sheet), room=1.1)
    for expert, patches in enumerate(sheet):
        for at, patch in enumerate(patches):
            _show(axes, patch.pixels, expert, at, f'{patch.weight:.2f}')
    loads = [percent(share) for share in layer.load[decider].tolist()]
    axes.set_yticks(
        [expert + 0.5 for expert in range(len(sheet))],
        [f'expert {expert}\n{load}' for expert, load in enumerate(loads)],
    )
    figure.suptitle(f'{short(name)}.{short(decider)}: surest patches, with their weights')
    how = 'lie nearest to the codes' if 'codebook' in decider else 'have the largest weights'
    surest = [_surest(expert, patches) for expert, patches in enumerate(sheet)]
    return Picture(
        f'surest-{name}.{decider}',
        f'{name}, {decider}: the surest patches of each expert',
        f'Patches that {how}, and their weights. {" ".join(surest)}',
        figure,
    )


def _sheet(columns: int, rows: int, room: float) -> tuple[Figure, Axes]:
    """Axes for many small pictures: a pair of axes for each would take seconds to lay out."""
    height = 0.9 + rows * (WIDTH - room) / columns
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    axes = figure.subplots()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0), autoscale_on=False)
    return figure, axes


def _show(
    axes: Axes, picture: Tensor, row: int, column: int, label: str, high: float = 1
) -> AxesImage:
    """A picture (h, w) or (3, h, w) in a cell of a sheet, below its label."""
    height, width = picture.shape[-2:]
    size = 0.74 / max(height, width)
    left, top = column + (1 - size * width) / 2, row + 0.24
    axes.text(column + 0.5, row + 0.2, label, ha='center', fontsize=12)
    return axes.imshow(
        (picture if picture.ndim == 2 else picture.permute(1, 2, 0).clamp(0, 1)).numpy(),
        extent=(left, left + size * width, top + size * height, top),
        vmin=0,
        vmax=high,
    )


def _surest(expert: int, patches: Sequence[Patch]) -> str:
    if not patches:
        return f'Expert {expert}: none.'
    images = len({patch.image for patch in patches})
    return (
        f'Expert {expert}: {len(patches)} from {images} images, weights '
        f'{patches[0].weight:.2f} to {patches[-1].weight:.2f}.'
    )


@styled
def gate_map(name: str, examples: Sequence[Example]) -> Picture:
    """The share of the continuous branch at each patch, and how often it has which value."""
    examples = examples[:4]
    figure = Figure(figsize=(WIDTH, 6), layout='constrained')
    grid = figure.add_gridspec(2, len(examples), height_ratios=(1, 1.2))
    shown = None
    maps = []
    for column, example in enumerate(examples):
        axes = figure.add_subplot(grid[0, column])
        shown = axes.imshow(example.gates[name].numpy(), vmin=0, vmax=1, cmap='viridis')
        axes.set(xticks=[], yticks=[])
        axes.set_title(example.name, fontsize=12)
        maps.append(axes)
    assert shown is not None
    figure.colorbar(shown, ax=maps, label='share', pad=0.02)
    values = torch.cat([example.gates[name].flatten() for example in examples]).float()
    axes = figure.add_subplot(grid[1, :])
    axes.hist(values.numpy(), bins=25, range=(0, 1), color='tab:blue')
    axes.set(xlabel='share of the continuous branch', ylabel='patches', xlim=(0, 1))
    axes.grid(alpha=0.3)
    figure.suptitle(f'{short(name)}: share of the continuous branch')
    low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return Picture(
        f'gates-{name}',
        f'{name}: share of the continuous branch',
        f'Of the patches of {len(examples)} pictures the middle share is {middle:.2f}; '
        f'eight of ten lie between {low:.2f} and {high:.2f}.',
        figure,
    )


@styled
def slot_map(name: str, examples: Sequence[Example]) -> Picture:
    """What the slots of each expert mix: dispatch weights over the picture."""
    examples = examples[:3]
    num_experts = len(examples[0].slots[name])
    columns = min(num_experts, 8)
    lines = -(-num_experts // columns)
    high = max(example.slots[name].max().item() for example in examples)
    figure, axes = _sheet(columns + 1, lines * len(examples), room=1.2)
    said = []
    for number, example in enumerate(examples):
        top = number * lines
        _show(axes, example.image, top, 0, 'image')
        slots = example.slots[name].float()
        for expert, weights in enumerate(slots):
            row, column = top + expert // columns, 1 + expert % columns
            shown = _show(axes, weights, row, column, f'exp. {expert}', high)
        peak = (slots.flatten(1).max(1).values / slots.flatten(1).sum(1).clamp(min=1e-12)).tolist()
        said.append(f'{example.name}: {percent(min(peak))} to {percent(max(peak))}')
    figure.colorbar(shown, ax=axes, label='dispatch weight', pad=0.02)
    figure.suptitle(f"{short(name)}: what each expert's slots look at")
    alt = (
        f'Dispatch weights of {num_experts} experts over {len(examples)} pictures. The patch with '
        f"the largest weight has, of an expert's sum over the picture, {'; '.join(said)}."
    )
    return Picture(f'slots-{name}', f'{name}: slots', alt, figure)


@styled
def code_map(name: str, codebook: Codes, num_experts: int) -> Picture:
    """Tokens and codes on the two axes along which the tokens vary most (PCA)."""
    tokens, codes = codebook.tokens.double(), codebook.codes.double()
    mean, plane, shares = _plane(tokens)
    colours = expert_colours(num_experts)
    figure = Figure(figsize=(WIDTH, 7), layout='constrained')
    axes = figure.subplots()
    x, y = ((tokens - mean) @ plane).t().numpy()
    of_tokens = colours[codebook.indices % num_experts].numpy()
    axes.scatter(x, y, c=of_tokens, s=9, alpha=0.35, linewidths=0)
    of_codes = colours[torch.arange(len(codes)) % num_experts]
    _draw_codes(axes, (codes - mean) @ plane, codebook.usage, of_codes)
    axes.set(
        title=f'{short(name)}: codes (large, x: unused) among tokens',
        xlabel=f'first component, {percent(shares[0])} of the variance',
        ylabel=f'second component, {percent(shares[1])}',
    )
    axes.grid(alpha=0.3)
    if num_experts <= 20:
        with_legend(figure, [f'expert {i}' for i in range(num_experts)], colours)
    used, top = codebook.usage > 0, int(codebook.usage.argmax())
    alt = (
        f'{len(codes)} codes among {len(tokens)} tokens, on axes that hold '
        f'{percent(sum(shares))} of the variance. {int(used.sum())} codes are used; code {top} '
        f'takes most, {percent(codebook.usage[top].item())} of the tokens.'
    )
    return Picture(f'codes-{name}', f'{name}: codes among tokens', alt, figure)


def _draw_codes(axes: Axes, places: Tensor, usage: Tensor, colours: Tensor) -> None:
    """Codes at (M, 2) places, as large as their usage (M,) and with numbers if they are few."""
    sizes = 60 + 600 * usage
    for mask, marker in ((usage > 0, 'o'), (usage <= 0, 'X')):
        x, y = places[mask].t().numpy()
        axes.scatter(
            x,
            y,
            c=colours[mask].numpy(),
            s=sizes[mask].numpy(),
            marker=marker,
            edgecolors='black',
            linewidths=1.5,
        )
    if len(places) <= NAMED:
        for number, place in enumerate(places.tolist()):
            axes.annotate(str(number), place, xytext=(7, 7), textcoords='offset points')


def _plane(tokens: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Mean (D,), first two principal axes (D, 2) and their shares of the variance."""
    # not scikit-learn's: tokens that are all the same have no variance to divide by
    mean = tokens.mean(dim=0)
    spread, axes = torch.linalg.eigh((tokens - mean).t() @ (tokens - mean))  # smallest first
    shares = spread.clamp(min=0) / spread.sum().clamp(min=1e-12)
    return mean, axes[:, -2:].flip(1), shares[-2:].flip(0).tolist()
