"""Pictures of test images, with patches by expert and pixels by class; what all pictures share.

Needs matplotlib (extra `train`).
"""

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH = 8.6  # inches; the page shows a picture about as wide
ANNOTATED = 16  # more columns leave no room for numbers in the cells
# Letters that can be read at half the size, on a background of their own: the page may be dark.
STYLE: Any = {  # matplotlib's own type differs between its versions
    'font.size': 14,
    'axes.titlesize': 15,
    'figure.constrained_layout.use': True,
    'figure.facecolor': 'white',
    'text.parse_math': False,  # of names of classes, which have a $ as any letter
}

# Makes a function draw so, and leaves the settings of the caller alone.
styled = matplotlib.rc_context(STYLE)


@dataclass(frozen=True)
class Picture:
    """A figure and a sentence with the number that a reader who does not see it needs most."""

    title: str
    alt: str
    figure: Figure

    @property
    def uri(self) -> str:
        """The address of its bytes in a page."""
        data = io.BytesIO()
        # a quarter of a PNG: a page of a dozen layers stays below 3 MB
        self.figure.savefig(data, format='webp', dpi=96, pil_kwargs={'quality': 75})
        return f'data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}'


def percent(share: float) -> str:
    """A share in words of a page, which no line breaks: '14 %', '0.3 %', '0 %'."""
    if 0 < share < 0.0005:
        return 'under\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}%'
    digits = 1 if 0 < share < 0.01 else 0
    return f'{100 * share:.{digits}f}\N{NO-BREAK SPACE}%'


def short(name: str) -> str:
    """A layer or decider as an axis can show it: 'blocks.1.mlp.quantizer.codebook' has no room."""
    return name.replace('.mlp', '').replace('quantizer.', '')


def heat_map(
    axes: Axes, values: Tensor, limits: tuple[float, float], form: str, colours: str = 'viridis'
) -> None:
    """Draws a matrix with its numbers in the cells, where there is room, and a colour bar."""
    shown = axes.imshow(values.numpy(), vmin=limits[0], vmax=limits[1], cmap=colours, aspect='auto')
    axes.figure.colorbar(shown, ax=axes, pad=0.02)
    rows, columns = values.shape
    axes.set_xticks(range(0, columns, -(-columns // ANNOTATED)))
    if columns > ANNOTATED or rows > 2 * ANNOTATED:
        return
    stroke, size = withStroke(linewidth=2.5, foreground='white'), 11 if columns > 10 else 12
    for row, column in values.isnan().logical_not().nonzero().tolist():
        text = axes.text(column, row, f'{values[row, column]:{form}}', ha='center', va='center')
        text.set(fontsize=size, path_effects=[stroke])  # on any colour


# How far the brightest pixel of a patch is lightened. A dark pixel keeps the colour of the legend.
LIGHTEN = 0.7
NO_EXPERT = torch.tensor([[0.2, 0.2, 0.2]])  # RGB of a patch that no expert takes
CELL, GAP = 152, 8  # pixels of a picture in a row of them, and between two
LEGEND = 20  # colours that can be told apart


def expert_colours(num_experts: int) -> Tensor:
    """Gives every expert a colour: (E, 3), RGB in [0, 1]."""
    if num_experts <= LEGEND:  # lists of distinct colours, looked up by their index
        rgba = matplotlib.colormaps['tab10' if num_experts <= 10 else 'tab20'](range(num_experts))
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
    images: Sequence[Tensor] | Tensor,
    experts: Mapping[str, Sequence[Tensor] | Tensor],
    num_experts: int,
    title: str,
) -> Figure:
    """Draws a row of images, and below it one per router with the expert of every patch."""
    rows = {'image': list(images)}
    for name, maps in experts.items():
        pairs = zip(images, maps, strict=True)
        rows[name] = [tint_patches(x[None], each[None], num_experts)[0] for x, each in pairs]
    figure = rows_of_pictures(rows, title)
    names, colours = [f'expert {i}' for i in range(num_experts)], expert_colours(num_experts)
    if any((each == -1).any() for maps in experts.values() for each in maps):
        names, colours = [*names, 'no expert'], torch.cat([colours, NO_EXPERT])
    if num_experts <= LEGEND:
        with_legend(figure, names, colours)
    return figure


def plot_segmentation(
    images: Tensor, labels: dict[str, Tensor], classes: Sequence[str], palette: Tensor, title: str
) -> Figure:
    """Draws a row of images, and below it one row per kind of label map."""
    rows = {name: list(palette[each].movedim(-1, 1)) for name, each in labels.items()}
    figure = rows_of_pictures({'image': list(images), **rows}, title)
    with_legend(figure, classes, palette)
    return figure


def as_canvas(rows: Collection[Sequence[Tensor]]) -> Tensor:
    """Rows of pictures (1 or 3, h, w) in [0, 1] of any sizes as a single one, on white."""
    step, columns = CELL + GAP, max(3, *map(len, rows))
    canvas = torch.ones(3, len(rows) * step, columns * step)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            scale = CELL / max(picture.shape[-2:])
            size = [max(round(scale * length), 1) for length in picture.shape[-2:]]
            # the borders of patches are to be seen, so no smoothing
            mode = 'area' if scale < 1 else 'nearest-exact'
            fitted = F.interpolate(picture[None].float().cpu(), size, mode=mode)[0].clamp(0, 1)
            y, x = row * step + (CELL - size[0]) // 2, column * step + (CELL - size[1]) // 2
            canvas[:, y : y + size[0], x : x + size[1]] = fitted
    return canvas[:, :-GAP, :-GAP]


def label(name: str) -> Tensor:
    """The name of a decider as a picture for a canvas."""
    blank = Image.new('RGB', (CELL, CELL), 'white')
    text = short(name.replace('.mlp.', '\n'))  # too wide for one line
    ImageDraw.Draw(blank).text((4, CELL // 3), text, 'black', ImageFont.load_default(20))
    return torch.from_numpy(np.array(blank)).movedim(-1, 0) / 255


def rows_of_pictures(rows: Mapping[str, Sequence[Tensor]], title: str) -> Figure:
    """Draws rows of pictures (1 or 3, h, w) in [0, 1] of any sizes, a name before each."""
    # one canvas: axes of their own for hundreds of pictures would take seconds to lay out
    canvas = as_canvas(rows.values())
    inches = (WIDTH - 1.6) / canvas.shape[2] * canvas.shape[1] + 1.4
    figure = Figure(figsize=(WIDTH, inches), layout='constrained')
    figure.suptitle(title)
    axes = figure.subplots()
    axes.imshow(canvas.permute(1, 2, 0).numpy())
    # 'blocks.1.mlp.router' is too wide for one line
    names = [name.replace('.mlp.', '\n') for name in rows]
    axes.set_yticks([row * (CELL + GAP) + CELL / 2 for row in range(len(rows))], names)
    axes.set(xticks=[], frame_on=False)
    axes.tick_params(length=0)
    return figure


def with_legend(figure: Figure, names: Sequence[str], colours: Tensor) -> None:
    """Adds a legend below a figure."""
    legend = figure.legend(
        handles=[
            Patch(color=tuple(colour), label=name)
            for name, colour in zip(names, colours.tolist(), strict=True)
        ],
        loc='outside lower center',
        # an entry is a patch and its name, 0.13 inches per letter and 0.7 around
        ncols=max(1, int(figure.get_figwidth() / (0.13 * max(map(len, names)) + 0.7))),
        frameon=False,
        fontsize='large',
    )
    for text in legend.get_texts():
        text.set_parse_math(STYLE['text.parse_math'])
