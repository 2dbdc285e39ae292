"""What pictures share: their size and letters, and names that fit.

Needs matplotlib (extra `train`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

WIDTH = 8.6  # inches; the page shows a picture about as wide
ANNOTATED = 16  # more columns leave no room for numbers in the cells
# Letters that can be read at half the size, on a background of their own: the page may be dark.
STYLE: Any = {  # matplotlib's own type differs between its versions
    'font.size': 14,
    'axes.titlesize': 15,
    'figure.facecolor': 'white',
}

P = ParamSpec('P')
R = TypeVar('R')


@dataclass(frozen=True)
class Picture:
    """A figure and a sentence with the number that a reader who does not see it needs most."""

    name: str  # of its file
    title: str
    alt: str
    figure: Figure


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Makes a function draw in `STYLE`, and leaves the settings of the caller alone."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


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
    readable: Any = {'ha': 'center', 'va': 'center', 'fontsize': 11 if columns > 10 else 12}
    readable['path_effects'] = [withStroke(linewidth=2.5, foreground='white')]  # on any colour
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            if value == value:  # no nan
                axes.text(column, row, f'{value:{form}}', **readable)
