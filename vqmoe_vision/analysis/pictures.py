"""Pictures of test images: the expert that took each patch, the class of each pixel.

Needs matplotlib (extra `train`).
"""

from collections.abc import Mapping, Sequence

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

# How far the brightest pixel of a patch is lightened. A dark pixel keeps the colour of the legend.
LIGHTEN = 0.7
NO_EXPERT = torch.tensor([[0.2, 0.2, 0.2]])  # RGB of a patch that no expert takes


def expert_colours(num_experts: int) -> Tensor:
    """Gives every expert a colour: (E, 3), RGB in [0, 1]."""
    if num_experts <= 20:  # lists of distinct colours, looked up by their index
        listed = matplotlib.colormaps['tab10' if num_experts <= 10 else 'tab20']
        rgba = listed(range(num_experts))
    else:
        rgba = matplotlib.colormaps['hsv']([i / num_experts for i in range(num_experts)])
    return torch.as_tensor(rgba)[:, :3].float()


def tint_patches(images: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Images (B, C, H, W) in [0, 1] with each patch (B, rows, columns) in its expert's colour."""
    (height, width), (rows, columns) = images.shape[-2:], experts.shape[-2:]
    palette = torch.cat([expert_colours(num_experts), NO_EXPERT])  # where -1 is the last
    colours = palette.to(images)[experts].permute(0, 3, 1, 2)
    colours = colours.repeat_interleave(height // rows, -2).repeat_interleave(width // columns, -1)
    # Of the image only the brightness: its colours would be taken for those of experts.
    return colours + LIGHTEN * images.mean(dim=1, keepdim=True) * (1 - colours)


def plot_experts(
    images: Tensor, experts: dict[str, Tensor], num_experts: int, title: str
) -> Figure:
    """Draws a row of images, and below it one row per router with the expert of every patch."""
    rows = {'image': images.expand(-1, 3, -1, -1)}
    rows |= {name: tint_patches(images, e, num_experts) for name, e in experts.items()}
    figure = rows_of_pictures(rows, title)
    names, colours = [f'expert {i}' for i in range(num_experts)], expert_colours(num_experts)
    if any((each == -1).any() for each in experts.values()):
        names, colours = [*names, 'no expert'], torch.cat([colours, NO_EXPERT])
    with_legend(figure, names, colours)
    return figure


def plot_segmentation(
    images: Tensor, labels: dict[str, Tensor], classes: Sequence[str], palette: Tensor, title: str
) -> Figure:
    """Draws a row of images, and below it one row per kind of label map."""
    rows = {'image': images} | {name: palette[m].movedim(-1, 1) for name, m in labels.items()}
    figure = rows_of_pictures(rows, title)
    with_legend(figure, classes, palette)
    return figure


def rows_of_pictures(
    rows: Mapping[str, Tensor | Sequence[Tensor]], title: str, cell: float = 1.1
) -> Figure:
    """Draws a grid of pictures with a name before each row."""
    count = len(next(iter(rows.values())))
    size = (cell * count + 1.6, 1.05 * cell * len(rows) + 1.3)
    figure = Figure(figsize=size, layout='constrained')
    figure.suptitle(title)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for (name, pictures), cells in zip(rows.items(), grid, strict=True):
        label = name.replace('.mlp.', '\n')  # 'blocks.1.mlp.router' is too wide for one line
        cells[0].set_ylabel(label, rotation=0, ha='right', va='center', fontsize='large')
        for picture, axes in zip(pictures, cells, strict=True):
            _show(axes, picture)
    return figure


def with_legend(figure: Figure, names: Sequence[str], colours: Tensor) -> None:
    """Adds a legend below a figure."""
    figure.legend(
        handles=[
            Patch(color=tuple(colour.tolist()), label=name)
            for name, colour in zip(names, colours, strict=True)
        ],
        loc='outside lower center',
        # an entry is a patch and its name, 0.13 inches per letter and 0.7 around
        ncols=max(1, int(figure.get_figwidth() / (0.13 * max(map(len, names)) + 0.7))),
        frameon=False,
        fontsize='large',
    )


def _show(axes: Axes, picture: Tensor) -> None:
    # Not imshow's smoothing: the borders of patches are what is to be seen.
    axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation='nearest')
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
